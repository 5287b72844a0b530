"""What can go wrong, and the exit code of each.

MocokitError            1    our fault, or a run that cannot go on
├── UserError           2    a mistake in the input: one sentence with what, where, the remedy
├── NonFiniteLoss       1    the loss became NaN or infinite; the last good checkpoint stands
└── Interrupted    75, 130   asked to stop, and saved: SIGTERM and SIGUSR1 give 75, Ctrl-C 130
"""


class MocokitError(Exception):
    """The root: everything that mocokit raises on purpose."""

    exit_code = 1


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
