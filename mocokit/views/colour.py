"""Colour jitter, grayscale and solarisation on batches, with torchvision's float-tensor semantics.

Each image has its own factors and its own order of the four operations. Large images on a CPU are
changed one by one; all others are sorted by operation, for each of the four places in the order,
so that every operation changes neighbours and none is computed in vain.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION
from mocokit.views.separable import Numbers, alone, host, upload

LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
_SIXTHS = (0, 2, 4)  # of the colour circle, where red, green and blue are
_NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0])  # factors that change nothing


def jitter(
    images: Tensor,
    brightness: Numbers,
    contrast: Numbers,
    saturation: Numbers,
    hue: Numbers,
    order: Numbers,
) -> Tensor:
    """Images (B, 3, H, W), float in [0, 1], with their colours changed; clamped after each step.

    Factors (B,), hue in turns; order (B, 4): 0 brightness, 1 contrast, 2 saturation, 3 hue, first
    column first. Parameters belong on the host: those on a device make the host wait for it.
    """
    factors = np.stack([host(part) for part in (brightness, contrast, saturation, hue)])
    changed = images.clone(memory_format=torch.contiguous_format)
    jitter_rows(changed, np.arange(len(images)), factors, host(order))
    return changed


def jitter_rows(
    images: Tensor,
    rows: NDArray[np.int64],
    factors: NDArray[np.float64],
    order: NDArray[np.int64],
) -> None:
    """`jitter` in place, of these rows only; factors (4, B) and order (B, 4) are of all images."""
    if alone(images):
        for row in rows:
            for operation in order[row]:
                if factors[operation, row] != _NEUTRAL[operation]:
                    _OPERATIONS[operation](images[row : row + 1], float(factors[operation, row]))
    elif rows.size:
        _jitter_sorted(images, rows, factors, order)


def _jitter_sorted(
    images: Tensor,
    rows: NDArray[np.int64],
    factors: NDArray[np.float64],
    order: NDArray[np.int64],
) -> None:
    """All rows go along through four sortings, one for each place in the order."""
    places, amounts, counts = [], [], []
    for position in range(4):
        operations = order[rows, position]
        amount = factors[operations, rows]
        operations = np.where(amount == _NEUTRAL[operations], 4, operations)
        turn = np.argsort(operations, kind="stable")
        # The first sorting picks from all images, the others from what was sorted before.
        places.append(turn if position else rows[turn])
        amounts.append(amount[turn])
        rows = rows[turn]
        counts.append(np.bincount(operations, minlength=5)[:4])
    # One transfer for all lists, cut on the device where the host knows.
    picks = upload(np.stack([*places, rows]), images.device)
    values = upload(np.stack(amounts), images.device, images.dtype).view(4, -1, 1, 1, 1)
    part = images
    for position in range(4):
        part = part.index_select(0, picks[position])
        end = 0
        for operation, count in enumerate(counts[position].tolist()):
            group = slice(end, end := end + count)
            if count:
                _OPERATIONS[operation](part[group], values[position, group])
    images.index_copy_(0, picks[4], part)


def grayscale(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) with the gray value in all three channels."""
    return _gray(images).expand_as(images).contiguous()


def grayscale_rows(images: Tensor, rows: NDArray[np.int64]) -> None:
    """`grayscale` in place, of these rows only."""
    _change(images, rows, _make_gray)


def solarize_rows(images: Tensor, rows: NDArray[np.int64]) -> None:
    """Invert, in place, what is .5 or more in [0, 1] of these rows."""
    _change(images, rows, _solarize)


def _change(images: Tensor, rows: NDArray[np.int64], operation: Callable[[Tensor], None]) -> None:
    """Run an in-place operation on some rows."""
    if alone(images):
        for row in rows:
            operation(images[row : row + 1])
        return
    pick = upload(rows, images.device)
    part = images.index_select(0, pick)
    operation(part)
    images.index_copy_(0, pick, part)


def _make_gray(images: Tensor) -> None:
    images.copy_(_gray(images))


def _solarize(images: Tensor) -> None:
    # 1 - x is the smaller of the two from .5 on.
    torch.minimum(images, 1 - images, out=images)


def _gray(images: Tensor) -> Tensor:
    """(B, 1, H, W)."""
    gray = images[:, 0:1] * LUMA[0]
    return gray.add_(images[:, 1:2], alpha=LUMA[1]).add_(images[:, 2:3], alpha=LUMA[2])


def _brightness(images: Tensor, factor: Tensor | float) -> None:
    images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor | float) -> None:
    # The mean of the gray image is the gray of the mean colour.
    mean = _gray(images.mean((2, 3), keepdim=True))
    images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor | float) -> None:
    gray = _gray(images).mul_(1 - factor)
    images.mul_(factor).add_(gray).clamp_(0, 1)


def _hue(images: Tensor, factor: Tensor | float) -> None:
    """Turn the hue in HSV. Written without the sectors' table: value and chroma stay as they are.

    Masks are floats, blended by lerp: on a CPU torch.where takes twenty times as long.
    """
    red, green, blue = images.unbind(1)  # (B, H, W)
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    spread = high - low
    mask = torch.eq(high, green, out=torch.empty_like(high))
    # The hue in sixths of the circle, times the spread: in [-1, 5] spreads.
    turn = (red - green).add_(spread, alpha=4)
    turn.lerp_((blue - red).add_(spread, alpha=2), mask)
    turn.lerp_(green - blue, torch.eq(high, red, out=mask))
    # A channel is high within one sixth of its own hue and low beyond two: a wave of period 6,
    # folded twice from a line, with its crests and its valleys cut off.
    base = low - spread
    for channel, sixth in enumerate(_SIXTHS):
        wave = _shifted(turn, spread, 6 * factor - sixth).abs_()
        wave.sub_(spread, alpha=3).abs_().add_(base)
        torch.clamp(wave, low, high, out=images[:, channel])


def _shifted(turn: Tensor, spread: Tensor, sixths: Tensor | float) -> Tensor:
    """turn + (sixths + a multiple of 6) * spread, in [-6, 6] spreads."""
    if isinstance(sixths, Tensor):
        return torch.addcmul(turn, spread, ((sixths - 1).remainder(6) - 5).view(-1, 1, 1))
    return torch.add(turn, spread, alpha=(sixths - 1) % 6 - 5)


_OPERATIONS = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
