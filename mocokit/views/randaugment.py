"""RandAugment on batches, as PIL does it on whole levels (arXiv 1909.13719).

The fifteen operations and the meaning of their magnitudes are timm's `rand-nN-mM-mstdS` without
`inc`, those of InfoMin's authors (PyContrast, datasets/RandAugment.py): posterize and solarize
weaken as the magnitude grows, and color, contrast, brightness and sharpness are neutral at 5.
What depends on a level alone is a table of 256 levels for each channel; the five that move pixels
are one affine sample. Views are rounded to levels first, as PIL has no others.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mocokit.transfer import to_device
from mocokit.views.params import RANDOM_OPERATIONS

_LUMA = (19595, 38470, 7471)  # PIL's convert("L"), in 65536ths


def randaugment(images: Tensor, drawn: NDArray[np.void], fill: tuple[float, ...]) -> None:
    """In place: images (B, 3, H, W) in [0, 1], `drawn` (B, L) of a Table, fill a colour.

    Images for which nothing was drawn stay as they are, to the bit. The colour is cut to [0, 1].
    """
    rows = np.flatnonzero((drawn["operation"] >= 0).any(1))
    if not rows.size:
        return
    drawn, pick = drawn[rows], to_device(rows, images.device)
    levels = images.index_select(0, pick).mul_(255).round_()
    for layer in drawn.T:
        for number in np.unique(layer["operation"][layer["operation"] >= 0]):
            some = np.flatnonzero(layer["operation"] == number)
            place = to_device(some, images.device)
            part = levels.index_select(0, place)
            levels.index_copy_(0, place, _apply(int(number), part, layer[some], fill))
    images.index_copy_(0, pick, levels.div_(255))


def _apply(number: int, levels: Tensor, drawn: NDArray[np.void], fill: tuple[float, ...]) -> Tensor:
    name, amounts = RANDOM_OPERATIONS[number], drawn["amount"]
    if name in _MATRICES:
        height, width = levels.shape[2:]
        matrices = np.stack([_MATRICES[name](amount, height, width) for amount in amounts])
        return _transform(levels, matrices, drawn["bicubic"], fill)
    amount = to_device(amounts, levels.device, levels.dtype).view(-1, 1, 1)
    if name == "color":
        return _blend(_gray(levels).expand_as(levels), levels, amount.unsqueeze(3))
    if name == "sharpness":
        return _blend(_smooth(levels), levels, amount.unsqueeze(3))
    index = levels.flatten(2).long()
    return _TABLES[name](levels, amount).gather(2, index).view_as(levels)


def _blend(one: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """PIL's Image.blend: cut to whole levels, not rounded."""
    return torch.addcmul(one, other - one, factor).clamp_(0, 255).floor_()


def _gray(levels: Tensor) -> Tensor:
    """(B, 1, H, W), in whole levels."""
    weights = torch.stack([levels[:, c].int() * _LUMA[c] for c in range(3)]).sum(0, dtype=torch.int)
    return ((weights + 0x8000) >> 16).to(levels.dtype).unsqueeze(1)


def _smooth(levels: Tensor) -> Tensor:
    """PIL's SMOOTH: a mean of nine in which the middle counts five times; borders are kept."""
    kernel = torch.ones(3, 1, 3, 3, dtype=levels.dtype, device=levels.device)
    kernel[:, :, 1, 1] = 5
    smooth = levels.clone()
    if min(levels.shape[2:]) > 2:
        inner = F.conv2d(levels, kernel, groups=3).div_(13).add_(0.5).floor_()
        smooth[:, :, 1:-1, 1:-1] = inner
    return smooth


def _ramp(levels: Tensor) -> Tensor:
    """Every level, (B, 3, 256)."""
    ramp = torch.arange(256, device=levels.device, dtype=levels.dtype)
    return ramp.expand(len(levels), 3, 256)


def _histogram(levels: Tensor) -> Tensor:
    """Pixels of each level, (B, 3, 256) int64."""
    flat = levels.flatten(2).long()
    first = torch.arange(3 * len(levels), device=levels.device).view(-1, 3, 1) * 256
    index = (flat + first).flatten()
    counts = torch.zeros(3 * 256 * len(levels), dtype=torch.int64, device=levels.device)
    return counts.scatter_add_(0, index, torch.ones_like(index)).view(-1, 3, 256)


def _autocontrast(levels: Tensor, _: Tensor) -> Tensor:
    low, high = levels.flatten(2).aminmax(dim=2, keepdim=True)
    ramp, low, high = _ramp(levels), low.double(), high.double()
    # In double precision, as PIL, since the result is cut; 255 / x would be 255 * (1 / x).
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    stretched = (ramp * scale - low * scale).clamp(0, 255).floor().to(levels.dtype)
    return torch.where(high > low, stretched, ramp)


def _equalize(levels: Tensor, _: Tensor) -> Tensor:
    counts = _histogram(levels)
    present = torch.arange(256, device=levels.device) * (counts > 0)
    last = counts.gather(2, present.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - last) // 255
    below = counts.cumsum(2) - counts
    table = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp(max=255).to(levels.dtype), _ramp(levels))


def _posterize(levels: Tensor, bits: Tensor) -> Tensor:
    lost = 8 - bits.int()
    return (_ramp(levels).int() >> lost << lost).to(levels.dtype)


def _solarize(levels: Tensor, threshold: Tensor) -> Tensor:
    ramp = _ramp(levels)
    return torch.where(ramp < threshold, ramp, 255 - ramp)


def _solarize_add(levels: Tensor, more: Tensor) -> Tensor:
    ramp = _ramp(levels)
    return torch.where(ramp < 128, (ramp + more).clamp(max=255), ramp)


def _contrast(levels: Tensor, factor: Tensor) -> Tensor:
    mean = _gray(levels).mean((2, 3), dtype=torch.float64).add(0.5).floor().to(levels.dtype)
    ramp = _ramp(levels)
    return _blend(mean.unsqueeze(2).expand_as(ramp), ramp, factor)


_TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": lambda levels, _: 255 - _ramp(levels),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize add": _solarize_add,
    "contrast": _contrast,
    "brightness": lambda levels, factor: _blend(
        torch.zeros_like(_ramp(levels)), _ramp(levels), factor
    ),
}

Matrix = NDArray[np.float64]  # (2, 3): where in the input, (x, y), an output's (x, y, 1) comes from


def _rotation(degrees: float, height: int, width: int) -> Matrix:
    """Counter-clockwise about the middle."""
    angle, middle = math.radians(degrees), np.array([width / 2, height / 2])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.column_stack([turn, middle - turn @ middle])


_MATRICES: dict[str, Callable[[float, int, int], Matrix]] = {
    "rotate": _rotation,
    "shear x": lambda by, height, width: np.array([[1, by, 0], [0, 1, 0]]),
    "shear y": lambda by, height, width: np.array([[1, 0, 0], [by, 1, 0]]),
    "translate x": lambda by, height, width: np.array([[1, 0, by * width], [0, 1, 0]]),
    "translate y": lambda by, height, width: np.array([[1, 0, 0], [0, 1, by * height]]),
}


def _transform(
    levels: Tensor,
    matrices: NDArray[np.float64],
    bicubic: NDArray[np.bool_],
    fill: tuple[float, ...],
) -> Tensor:
    """PIL's affine transform: sampled at pixel middles, edges repeated, outside it is `fill`."""
    height, width = levels.shape[2:]
    device = levels.device
    # Double precision, as PIL: what is cut to whole levels may not fall short by a last bit.
    matrix = to_device(matrices, device, torch.float64).view(-1, 2, 3, 1, 1)
    across = torch.arange(width, device=device, dtype=torch.float64) + 0.5
    down = (torch.arange(height, device=device, dtype=torch.float64) + 0.5).view(-1, 1)
    x, y = (matrix[:, :, 0] * across + matrix[:, :, 1] * down + matrix[:, :, 2]).unbind(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # (B, H, W)
    colour = to_device(np.rint(255 * np.clip(fill, 0, 1)), device, levels.dtype).view(1, 3, 1, 1)
    moved = torch.empty_like(levels)
    for cubic in (False, True):
        rows = np.flatnonzero(bicubic == cubic)
        if rows.size:
            place = to_device(rows, device)
            part, right, below = (each.index_select(0, place) for each in (levels, x, y))
            between = _cubic if cubic else _linear
            moved.index_copy_(0, place, _sample(part, right - 0.5, below - 0.5, between))
    return torch.where(inside.unsqueeze(1), moved, colour)


def _sample(
    levels: Tensor, x: Tensor, y: Tensor, between: Callable[[list[Tensor], Tensor], Tensor]
) -> Tensor:
    """Levels at places (B, H, W), counted from the middle of the first pixel."""
    height, width = levels.shape[2:]
    flat = levels.flatten(2).double()
    left, top = x.floor(), y.floor()
    right, below = ((part - part.floor()).unsqueeze(1) for part in (x, y))
    taps = (-1, 0, 1, 2) if between is _cubic else (0, 1)
    columns = [(left + tap).clamp_(0, width - 1).long() for tap in taps]
    lines = []
    for tap in taps:
        row = (top + tap).clamp_(0, height - 1).long() * width
        indices = [(row + column).flatten(1).unsqueeze(1).expand(-1, 3, -1) for column in columns]
        lines.append(between([flat.gather(2, index).view_as(levels) for index in indices], right))
    return between(lines, below).clamp_(0, 255).floor_().to(levels.dtype)


def _linear(values: list[Tensor], d: Tensor) -> Tensor:
    one, two = values
    return one + d * (two - one)


def _cubic(values: list[Tensor], d: Tensor) -> Tensor:
    """Keys' cubic with a = -1, as PIL's transforms have it; its resize has -1/2.

    In a form that gives equal values back to the bit: what falls short of a level is cut.
    """
    one, two, three, four = values
    second, third = 2 * (one - two) + three - four, two - one + four - three
    return two + d * (three - one + d * (second + d * third))
