"""A batch: several images of different sizes, one after another, without padding."""

import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mocokit.data.decode import BadImage
from mocokit.data.source import Source
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.unread import Unread
from mocokit.errors import UserError

_SHARED_MEMORY = "/dev/shm"
_TRIES = 100  # images tried for one place in a batch before giving up


class Batch(NamedTuple):
    """Images as canvases of different sizes.

    index: (n,) int64, each image's stable number; of a substitute its own
    pixels: flat uint8, one canvas (H, W, 3) after another
    heights, widths: (n,) int64
    bad: number, name and reason of every image that could not be read
    """

    # Hides tuple.index, which is not needed here.
    index: NDArray[np.int64]  # type: ignore[assignment]
    pixels: torch.Tensor
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    bad: tuple[tuple[int, str, str], ...] = ()

    def pin_memory(self) -> "Batch":
        """The same with pixels in page-locked memory, from which a GPU copies by itself."""
        return self._replace(pixels=self.pixels.pin_memory())


def read_spread(
    source: Source, count: int, bound: int | None
) -> tuple[dict[int, NDArray[np.uint8]], list[str]]:
    """Read `count` images spread evenly over a source.

    {number: pixels} of those that can be read, and a line with the reason for each other one.
    """
    found, bad = {}, []
    for number in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
        try:
            found[number] = source.read(number, bound)
        except BadImage as reason:
            bad.append(f"{source.describe(number)}: {reason}")
    return found, bad


def read_batch(
    source: Source,
    indices: NDArray[np.int64],
    bound: int | None,
    other: Callable[[int, int], int] | None = None,
    avoid: frozenset[int] = frozenset(),
) -> Batch:
    """These images in this order; `bad` names each that cannot be read.

    `other(index, attempt)` gives the number of a substitute; without it the place is left out.
    Images in `avoid` are replaced without being read or named.
    """
    indices = np.asarray(indices, np.int64)
    if isinstance(source, ArraySource):
        images = source.gather(indices)  # (n, H, W, 3)
        heights, widths = (np.full(len(indices), images.shape[axis], np.int64) for axis in (1, 2))
        return Batch(indices, torch.from_numpy(images.reshape(-1)), heights, widths)
    if isinstance(source, Unread) and not (source.bad or avoid):
        # A short cut: at 10 ms a step, a GPU would wait for the loop below.
        empty = torch.empty(0, dtype=torch.uint8)
        return Batch(indices, empty, source.heights[indices], source.widths[indices])
    read: list[tuple[int, NDArray[np.uint8]]] = []
    bad: list[tuple[int, str, str]] = []
    for index in indices.tolist():
        candidate = index
        for attempt in range(_TRIES):
            try:
                if candidate not in avoid:
                    read.append((candidate, source.read(candidate, bound)))
                    break
            except BadImage as error:
                bad.append((candidate, source.describe(candidate), str(error)))
            if other is None:
                break
            candidate = other(index, attempt)
        else:
            name = source.describe(candidate)
            raise _hopeless(source, bad[-1] if bad else (candidate, name, "as once before"))
    return _join(read, tuple(bad))


def _join(
    read: list[tuple[int, NDArray[np.uint8]]], bad: tuple[tuple[int, str, str], ...]
) -> Batch:
    index = np.array([number for number, _ in read], np.int64)
    heights = np.array([canvas.shape[0] for _, canvas in read], np.int64)
    widths = np.array([canvas.shape[1] for _, canvas in read], np.int64)
    pixels = _room(sum(canvas.size for _, canvas in read))
    flat, first = pixels.numpy(), 0
    for _, canvas in read:
        flat[first : first + canvas.size] = canvas.reshape(-1)
        first += canvas.size
    return Batch(index, pixels, heights, widths, bad)


def _room(size: int) -> torch.Tensor:
    """Memory for a batch's pixels: in a worker, shared with the training process if it fits."""
    worker = torch.utils.data.get_worker_info()
    if worker is None or not size or 2 * worker.num_workers * size >= free_shared_memory():
        return torch.empty(size, dtype=torch.uint8)
    # Private, as in torch's own collation: pixels moved to shared memory later would be copied.
    storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def free_shared_memory() -> int:
    """Bytes that can still be shared with other processes; containers often have only 64 MB."""
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return sys.maxsize  # not Linux: shared memory is no file system, so its size is unknown


def _hopeless(source: Source, last: tuple[int, str, str]) -> UserError:
    what = f"{_TRIES} images of {source.name} in a row cannot be read, the last being {last[1]}"
    return UserError(f"{what} ({last[2]}): check that the images are there and whole")
