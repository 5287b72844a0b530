"""Features of a data set, computed once and kept in a table on disk, which is memory-mapped.

The name of a table is a hash of everything that its numbers depend on: weights, images, view and
precision. A file (`protocols/table_file.py`) has a checksum for each batch of rows. Batches that
are missing, because of a kill, or damaged are computed again, as whole batches, so the finished
table is bit for bit the same. Images that could not be read are tried again whenever the table is
opened, because the reason may have passed.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit import files
from mocokit.data.loader import read_batches
from mocokit.data.source import Source
from mocokit.engine.stop import Stopped
from mocokit.errors import UserError
from mocokit.files import locked, writing
from mocokit.nets.modes import evaluating
from mocokit.protocols.features import BATCH, CROP_AREA, evaluation_batches, probe_spec
from mocokit.protocols.table_file import TableFile
from mocokit.views.params import ViewSpec, scoring_bound
from mocokit.weights.subject import FrozenModel

FORMAT = 3  # 2 had no checksums
LIMIT_GIB = 20.0  # size of all tables; beyond it, the least recently used are deleted
Progress = Callable[[int, int], None]  # images done, total images


@dataclass(frozen=True)
class Transform:
    """How an image becomes the view of which features are computed.

    `crops` is the seed of random crops; without it, the view is the centre crop.
    """

    crops: int | None = None

    def describe(self, spec: ViewSpec) -> str:
        """The view in words, for a protocol."""
        size = f"{spec.size} x {spec.size}, {spec.interpolation}"
        if self.crops is not None:
            low, high = CROP_AREA
            return f"a random crop of area {low:g} to {high:g}, {size}, and a flip"
        if spec.resize == spec.size:
            return f"short side and centre {size}"
        return f"short side {spec.resize}, centre crop {size}"


CENTRE = Transform()


def key_of(subject: FrozenModel, source: Source, transform: Transform = CENTRE) -> str:
    """The name of the table of these images under these weights."""
    spec = subject.spec
    parts = (
        *(FORMAT, subject.weights, subject.architecture, subject.layer, subject.width),
        *(subject.precision, subject.device.type, source.stamp(), len(source)),
        *(transform.describe(spec), transform.crops),
        *(f"{number:.9g}" for number in (*spec.mean, *spec.std)),
    )
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Table:
    """Row i (D,) holds the features of image i, or NaN if it is unreadable."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self.rows = rows
        self.good = np.flatnonzero(~np.isnan(rows[:, 0]))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """Features (n, D) of these images. All images in order are mapped, not copied."""
        if len(numbers) == len(self.rows) and (numbers == np.arange(len(numbers))).all():
            return torch.from_numpy(self.rows)
        return torch.from_numpy(self.rows[numbers])


def features_of(
    subject: FrozenModel,
    source: Source,
    transform: Transform = CENTRE,
    *,
    workers: int = 0,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
    log: Callable[[str], None] = lambda text: None,
) -> Table:
    """The table of a source, from `folder` if it is there. Without a folder, nothing is kept.

    `log` gets a sentence where something in the cache is damaged. Raises MocokitError where the
    cache cannot be written.
    """
    computing = _Computing(subject, source, transform, workers, progress)
    if folder is None:
        rows = np.empty((len(source), subject.width), np.float32)
        for first, part in computing.batches(np.arange(blocks_of(len(source)))):
            rows[first : first + len(part)] = part
        return _checked(rows, source)
    key = key_of(subject, source, transform)
    path = folder / f"{key}.npy"
    with writing(folder, remedy="set MOCOKIT_CACHE to a folder with free space, or use --no-cache"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(files.open_own(folder / f"{key}.lock"), "a")
    with lock:
        with writing(folder, remedy="set MOCOKIT_CACHE to a disk with locks, or use --no-cache"):
            files.lock(lock)
        with TableFile.open(path, key, (len(source), subject.width)) as file:
            missing = file.missing()
            for note in file.notes:
                log(f"note: {note}")
            _complete(file, computing, missing)
            rows = file.rows()
        prune(folder, path)
    return _checked(rows, source)


def _checked(rows: NDArray[np.float32], source: Source) -> Table:
    table = Table(rows)
    if not len(table.good):
        raise UserError(
            f"none of the {len(source)} images of {source.name} gave features: either none can be "
            "read, or the weights are not finite; check the images with mocokit check"
        )
    return table


@dataclass(frozen=True)
class _Computing:
    """How rows are made: whole batches of consecutive images."""

    subject: FrozenModel
    source: Source
    transform: Transform
    workers: int
    progress: Progress

    def batches(self, blocks: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first image, rows) for each of these batches, ascending; unreadable images are NaN."""
        count, width = len(self.source), self.subject.width
        numbers = np.concatenate([np.arange(0), *(_numbers(block, count) for block in blocks)])
        waiting, done = blocks.tolist(), count - len(numbers)
        with evaluating(self.subject.network):
            for batch, views in evaluation_batches(
                self.source,
                numbers,
                self.subject.spec,
                self.subject.device,
                self.workers,
                self.transform.crops,
            ):
                block = int(batch.index[0]) // BATCH
                # Batches without a single readable image are not yielded.
                while waiting[0] < block:
                    yield _unread(waiting.pop(0), count, width)
                first, rows = _unread(waiting.pop(0), count, width)
                rows[batch.index - first] = self.subject.features(views).cpu().numpy()
                yield first, rows
                done += len(rows)
                self.progress(done, count)
        for block in waiting:
            yield _unread(block, count, width)

    def readable(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of these images that can be read."""
        bound = scoring_bound(probe_spec(self.subject.spec))
        batches = read_batches(self.source, numbers, BATCH, bound, self.workers)
        return np.concatenate([np.arange(0), *(batch.index for batch in batches)])


def _complete(file: TableFile, computing: _Computing, missing: NDArray[np.int64]) -> None:
    """Compute the batches that a file lacks, and those whose unread images can now be read."""
    if len(file.unread):
        missing = np.union1d(missing, computing.readable(file.unread) // BATCH)
    count = len(computing.source)
    done = count - sum(len(_numbers(block, count)) for block in missing.tolist())
    try:
        for first, rows in computing.batches(missing):
            file.write(first // BATCH, rows)
            done += len(rows)
    except Stopped:
        name = computing.subject.name
        raise Stopped(f"features of {name}: {done:,} of {count:,} images are kept") from None
    if len(missing):
        file.sync()


def blocks_of(count: int) -> int:
    """The number of batches of so many images."""
    return -(-count // BATCH)


def _numbers(block: int, count: int) -> NDArray[np.int64]:
    """The images of a batch."""
    return np.arange(block * BATCH, min((block + 1) * BATCH, count))


def _unread(block: int, count: int, width: int) -> tuple[int, NDArray[np.float32]]:
    """The first image of a batch, and rows for images that cannot be read."""
    numbers = _numbers(block, count)
    return int(numbers[0]), np.full((len(numbers), width), np.nan, np.float32)


def prune(folder: Path, kept: Path, limit_gib: float = LIMIT_GIB) -> None:
    """Delete the least recently used tables, until the rest fit the limit.

    A table that another process is using stays. What cannot be deleted stays.
    """
    every = [*folder.glob("*.npy"), *folder.glob("*.partial")]  # partial: unfinished ones of 0.1
    ages = {path: _age(path) for path in every if path != kept}
    size = kept.stat().st_size
    for path in sorted(ages, key=lambda path: ages[path], reverse=True):
        with suppress(OSError):
            size += path.stat().st_size
            if size > limit_gib * 2**30:
                with locked(path.with_suffix(".lock"), wait=False):
                    path.unlink()
                    path.with_suffix(".lock").unlink()


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0
