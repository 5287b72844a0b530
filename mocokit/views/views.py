"""Canvases and a table of parameters to a batch of views, normalised, on the device.

There are two ways to crop and resize, which agree to one level of 255: a dense product on the
device, batched, and PIL's own algorithm in torch's uint8 kernel, image by image, which on a CPU is
ten times as fast for photos. Device type and size alone decide between them.

The flip is done with the crop, wherever the settings put it: it commutes with all that follows,
for colours are changed pixel by pixel and the blur is symmetric; RandAugment comes after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mocokit.views import colour
from mocokit.views.params import Table, ViewSpec
from mocokit.views.randaugment import randaugment
from mocokit.views.separable import (
    DENSE_SIDE,
    blur_rows,
    crop_boxes,
    resize_window,
    upload,
)

Sizes = NDArray[np.int64]
Way = Literal["grid", "gathered", "each"]
# A chunk of views on a CPU stays near its cache: 1.5 MB of floats.
_CACHED_FLOATS = 3 * 2**17
# A chunk of padded canvases on a device: 2^25 pixels are .4 GB as floats, .3 GB as their indices.
_GATHERED_PIXELS = 2**25


def make_views(
    spec: ViewSpec,
    table: Table,
    pixels: Tensor,
    heights: Sizes,
    widths: Sizes,
    device: torch.device | str,
) -> Tensor:
    """Views (N, 3, size, size), float32, normalised, channels last, of N canvases.

    pixels: the canvases one after another, uint8, each H x W x 3 in rows, in host memory (pinned,
    if it is to reach a CUDA device without waiting) or on the device.
    """
    return _views(spec, table, _Canvases.lay_out(pixels, heights, widths, torch.device(device)))


@torch.no_grad()
def _views(spec: ViewSpec, table: Table, canvases: "_Canvases") -> Tensor:
    out = _empty(spec, canvases)
    for part in canvases.parts(table.boxes[:, 2], table.boxes[:, 3], spec.size):
        rows = table.rows(part)
        images = canvases.crop(part, rows.boxes, rows.flip, spec)
        for fused, group in groupby(spec.order, colour.MAPS.__contains__):
            if fused and _fuses(canvases.device):
                images = colour.map_colours(images, list(group), rows)
                continue
            for operation in group:
                _apply(operation, images, rows, spec)
        _put(out[part], _normalise(spec, images))
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
    ) -> None:
        self._spec, self._table = spec, table
        self._canvases = _Canvases.lay_out(pixels, heights, widths, torch.device(device))

    def __len__(self) -> int:
        return len(self._canvases.heights)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Tensor:
        return _views(self._spec, self._table.rows(rows), self._canvases.select(rows))


@torch.no_grad()
def evaluation_views(
    spec: ViewSpec, pixels: Tensor, heights: Sizes, widths: Sizes, device: torch.device | str
) -> Tensor:
    """As `make_views`: the short side resized to spec.resize, then the centre spec.size square."""
    canvases = _Canvases.lay_out(pixels, heights, widths, torch.device(device))
    resized = _short_side(heights, widths, spec.resize)
    # Python's round and rint agree, and torchvision's CenterCrop rounds.
    corner = np.rint((resized - spec.size) / 2).astype(np.int64)
    out = _empty(spec, canvases)
    for part in canvases.parts(heights, widths, spec.size):
        images = canvases.resize(part, resized[part], corner[part], spec)
        _put(out[part], _normalise(spec, images))
    return out


def _short_side(heights: Sizes, widths: Sizes, resize: int) -> Sizes:
    """Sizes (N, 2) with the short side `resize`; the long side is cut to whole pixels."""
    sizes = np.stack([heights, widths], axis=1)
    short = sizes.min(axis=1, keepdims=True)
    return np.where(sizes == short, resize, resize * sizes // short)


def _empty(spec: ViewSpec, canvases: "_Canvases") -> Tensor:
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
    mean, std = upload(numbers, images.device, images.dtype)
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
    """Whether colour changes that follow one another are one function of all images."""
    return device.type == "cuda"


def _way(device: torch.device, heights: Sizes, widths: Sizes) -> Way:
    """A dense product of canvases of one small size or of gathered boxes, or each by itself."""
    sizes = np.stack([heights, widths])
    if (sizes == sizes[:, :1]).all() and sizes.max(initial=0) <= DENSE_SIDE:
        return "grid"
    return "each" if device.type == "cpu" else "gathered"


@dataclass(frozen=True)
class _Canvases:
    """N canvases of any sizes, as one list of pixels."""

    pixels: Tensor  # (P, 3) uint8, on the device
    heights: Sizes
    widths: Sizes
    starts: Sizes  # (N,) each canvas's first pixel
    device: torch.device
    way: Way

    @classmethod
    def lay_out(
        cls, pixels: Tensor, heights: Sizes, widths: Sizes, device: torch.device
    ) -> "_Canvases":
        ends = np.cumsum(heights * widths)
        assert pixels.dtype == torch.uint8 and pixels.numel() == 3 * ends[-1:].sum()
        flat = pixels.to(device, non_blocking=True).view(-1, 3)
        return cls(
            flat, heights, widths, ends - heights * widths, device, _way(device, heights, widths)
        )

    def select(self, rows: slice | NDArray[np.int64]) -> "_Canvases":
        """Some of the canvases, in any order; the pixels stay where they are."""
        parts = (self.heights[rows], self.widths[rows], self.starts[rows])
        return _Canvases(self.pixels, *parts, self.device, self.way)

    def parts(self, tall: Sizes, wide: Sizes, size: int) -> Iterator[slice]:
        """Consecutive images whose work fits the memory; tall, wide (N,): the pixels they need."""
        if self.way != "gathered":
            count = max(1, _CACHED_FLOATS // (3 * size * size))
            count = count if self.device.type == "cpu" else len(tall)
            yield from (slice(at, at + count) for at in range(0, len(tall), max(1, count)))
            return
        first = 0
        for at in range(1, len(tall) + 1):
            box = slice(first, at + 1)
            most = int(tall[box].max(initial=size)) * int(wide[box].max(initial=size))
            if at == len(tall) or most * (at + 1 - first) > _GATHERED_PIXELS:
                yield slice(first, at)
                first = at

    def crop(self, part: slice, boxes: Sizes, flip: NDArray[np.bool_], spec: ViewSpec) -> Tensor:
        """Crops (n, 3, size, size), float32 in [0, 1]."""
        if self.way == "each":
            return _scale(self._crop_each(part, boxes, flip, spec))
        if self.way == "grid":
            images = self._grid(part)
        else:
            images = self._gather(part, boxes)
            boxes = np.concatenate([np.zeros_like(boxes[:, :2]), boxes[:, 2:]], axis=1)
        return crop_boxes(images, boxes, spec.size, flip, spec.interpolation)

    def resize(self, part: slice, resized: Sizes, corner: Sizes, spec: ViewSpec) -> Tensor:
        """Windows (n, 3, size, size), float32 in [0, 1], of the images resized as a whole."""
        if self.way == "each":
            return _scale(self._resize_each(part, resized, corner, spec))
        sizes = np.stack([self.heights[part], self.widths[part]], axis=1)
        if self.way == "grid":
            images = self._grid(part)
            if (sizes == spec.size).all() and (resized == spec.size).all():
                return _scale(images)
        else:
            images = self._gather(part, np.concatenate([np.zeros_like(sizes), sizes], axis=1))
        return resize_window(images, sizes, resized, corner, spec.size, spec.interpolation)

    def _grid(self, part: slice) -> Tensor:
        """Canvases of one size (n, 3, H, W), a view where they lie one after another."""
        height, width = int(self.heights[0]), int(self.widths[0])
        numbers = self.starts[part] // (height * width)
        images = self.pixels.view(-1, height, width, 3).permute(0, 3, 1, 2)
        if (np.diff(numbers) == 1).all():
            return images[int(numbers[0]) : int(numbers[-1]) + 1]
        return images[upload(numbers, self.device)]

    def _gather(self, part: slice, boxes: Sizes) -> Tensor:
        """Boxes (n, 4) of the canvases, each in the top left of (n, 3, tallest, widest)."""
        starts = self.starts[part] + boxes[:, 0] * self.widths[part] + boxes[:, 1]
        columns = np.stack([starts, self.widths[part], boxes[:, 2], boxes[:, 3]], axis=1)
        kind = torch.int32 if len(self.pixels) < 2**31 else torch.int64
        start, stride, height, width = (
            upload(columns, self.device, kind).view(-1, 4, 1, 1).unbind(1)
        )
        tall, wide = (
            torch.arange(int(most), device=self.device, dtype=kind) for most in boxes[:, 2:].max(0)
        )
        # Beyond its box an image repeats its last pixel, to which no weight is given.
        down = torch.minimum(tall.view(1, -1, 1), height - 1) * stride + start
        index = down + torch.minimum(wide.view(1, 1, -1), width - 1)  # (n, tallest, widest)
        gathered = self.pixels.index_select(0, index.view(-1))
        return gathered.view(*index.shape, 3).permute(0, 3, 1, 2)

    def _canvas(self, number: int) -> Tensor:
        """(1, 3, H, W), a view."""
        height, width = int(self.heights[number]), int(self.widths[number])
        flat = self.pixels.narrow(0, int(self.starts[number]), height * width)
        return flat.view(1, height, width, 3).permute(0, 3, 1, 2)

    def _crop_each(
        self, part: slice, boxes: Sizes, flip: NDArray[np.bool_], spec: ViewSpec
    ) -> Tensor:
        """(n, 3, size, size) uint8."""
        shape = (spec.size, spec.size)
        views = torch.empty((len(boxes), 3, *shape), dtype=torch.uint8)
        for row, number in enumerate(range(len(self.heights))[part]):
            top, left, height, width = boxes[row].tolist()
            box = self._canvas(number)[:, :, top : top + height, left : left + width]
            view = F.interpolate(box, shape, mode=spec.interpolation, antialias=True)
            views[row] = view[0].flip(-1) if flip[row] else view[0]
        return views

    def _resize_each(self, part: slice, resized: Sizes, corner: Sizes, spec: ViewSpec) -> Tensor:
        """(n, 3, size, size) uint8."""
        size = spec.size
        views = torch.empty((len(resized), 3, size, size), dtype=torch.uint8)
        for row, number in enumerate(range(len(self.heights))[part]):
            top, left = corner[row].tolist()
            whole = F.interpolate(
                self._canvas(number),
                resized[row].tolist(),
                mode=spec.interpolation,
                antialias=True,
            )
            views[row] = whole[0, :, top : top + size, left : left + size]
        return views


def _scale(levels: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1], planes contiguous."""
    return levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
