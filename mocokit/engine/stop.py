"""Asked to stop: signals set a flag that the loop reads between steps, so that it can save."""

import signal
import threading
from types import FrameType, TracebackType

from mocokit.errors import Interrupted

PREEMPTED, BY_HAND = 75, 130


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C only set `exit_code`; a second Ctrl-C is obeyed.

    In a thread that cannot take signals it does nothing.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._before: dict[int, object] = {}

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

    def error(self, step: int, folder: object) -> Interrupted:
        """What to raise once the checkpoint after `step` steps is written."""
        code = PREEMPTED if self.exit_code is None else self.exit_code  # asked on another process
        return Interrupted(
            f"stopped after step {step} and saved; go on with the same command and --out {folder}",
            code,
        )
