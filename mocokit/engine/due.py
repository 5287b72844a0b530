"""What is due after a step: a record, a score, a checkpoint, a stop."""

import time

import torch
import torch.distributed as dist


class Due:
    """Answers for steps counted from 1. Clocks and signals differ between processes, so their
    answers are agreed on, at the steps that are recorded; on one process, at every step.
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
        self.world = world
        self._saved = time.monotonic()

    def log(self, step: int) -> bool:
        """The first step, every n-th and the last."""
        return step == 1 or step % self.log_steps == 0 or step == self.total_steps

    def monitor(self, step: int) -> bool:
        """Every n-th epoch's end but the last, which is scored when the run is finished."""
        return self._epoch_end(step, self.monitor_epochs) and step < self.total_steps

    def health(self, step: int) -> bool:
        """With every score, after the first epoch, so that what is wrong shows early, and last."""
        first = self.monitor_epochs > 0 and step == self.steps_per_epoch
        return first or self.monitor(step) or step == self.total_steps

    def save_or_stop(self, step: int, asked_to_stop: bool) -> tuple[bool, bool]:
        """Whether to write a checkpoint, and whether to stop after it."""
        late = time.monotonic() - self._saved >= self.save_seconds
        if self.world > 1:
            late, asked_to_stop = self._agree(step, late, asked_to_stop)
        planned = self._epoch_end(step, self.save_epochs) or step == self.total_steps
        planned = planned or self._epoch_end(step, self.milestone_epochs)
        planned = planned or (self.save_steps is not None and step % self.save_steps == 0)
        save = planned or late or asked_to_stop
        if save:
            self._saved = time.monotonic()
        return save, asked_to_stop and step < self.total_steps

    def _epoch_end(self, step: int, every: int) -> bool:
        return every > 0 and step % (every * self.steps_per_epoch) == 0

    def _agree(self, step: int, *wishes: bool) -> tuple[bool, ...]:
        """True where any process wishes so; a wish waits for the next recorded step."""
        if not self.log(step):
            return tuple(False for _ in wishes)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flags = torch.tensor(wishes, dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in flags)
