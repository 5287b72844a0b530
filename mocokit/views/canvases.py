"""Canvases of any sizes, as one list of pixels, and the crops and resizes that are made of them.

There are three ways to crop, which agree to one level of 255 (the cubic to 1.13): a dense product
on the device, batched; on a CPU, for photos, PIL's own algorithm in torch's uint8 kernel, image by
image, which is ten times as fast; and on a CPU, for canvases of one size and no larger than the
views, bilinear samples of four pixels, batched, where the dense product would multiply by zeros,
mostly. Device type, the sizes in the batch and the interpolation alone decide between them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mocokit.transfer import to_device
from mocokit.views.params import Interpolation, ViewSpec
from mocokit.views.separable import DENSE_SIDE, crop_boxes, resize_window

Sizes = NDArray[np.int64]
Way = Literal["grid", "gathered", "each"]
# A chunk of views on a CPU stays near its cache: 1.5 MB of floats.
_CACHED_FLOATS = 3 * 2**17
# A chunk of padded canvases on a device: 2^25 pixels are .2 GB as float16, .13 GB as their indices.
_GATHERED_PIXELS = 2**25


def _way(device: torch.device, heights: Sizes, widths: Sizes) -> Way:
    """A dense product of canvases of one small size or of gathered boxes, or each by itself."""
    sizes = np.stack([heights, widths])
    if (sizes == sizes[:, :1]).all() and sizes.max(initial=0) <= DENSE_SIDE:
        return "grid"
    return "each" if device.type == "cpu" else "gathered"


@dataclass(frozen=True)
class Canvases:
    """N canvases of any sizes, as one list of pixels."""

    pixels: Tensor  # (P, 3) uint8, on the device
    heights: Sizes
    widths: Sizes
    starts: Sizes  # (N,) each canvas's first pixel
    device: torch.device
    way: Way

    @classmethod
    def lay_out(
        cls,
        pixels: Tensor,
        heights: Sizes,
        widths: Sizes,
        device: torch.device,
        starts: Sizes | None = None,
    ) -> "Canvases":
        if starts is None:
            ends = np.cumsum(heights * widths)
            assert pixels.numel() == 3 * ends[-1:].sum()
            starts = ends - heights * widths
        assert pixels.dtype == torch.uint8
        flat = pixels.to(device, non_blocking=True).view(-1, 3)
        return cls(flat, heights, widths, starts, device, _way(device, heights, widths))

    def select(self, rows: slice | NDArray[np.int64]) -> "Canvases":
        """Some of the canvases, in any order; the pixels stay where they are."""
        parts = (self.heights[rows], self.widths[rows], self.starts[rows])
        return Canvases(self.pixels, *parts, self.device, self.way)

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
            if enlarges(images, spec.size, spec.interpolation):
                return enlarge_boxes(images, boxes, spec.size, flip)
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
        size, starts = height * width, self.starts[part]
        if (np.diff(starts) == size).all():
            flat = self.pixels.narrow(0, int(starts[0]), len(starts) * size)
        else:  # row s of this view is the image that would begin with pixel s
            flat = self.pixels.view(-1).unfold(0, 3 * size, 3)[to_device(starts, self.device)]
        return flat.view(-1, height, width, 3).permute(0, 3, 1, 2)

    def _gather(self, part: slice, boxes: Sizes) -> Tensor:
        """Boxes (n, 4) of the canvases, each in the top left of (n, 3, tallest, widest)."""
        starts = self.starts[part] + boxes[:, 0] * self.widths[part] + boxes[:, 1]
        columns = np.stack([starts, self.widths[part], boxes[:, 2], boxes[:, 3]], axis=1)
        kind = torch.int32 if len(self.pixels) < 2**31 else torch.int64
        start, stride, height, width = (
            to_device(columns, self.device, kind).view(-1, 4, 1, 1).unbind(1)
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


def enlarges(images: Tensor, size: int, interpolation: Interpolation) -> bool:
    """Whether `enlarge_boxes` can make crops of images (B, 3, H, W), and is the fastest way."""
    fits = max(images.shape[2:]) <= size and interpolation == "bilinear"
    return fits and images.device.type == "cpu"


def enlarge_boxes(
    images: Tensor, boxes: NDArray[np.int64], size: int, flip: NDArray[np.bool_]
) -> Tensor:
    """As `crop_resize`, of uint8 images (B, 3, H, W) with sides of at most `size`.

    A triangle one pixel wide, renormalised inside the box, is linear interpolation between pixels
    whose middles are at p + .5, and beyond the first and last middle of the box their values.
    """
    start, length = boxes[:, :2, None], boxes[:, 2:, None]
    at: NDArray[np.float64] = (np.arange(size) + 0.5) * (length / size) - 0.5
    at = np.clip(at, 0, length - 1) + start  # (B, 2, size): pixels down and across
    at[flip, 1] = at[flip, 1, ::-1]
    extents = np.array(images.shape[2:]).reshape(2, 1)
    down, across = torch.from_numpy((2 * at + 1) / extents - 1).float().unbind(1)
    grid = torch.empty(len(boxes), size, size, 2)
    grid[..., 0], grid[..., 1] = across[:, None], down[:, :, None]
    levels = images.float().div_(255)
    return F.grid_sample(levels, grid, padding_mode="border", align_corners=False)
