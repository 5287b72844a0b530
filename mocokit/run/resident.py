"""Small sets held on the device whole: nothing is read or sent while a run goes on."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit.data.batch import read_batch
from mocokit.data.decode import BadImage
from mocokit.data.source import Source
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.packed import PackedSource
from mocokit.data.sources.unread import Unread

SHARE = 0.25  # of the free memory; the rest is for activations, which come later
PIECE = 2**26  # bytes read at a time: a file mapped from disk need not fit into memory


class Resident:
    """The images of a source on a device, one after another.

    pixels: (P, 3) uint8; starts: (N,) int64, where each image begins, on the host.
    """

    def __init__(self, source: Source, most: int, bound: int | None, device: torch.device) -> None:
        """most: pixels that all images have together, or fewer where some are reduced to `bound`.

        An image that cannot be read now counts as one that cannot be read.
        """
        heights, widths = np.zeros((2, len(source)), np.int64)
        bad: dict[int, str] = {}
        self.pixels, filled = torch.empty((most, 3), dtype=torch.uint8, device=device), 0
        count = max(1, len(source) * PIECE // max(1, 3 * most))
        for first in range(0, len(source), count):
            numbers = np.arange(first, min(first + count, len(source)))
            batch = read_batch(source, numbers, bound)
            heights[batch.index], widths[batch.index] = batch.heights, batch.widths
            bad |= {number: reason for number, _, reason in batch.bad}
            read = batch.pixels.view(-1, 3)
            self.pixels[filled : filled + len(read)].copy_(read)
            filled += len(read)
        ends = np.cumsum(heights * widths)
        self.starts = ends - heights * widths
        self.unread = Unread(source, heights, widths, bad)  # what is left for a loader to read

    def canvases(self, index: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """All pixels, and where these images begin among them."""
        return self.pixels, self.starts[index]


def hold(source: Source, bound: int | None, device: torch.device) -> Resident | None:
    """The images of an array or of a pack of bare pixels, if the device has memory to spare.

    On a CPU they are where they are needed already; and files would have to be decoded first.
    """
    room = spare_pixels(device)
    try:
        if isinstance(source, ArraySource):
            most = len(source) * int(np.prod(source.images.shape[1:3]))
        elif isinstance(source, PackedSource) and source.raw and room > 0:
            most = source.count_pixels(bound)
        else:
            return None
        return Resident(source, most, bound, device) if most <= room else None
    except (BadImage, torch.OutOfMemoryError):  # the pack is gone, or so is the memory
        return None


def spare_pixels(device: torch.device) -> int:
    """Pixels for which there is memory on the device now."""
    if device.type != "cuda":
        return -1
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE * free) // 3
