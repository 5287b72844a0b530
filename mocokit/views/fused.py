"""All that follows the crop as one function of all images, for a compiler to fuse: for CUDA.

No image is picked out, and nothing depends on how many the table changes: an image that is left
alone has numbers that change nothing. So nothing is gathered, one launch serves a batch, and each
operation reads its images once.
"""

import math
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mocokit.transfer import to_device
from mocokit.views.colour import LUMA, hue_map
from mocokit.views.params import BLUR_TAILS, CONTRAST, HUE, SATURATION, Table, ViewSpec
from mocokit.views.randaugment import randaugment
from mocokit.views.separable import gaussian_weights

_NEUTRAL = np.array([[1.0], [1.0], [1.0], [0.0]])  # factors that change nothing


def finish(images: Tensor, table: Table, spec: ViewSpec) -> Tensor:
    """Crops (B, 3, S, S), float32 in [0, 1], to views: all other operations, and normalised.

    Only RandAugment, whose operations differ from image to image, stands between two functions.
    """
    kinds: list[str] = []
    numbers: list[NDArray[np.float64]] = []
    for operation in spec.order:
        if operation == "randaugment":
            images = _run(images, kinds, numbers)
            randaugment(images, table.randaugment, spec.mean)
            kinds, numbers = [], []
        elif operation in _NUMBERS:
            kinds.append(operation)
            numbers.append(_NUMBERS[operation](table, spec))
    shift, scale = -np.array(spec.mean) / spec.std, 1 / np.array(spec.std)
    return _run(images, [*kinds, "normalise"], [*numbers, np.stack([scale, shift])])


def _run(images: Tensor, kinds: list[str], numbers: list[NDArray[np.float64]]) -> Tensor:
    if not kinds:
        return images
    sent = [to_device(part, images.device, images.dtype) for part in numbers]
    compiled = images.device.type == "cuda" and can_compile()
    return (_compiled() if compiled else steps)(images, tuple(kinds), sent)


@cache
def can_compile() -> bool:
    """Whether torch.compile can make CUDA kernels here.

    It needs Triton, which builds its launchers with a C compiler and Python's headers.
    """
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    found = find_spec("triton") is not None and any(map(shutil.which, compilers))
    return found and headers.is_file()


@cache
def _compiled() -> Callable[[Tensor, tuple[str, ...], list[Tensor]], Tensor]:
    # Dynamic from the first call on, so that no kernel depends on the batches seen before.
    compiled: Callable[[Tensor, tuple[str, ...], list[Tensor]], Tensor]
    compiled = torch.compile(steps, dynamic=True)
    return compiled


def steps(images: Tensor, kinds: tuple[str, ...], numbers: list[Tensor]) -> Tensor:
    """Operations in turn on images (B, 3, H, W), each with its numbers; makes new ones."""
    for kind, part in zip(kinds, numbers, strict=True):
        images = _STEPS[kind](images, part)
    return images


def _jitter_numbers(table: Table, spec: ViewSpec) -> NDArray[np.float64]:
    """(4, B, 7), for `_map_colours`."""
    factors = np.stack([table.brightness, table.contrast, table.saturation, table.hue])
    factors = np.where(table.jitter, factors, _NEUTRAL)
    operation = table.order.T
    factor = np.take_along_axis(factors, operation, 0)
    circle, ends = hue_map(factors[HUE])
    hue, none = operation == HUE, np.zeros_like(factor)
    weights = [
        *np.where(hue, circle[:, None], np.stack([factor, none, none])),
        np.where(operation == SATURATION, 1 - factor, 0),
        np.where(operation == CONTRAST, 1 - factor, 0),
        np.where(hue, ends, 0),
        hue,
    ]
    return np.stack(weights, axis=-1)


def _grayscale_numbers(table: Table, spec: ViewSpec) -> NDArray[np.float64]:
    """(1, B, 7), for `_map_colours`."""
    weights = np.zeros((1, len(table.grayscale), 7))
    weights[0, :, 0], weights[0, :, 3] = ~table.grayscale, table.grayscale
    return weights


def _map_colours(images: Tensor, numbers: Tensor) -> Tensor:
    """Affine maps of a pixel's channels (colour.py), one after another, each cut to its limits.

    numbers (S, B, 7): the weight of a channel and of the two after it around the circle, of the
    pixel's gray value, of the gray image's mean, of max + min; 1 where max and min are the limits.
    """
    for step in numbers.unbind(0):
        one, after, before, of_gray, of_mean, of_ends, turned = step[:, :, None, None].unbind(1)
        red, green, blue = images.unbind(1)  # (B, H, W)
        gray = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        mean = gray.mean((1, 2), keepdim=True)
        high = torch.maximum(torch.maximum(red, green), blue)
        low = torch.minimum(torch.minimum(red, green), blue)
        shared = of_gray * gray + of_mean * mean + of_ends * (high + low)
        least = torch.where(turned > 0, low, 0.0)
        most = torch.where(turned > 0, high, 1.0)
        circle = ((red, green, blue), (green, blue, red), (blue, red, green))
        mixed = [one * x + after * y + before * z + shared for x, y, z in circle]
        images = torch.stack([torch.clamp(channel, least, most) for channel in mixed], dim=1)
    return images


def _blur_numbers(table: Table, spec: ViewSpec) -> NDArray[np.float64]:
    """Weights (B, R + 1) at distances 0..R, where R serves the widest blur that can be drawn.

    A width that followed the batch would be another function to compile every time.
    """
    radius = math.ceil(BLUR_TAILS * spec.blur_sigma[1])
    blurred = table.sigma > 0
    weights = np.zeros((len(blurred), radius + 1))
    weights[:, 0] = 1
    if blurred.any():
        found = gaussian_weights(table.sigma[blurred])
        widest = found.shape[1] // 2
        weights[blurred, : widest + 1] = found[:, widest:]
    return weights


def _blur(images: Tensor, weights: Tensor) -> Tensor:
    """Symmetric weights (B, R + 1) along columns and rows; edges are repeated."""
    radius = weights.shape[1] - 1
    centre, *others = weights[:, :, None, None, None].unbind(1)
    for dim in (2, 3):
        extent = images.shape[dim]
        padding = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = F.pad(images, padding, mode="replicate")
        images = centre * images
        for distance, weight in enumerate(others, 1):
            one = padded.narrow(dim, radius - distance, extent)
            other = padded.narrow(dim, radius + distance, extent)
            images = images + weight * (one + other)
    return images


def _solarize_numbers(table: Table, spec: ViewSpec) -> NDArray[np.float64]:
    return table.solarize.astype(np.float64)


def _solarize(images: Tensor, whether: Tensor) -> Tensor:
    """Invert what is .5 or more; whether (B,) is 1 or 0."""
    # 1 - x is the smaller of the two from .5 on.
    turned = torch.minimum(images, 1 - images)
    return torch.where(whether[:, None, None, None] > 0, turned, images)


def _normalise(images: Tensor, numbers: Tensor) -> Tensor:
    """numbers (2, 3): a channel's scale and shift."""
    scale, shift = numbers[:, :, None, None].unbind(0)
    return torch.addcmul(shift, images, scale).contiguous(memory_format=torch.channels_last)


_NUMBERS = {
    "jitter": _jitter_numbers,
    "grayscale": _grayscale_numbers,
    "blur": _blur_numbers,
    "solarize": _solarize_numbers,
}
_STEPS = {
    "jitter": _map_colours,
    "grayscale": _map_colours,
    "blur": _blur,
    "solarize": _solarize,
    "normalise": _normalise,
}
