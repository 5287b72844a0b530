"""Stopping on a signal: it sets a flag, and the loop reads the flag between steps and saves.

Work that leaves nothing to save, such as scoring, can be interrupted at the points it declares.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from mocokit.errors import Interrupted
from mocokit.files import shell_word

PREEMPTED, BY_HAND = 75, 130
_HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


class Stopped(BaseException):
    """Raised out of work that a signal interrupts. The code that allowed it catches it."""


_interruptible: "StopSignals | None" = None


def raise_if_interrupted() -> None:
    """A point at which work may end: raises Stopped if that is allowed and a signal has come.

    The signal's handler does not raise it, because it runs anywhere. A loader interrupted while it
    starts its workers would leave one behind, and training would later take its end for a failure.
    """
    if _interruptible is not None and _interruptible.asked:
        raise Stopped


class StopSignals:
    """While entered, SIGTERM, SIGUSR1, SIGHUP and Ctrl-C only set `exit_code`.

    SIGHUP comes when a terminal closes. A run that was started to ignore it, by nohup, does. A
    second Ctrl-C raises KeyboardInterrupt. Outside the main thread this does nothing, since only
    the main thread may set signal handlers.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._before: dict[int, object] = {}
        self._raises = False

    @property
    def asked(self) -> bool:
        return self.exit_code is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
            if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
                numbers.append(_HANGUP)
            for number in numbers:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.exit_code == BY_HAND:
            raise KeyboardInterrupt
        self.exit_code = BY_HAND if number == signal.SIGINT else PREEMPTED
        if self._raises:
            self._raises = False  # only once: the cleaning up must not be interrupted
            raise Stopped

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While entered, `raise_if_interrupted` raises, if a signal came before or during it."""
        global _interruptible
        before, _interruptible = _interruptible, self
        try:
            raise_if_interrupted()
            yield
        finally:
            _interruptible = before

    @contextmanager
    def before_the_first_step(self) -> Iterator[None]:
        """While entered, a signal raises Interrupted at once: there is nothing to save yet."""
        try:
            if self.asked:
                raise Stopped
            self._raises = True
            try:
                yield
            finally:
                self._raises = False
        except Stopped:
            raise Interrupted(
                "stopped before the first step: there was nothing to save",
                self.exit_code or PREEMPTED,
                agreed=False,
            ) from None

    def error(self, step: int, folder: object) -> Interrupted:
        """The error to raise once the checkpoint after `step` steps is written."""
        # Without an exit code, the signal went to another process.
        code = PREEMPTED if self.exit_code is None else self.exit_code
        out = shell_word(str(folder))
        return Interrupted(
            f"stopped after step {step} and saved; resume with the same command and --out {out}",
            code,
        )
