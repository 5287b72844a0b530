"""Canvases and a table of parameters to a batch of views, normalised, on the device.

What follows the crop is done on a CPU operation by operation, to the images that the table names,
and on a CUDA device by one compiled function to all images.

The flip is done with the crop, wherever the settings put it: it commutes with all that follows,
for colours are changed pixel by pixel and the blur is symmetric; RandAugment comes after it.
"""

from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit.transfer import to_device
from mocokit.views import colour
from mocokit.views.canvases import Canvases, Sizes
from mocokit.views.fused import finish
from mocokit.views.params import Table, ViewSpec
from mocokit.views.randaugment import randaugment
from mocokit.views.separable import blur_rows


def make_views(
    spec: ViewSpec,
    table: Table,
    pixels: Tensor,
    heights: Sizes,
    widths: Sizes,
    device: torch.device | str,
    starts: Sizes | None = None,
) -> Tensor:
    """Views (N, 3, size, size), float32, normalised, channels last, of N canvases.

    pixels: the canvases one after another, uint8, each H x W x 3 in rows, in host memory (pinned,
    if it is to reach a CUDA device without waiting) or on the device. Or any pixels, of which
    canvas n begins with number starts[n].
    """
    canvases = Canvases.lay_out(pixels, heights, widths, torch.device(device), starts)
    return _views(spec, table, canvases)


@torch.no_grad()
def _views(spec: ViewSpec, table: Table, canvases: Canvases) -> Tensor:
    with _own_precision(canvases.device):
        return _make(spec, table, canvases)


def _make(spec: ViewSpec, table: Table, canvases: Canvases) -> Tensor:
    out = _empty(spec, canvases)
    for part in canvases.parts(table.boxes[:, 2], table.boxes[:, 3], spec.size):
        rows = table.rows(part)
        images = canvases.crop(part, rows.boxes, rows.flip, spec)
        if _fuses(canvases.device):
            images = finish(images, rows, spec)
        else:
            for operation in spec.order:
                _apply(operation, images, rows, spec)
            images = _normalise(spec, images)
        _put(out[part], images)
    return out


class ViewsOnDemand:
    """The views that `make_views` makes, but only the rows that are asked for, each time anew.

    For batches whose views would fill the memory: canvases are uint8, and often smaller.
    """

    def __init__(
        self,
        spec: ViewSpec,
        table: Table,
        pixels: Tensor,
        heights: Sizes,
        widths: Sizes,
        device: torch.device | str,
        starts: Sizes | None = None,
    ) -> None:
        self._spec, self._table = spec, table
        self._canvases = Canvases.lay_out(pixels, heights, widths, torch.device(device), starts)

    def __len__(self) -> int:
        return len(self._canvases.heights)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Tensor:
        return _views(self._spec, self._table.rows(rows), self._canvases.select(rows))


class View:
    """A view of each image, and where it was cut: what a method is given.

    `images` are (n, 3, S, S), made already or on demand. For methods that match places in two
    views: `boxes` (n, 4), top, left, height and width in pixels of the canvas, `canvas` (n, 2), its
    height and width, and `flipped` (n,), all on the host.
    """

    def __init__(
        self, images: Tensor | ViewsOnDemand, table: Table, heights: Sizes, widths: Sizes
    ) -> None:
        self.images, self.boxes, self.flipped = images, table.boxes, table.flip
        self._sizes = heights, widths

    @property
    def canvas(self) -> Sizes:
        return np.stack(self._sizes, axis=1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Tensor:
        if isinstance(self.images, Tensor) and not isinstance(rows, slice):
            return self.images[to_device(rows, self.images.device)]  # or the host would wait
        return self.images[rows]  # type: ignore[index]


@torch.no_grad()
def evaluation_views(
    spec: ViewSpec, pixels: Tensor, heights: Sizes, widths: Sizes, device: torch.device | str
) -> Tensor:
    """As `make_views`: the short side resized to spec.resize, then the centre spec.size square."""
    canvases = Canvases.lay_out(pixels, heights, widths, torch.device(device))
    resized = _short_side(heights, widths, spec.resize)
    # Python's round and rint agree, and torchvision's CenterCrop rounds.
    corner = np.rint((resized - spec.size) / 2).astype(np.int64)
    out = _empty(spec, canvases)
    with _own_precision(canvases.device):
        for part in canvases.parts(heights, widths, spec.size):
            images = canvases.resize(part, resized[part], corner[part], spec)
            _put(out[part], _normalise(spec, images))
    return out


def _own_precision(device: torch.device) -> AbstractContextManager[object]:
    """Outside the caller's autocast, which would take the products in a coarser precision."""
    return torch.autocast(device.type, enabled=False)


def _short_side(heights: Sizes, widths: Sizes, resize: int) -> Sizes:
    """Sizes (N, 2) with the short side `resize`; the long side is cut to whole pixels."""
    sizes = np.stack([heights, widths], axis=1)
    short = sizes.min(axis=1, keepdims=True)
    return np.where(sizes == short, resize, resize * sizes // short)


def _empty(spec: ViewSpec, canvases: Canvases) -> Tensor:
    shape = (len(canvases.heights), 3, spec.size, spec.size)
    device = canvases.device
    return torch.empty(shape, device=device, memory_format=torch.channels_last)


def _put(out: Tensor, images: Tensor) -> None:
    """Copy to channels last; on a CPU, stacking planes takes half the time of a copy."""
    if out.device.type == "cpu":
        torch.stack(images.unbind(1), -1, out=out.permute(0, 2, 3, 1))
    else:
        out.copy_(images)


def _normalise(spec: ViewSpec, images: Tensor) -> Tensor:
    """In place."""
    numbers = np.array([spec.mean, spec.std]).reshape(2, 3, 1, 1)
    mean, std = to_device(numbers, images.device, images.dtype)
    return images.sub_(mean).div_(std)


def _apply(operation: str, images: Tensor, table: Table, spec: ViewSpec) -> None:
    """One operation, in place, on the images that the table names."""
    if operation == "jitter":
        factors = np.stack([table.brightness, table.contrast, table.saturation, table.hue])
        colour.jitter_rows(images, np.flatnonzero(table.jitter), factors, table.order)
    elif operation == "grayscale" and table.grayscale.any():
        colour.grayscale_rows(images, np.flatnonzero(table.grayscale))
    elif operation == "blur":
        blur_rows(images, table.sigma)
    elif operation == "randaugment":
        randaugment(images, table.randaugment, spec.mean)
    elif operation == "solarize" and table.solarize.any():
        colour.solarize_rows(images, np.flatnonzero(table.solarize))


def _fuses(device: torch.device) -> bool:
    """Whether all that follows the crop is one function of all images."""
    return device.type == "cuda"
