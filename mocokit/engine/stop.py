"""Asked to stop: signals set a flag that the loop reads between steps, so that it can save.

Work that leaves nothing to save, such as scoring, is broken off where it says that it can be.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from mocokit.errors import Interrupted

PREEMPTED, BY_HAND = 75, 130


class Stopped(BaseException):
    """Raised out of work that a signal breaks off; whoever allowed it, catches it."""


_interruptible: "StopSignals | None" = None


def raise_if_interrupted() -> None:
    """Here work may be broken off: raises Stopped if that is allowed, and a signal has come.

    Not from the signal's handler, anywhere: a loader of images broken off while it starts its
    processes leaves one behind, whose end would later be taken for a failure of training's.
    """
    if _interruptible is not None and _interruptible.asked:
        raise Stopped


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C only set `exit_code`; a second Ctrl-C is obeyed.

    In a thread that cannot take signals it does nothing.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._before: dict[int, object] = {}
        self._breaks = False

    @property
    def asked(self) -> bool:
        return self.exit_code is not None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
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
        if self._breaks:
            self._breaks = False  # once: cleaning up is not to be broken off
            raise Stopped

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A signal, taken before or during this work, ends it at `raise_if_interrupted`."""
        global _interruptible
        before, _interruptible = _interruptible, self
        try:
            raise_if_interrupted()
            yield
        finally:
            _interruptible = before

    @contextmanager
    def before_the_first_step(self) -> Iterator[None]:
        """Work that a signal ends at once, as there is nothing to save yet; raises Interrupted."""
        try:
            if self.asked:
                raise Stopped
            self._breaks = True
            try:
                yield
            finally:
                self._breaks = False
        except Stopped:
            raise Interrupted(
                "stopped before the first step: there was nothing to save",
                self.exit_code or PREEMPTED,
                agreed=False,
            ) from None

    def error(self, step: int, folder: object) -> Interrupted:
        """What to raise once the checkpoint after `step` steps is written."""
        code = PREEMPTED if self.exit_code is None else self.exit_code  # asked on another process
        return Interrupted(
            f"stopped after step {step} and saved; go on with the same command and --out {folder}",
            code,
        )
