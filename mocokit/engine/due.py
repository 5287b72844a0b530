"""What is due after a step: a metrics line, a score, a checkpoint, a stop."""

import time

import torch
import torch.distributed as dist

AGREE_SECONDS = 5.0  # between agreements; a scheduler leaves a stopped run some tens of seconds
MOST_STEPS = 1000  # between agreements, however fast the steps are


class Due:
    """Says what is due after a step, counted from 1.

    Clocks and signals differ between processes. Several processes therefore agree on them every few
    seconds and after each score. A single process decides at every step.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        *,
        log_steps: int,
        monitor_epochs: int,
        save_minutes: float,
        save_epochs: int,
        save_steps: int | None,
        milestone_epochs: int | None = None,
        compare_steps: int = 500,
        world: int = 1,
    ) -> None:
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.log_steps, self.monitor_epochs = log_steps, monitor_epochs
        self.save_seconds, self.save_epochs, self.save_steps = (
            60 * save_minutes,
            save_epochs,
            save_steps,
        )
        self.milestone_epochs = milestone_epochs or 0
        self.compare_steps, self.world = compare_steps, world
        self._saved = self._agreed = time.monotonic()
        self._steps = 0  # since the last agreement
        self._wait = 1  # steps from one agreement to the next

    def log(self, step: int) -> bool:
        """Whether to write a metrics line: after the first step, every n-th and the last."""
        return step == 1 or step % self.log_steps == 0 or step == self.total_steps

    def monitor(self, step: int) -> bool:
        """Whether to score: at the end of every n-th epoch, except the last.

        The finished run is scored in any case.
        """
        return self._epoch_end(step, self.monitor_epochs) and step < self.total_steps

    def health(self, step: int) -> bool:
        """Whether to measure health: with every score, after the first epoch, and at the end.

        A run that is wrong usually shows it in its first epoch.
        """
        first = self.monitor_epochs > 0 and step == self.steps_per_epoch
        return first or self.monitor(step) or step == self.total_steps

    def compare(self, step: int) -> bool:
        """Whether processes compare their copies of weights, queue and bank."""
        return self.world > 1 and step % self.compare_steps == 0

    def save_or_stop(self, step: int, stop_requested: bool) -> tuple[bool, bool]:
        """Whether to write a checkpoint, and whether to stop after it."""
        late = time.monotonic() - self._saved >= self.save_seconds
        if self.world > 1:
            late, stop_requested = self._agree(step, late, stop_requested)
        planned = self._epoch_end(step, self.save_epochs) or step == self.total_steps
        planned = planned or self._epoch_end(step, self.milestone_epochs)
        planned = planned or (self.save_steps is not None and step % self.save_steps == 0)
        save = planned or late or stop_requested
        if save:
            self._saved = time.monotonic()
        return save, stop_requested and step < self.total_steps

    def _epoch_end(self, step: int, every: int) -> bool:
        return every > 0 and step % (every * self.steps_per_epoch) == 0

    def _agree(self, step: int, *wishes: bool) -> tuple[bool, ...]:
        """True for each wish that any process has. Between agreements nothing is granted."""
        self._steps += 1
        if self._steps < self._wait and not self.health(step):
            return tuple(False for _ in wishes)
        pace = (time.monotonic() - self._agreed) / self._steps
        wait = max(1, min(MOST_STEPS, int(AGREE_SECONDS / max(pace, 1e-9))))
        # An all-reduce waits for the device, so it is too slow for every step.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        # All must use the same wait, or some would enter the next all-reduce alone. The maximum of
        # the negative waits is the shortest wait.
        gathered = torch.tensor([*wishes, -wait], dtype=torch.int32, device=device)
        dist.all_reduce(gathered, op=dist.ReduceOp.MAX)
        *flags, last = gathered.tolist()
        self._agreed, self._steps, self._wait = time.monotonic(), 0, -last
        return tuple(bool(flag) for flag in flags)
