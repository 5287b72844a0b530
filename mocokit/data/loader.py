"""Batches of images in an order from chance, by any number of processes, from any step on."""

from collections.abc import Callable, Generator, Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocokit import chance
from mocokit.data.batch import Batch, read_batch
from mocokit.data.source import Source
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.unread import Unread
from mocokit.data.workers import logger, prepare_workers, read_in_workers
from mocokit.errors import UserError

__all__ = ["Batch", "Loader", "Window", "read_batch", "read_batches"]


class Window(NamedTuple):
    """What a process reads at a step: positions first .. last - 1 of an epoch's order."""

    epoch: int
    first: int
    last: int


class Reader:
    """Windows to batches: a pure function, in whatever process it is called."""

    def __init__(self, source: Source, seed: int, bound: int | None) -> None:
        self.source, self.seed, self.bound = source, seed, bound

    def read(self, window: Window, avoid: frozenset[int] = frozenset()) -> Batch:
        """The images of a window; those of `avoid` are replaced without being read."""
        order = chance.Order(self.seed, window.epoch, len(self.source))
        indices = order[np.arange(window.first, window.last)]

        def other(index: int, attempt: int) -> int:
            return self._other(window, index, attempt)

        return read_batch(self.source, indices, self.bound, other, avoid)

    def _other(self, window: Window, index: int, attempt: int) -> int:
        """A substitute for image `index`, never `index` itself."""
        size = len(self.source)
        number = chance.uniform(self.seed, window.epoch, index, attempt, chance.Slot.SUBSTITUTE)
        return (index + 1 + int(number * (size - 1))) % size


class Loader:
    """Yields (step, batch) from `start_step` to the last step of the last epoch.

    `share` maps the length of a global batch to the slice of it that this process reads. A new pass
    ends the workers of the pass before. `known_bad` gives the images that may not be used at a
    step. It is called at the step itself, because batches are read ahead, when later failures are
    not yet known. Workers that end early are started again, and `log` gets a sentence. If that
    happens twice at one step, WorkerEnded is raised.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: int,
        epochs: int,
        last: Literal["drop", "keep"],
        bound: int | None,
        workers: int,
        share: Callable[[int], slice] | None = None,
        start_step: int = 0,
        pin: bool = False,
        known_bad: Callable[[int], NDArray[np.int64]] | None = None,
        log: Callable[[str], None] = logger.warning,
    ) -> None:
        size = len(source)
        self.steps_per_epoch = size // batch_size if last == "drop" else -(-size // batch_size)
        if self.steps_per_epoch == 0:
            counts = f"train.batch_size={batch_size} is more than the {size} images"
            raise UserError(f"{counts} of {source.name}: lower it, or set data.last=keep")
        self.total_steps = self.steps_per_epoch * epochs
        # Gathering rows of an array is faster than sending pixels between processes.
        self.workers = 0 if isinstance(source, ArraySource | Unread) else workers
        self.start_step, self.pin, self._known_bad = start_step, pin, known_bad
        self._log = log
        self._reader = Reader(source, seed, bound)
        self._batch_size, self._size, self._share = batch_size, size, share
        self._arriving: Generator[Batch, None, None] | None = None
        if self.workers:
            prepare_workers()

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        self.close()
        steps = range(self.start_step, self.total_steps)
        if not (self.workers and steps):
            for step in steps:
                yield step, self._pinned(self.batch_at(step))
            return
        arriving = read_in_workers(
            self._reader.read,
            lambda done: map(self.window, steps[done:]),
            self.workers,
            self.pin,
            self._log,
        )
        self._arriving = arriving
        try:
            for step, batch in zip(steps, arriving, strict=False):
                known = self._known(step)
                stale = known.size and np.isin(batch.index, known).any()
                yield step, self._pinned(self.batch_at(step)) if stale else batch
        finally:
            arriving.close()

    def batch_at(self, step: int) -> Batch:
        """This process's share of a step, read here and now."""
        return self._reader.read(self.window(step), frozenset(self._known(step).tolist()))

    def _known(self, step: int) -> NDArray[np.int64]:
        return np.empty(0, np.int64) if self._known_bad is None else self._known_bad(step)

    def _pinned(self, batch: Batch) -> Batch:
        return batch.pin_memory() if self.pin else batch

    def window(self, step: int) -> Window:
        """Where in which epoch's order this process's share of a step lies."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self._batch_size
        length = min(self._batch_size, self._size - first)
        part = range(length) if self._share is None else range(length)[self._share(length)]
        return Window(epoch, first + part.start, first + part.stop)

    def close(self) -> None:
        """End the workers, each after its current batch."""
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            arriving.close()


def read_batches(
    source: Source,
    indices: NDArray[np.int64],
    batch_size: int,
    bound: int | None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of these images in this order, without those that cannot be read."""
    parts = [indices[first : first + batch_size] for first in range(0, len(indices), batch_size)]
    reader = Listed(source, bound)
    if workers == 0 or isinstance(source, ArraySource) or len(parts) < 2:
        yield from map(reader.read, parts)
    else:
        yield from read_in_workers(reader.read, lambda done: parts[done:], workers)


class Listed:
    """Lists of numbers to batches."""

    def __init__(self, source: Source, bound: int | None) -> None:
        self.source, self.bound = source, bound

    def read(self, indices: NDArray[np.int64]) -> Batch:
        return read_batch(self.source, indices, self.bound)
