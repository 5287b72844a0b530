"""Crops of small canvases that are only ever enlarged, as on CIFAR: each pixel is made of four.

There the dense product of separable.py multiplies by zeros, mostly.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mocokit.views.params import Interpolation


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
