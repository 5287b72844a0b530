"""Standard output and error of a command that may have lost its reader.

A pipe may be closed (`| head`), a log may lie on a full disk, a terminal may be gone. The work goes
on to its end; what becomes of the exit code is decided here.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, cast

from mocokit.files import Unheard, printable, reason_of, show


@contextmanager
def unheard() -> Iterator[Unheard]:
    """While entered, writing to standard output or error never fails; yields the output.

    Afterwards Python's own last flush succeeds too: it would change the exit code to 120.
    """
    for number in range(3):  # or the next file opened would become standard error
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = Unheard(sys.stdout), Unheard(sys.stderr)
    sys.stdout, sys.stderr = cast(IO[str], out), cast(IO[str], err)
    try:
        yield out
    finally:
        for stream in (out, err):
            _settle(stream)
        sys.stdout, sys.stderr = before


def _settle(stream: Unheard) -> None:
    """Let what is still held back go nowhere, if it cannot go where it should."""
    stream.flush()
    if stream.error is not None and stream.stream is not None:
        with suppress(OSError, ValueError):  # no file of the system, as in a test
            number, nowhere = stream.stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def lost(out: Unheard) -> str:
    """What to say of output that did not arrive; empty where its reader went away by itself."""
    out.flush()
    error = out.error
    if error is None or isinstance(error, (BrokenPipeError, ValueError)):
        return ""
    if isinstance(error, OSError) and error.errno == errno.EBADF:  # closed from the start
        return ""
    return f"cannot write the output ({reason_of(error)})"


def sentence(error: OSError) -> str:
    """A failure of the system that no other code had a sentence for: which file, and why."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    places = [show(os.fsdecode(name)) for name in names]
    where = f"{' or '.join(places)}: " if places else ""
    return f"{where}{printable(reason_of(error))}"
