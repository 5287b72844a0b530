"""What can go wrong, and the exit code of each.

MocokitError            1    our fault, or a run that cannot go on
├── UserError           2    a mistake in the input: one sentence with what, where, the remedy
├── NonFiniteLoss       1    the loss became NaN or infinite; the last good checkpoint stands
└── Interrupted    75, 130   asked to stop, and saved: SIGTERM and SIGUSR1 give 75, Ctrl-C 130
"""

LONGEST = 2000  # characters of a message


def printable(text: str) -> str:
    """Text that somebody else wrote, on one line and without a terminal's control characters.

    What would move the cursor, end the line, turn the direction of writing or stay unseen is shown
    as in Python's literals: \\x1b, \\n, \\u202e.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class MocokitError(Exception):
    """The root: everything that mocokit raises on purpose.

    A message often quotes a file's name or content, and is shown on terminals and kept in logs.
    So every message is made `printable` here, where none is forgotten, and its middle is cut out
    where somebody's text makes it endless.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 :]}"
        super().__init__(printable(message))


class UserError(MocokitError, ValueError):
    """A mistake in the input, told in one sentence: what, where, and the remedy."""

    exit_code = 2


class NonFiniteLoss(MocokitError):
    """The loss of a step was NaN or infinite."""


class Interrupted(MocokitError):
    """The run was asked to stop; it has saved everything and can be resumed.

    `agreed`: every process of the run stops for it.
    """

    def __init__(self, message: str, exit_code: int, agreed: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.agreed = exit_code, agreed
