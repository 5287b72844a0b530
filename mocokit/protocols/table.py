"""Features of a data set, computed once and kept in a table on disk, which is memory-mapped.

The name of a table is a hash of everything that its numbers depend on: weights, images, view and
precision. An unfinished table is a file that grows by whole batches. After a kill, the computation
resumes at the same batches, so the finished table is bit for bit the same.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit.data.source import Source
from mocokit.errors import MocokitError, UserError
from mocokit.files import locked
from mocokit.nets.modes import evaluating
from mocokit.protocols.features import BATCH, CROP_AREA, evaluation_batches
from mocokit.views.params import ViewSpec
from mocokit.weights.subject import FrozenModel

FORMAT = 2
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
) -> Table:
    """The table of a source, from `folder` if it is there. Without a folder, nothing is kept."""
    if folder is None:
        rows = np.empty((len(source), subject.width), np.float32)
        for first, part in _batches(subject, source, transform, 0, workers):
            rows[first : first + len(part)] = part
            progress(first + len(part), len(source))
        return _checked(rows, source)
    key = key_of(subject, source, transform)
    path = folder / f"{key}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{key}.lock"):
            if not path.is_file():
                _compute(subject, source, transform, path, workers, progress)
                prune(folder, path)
        os.utime(path)
        # Copy on write, because torch warns of arrays that are read-only. No code writes to it.
        return _checked(np.load(path, mmap_mode="c", allow_pickle=False), source)
    except OSError as error:
        raise MocokitError(
            f"cannot keep features in {folder} ({error.strerror or error}); set MOCOKIT_CACHE to "
            "a folder with free space, or use --no-cache"
        ) from None


def _checked(rows: NDArray[np.float32], source: Source) -> Table:
    table = Table(rows)
    if not len(table.good):
        raise UserError(
            f"none of the {len(source)} images of {source.name} gave features: either none can be "
            "read, or the weights are not finite; check the images with mocokit check"
        )
    return table


def _batches(
    subject: FrozenModel, source: Source, transform: Transform, start: int, workers: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first image, rows) for each batch."""
    numbers = np.arange(start, len(source))
    expected = start
    with evaluating(subject.network):
        for batch, views in evaluation_batches(
            source, numbers, subject.spec, subject.device, workers, transform.crops
        ):
            first = start + (int(batch.index[0]) - start) // BATCH * BATCH
            # Batches without a single readable image are not yielded.
            while expected < first:
                yield expected, np.full((BATCH, subject.width), np.nan, np.float32)
                expected += BATCH
            rows = np.full((min(BATCH, len(source) - first), subject.width), np.nan, np.float32)
            rows[batch.index - first] = subject.features(views).cpu().numpy()
            yield first, rows
            expected = first + len(rows)
    if expected < len(source):
        yield expected, np.full((len(source) - expected, subject.width), np.nan, np.float32)


def _compute(
    subject: FrozenModel,
    source: Source,
    transform: Transform,
    path: Path,
    workers: int,
    progress: Progress,
) -> None:
    """Write the table to a partial file, resuming an earlier attempt, and rename it."""
    partial = path.with_suffix(".partial")
    shape, row = (len(source), subject.width), 4 * subject.width
    with open(partial, "a+b") as file:
        file.seek(0)
        start, head = 0, _header(shape)
        if file.read(len(head)) == head:
            written = (file.seek(0, os.SEEK_END) - len(head)) // row
            start = min(written // BATCH * BATCH, len(source))
        else:
            file.truncate(0)
            file.write(head)
        file.truncate(len(head) + start * row)
        file.seek(0, os.SEEK_END)
        for first, rows in _batches(subject, source, transform, start, workers):
            file.write(rows.tobytes())
            file.flush()
            progress(first + len(rows), len(source))
        os.fsync(file.fileno())
    os.replace(partial, path)


def _header(shape: tuple[int, int]) -> bytes:
    """The header of a .npy file of float32 rows."""
    import io

    buffer = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def prune(folder: Path, kept: Path, limit_gib: float = LIMIT_GIB) -> None:
    """Delete the least recently used tables, until the rest fit the limit."""
    tables = sorted(folder.glob("*.npy"), key=lambda path: path.stat().st_mtime, reverse=True)
    size = 0
    for path in [kept, *(path for path in tables if path != kept)]:
        size += path.stat().st_size
        if size > limit_gib * 2**30 and path != kept:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
