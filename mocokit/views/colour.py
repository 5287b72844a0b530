"""Colour jitter, grayscale and solarisation on batches, with torchvision's float-tensor semantics.

Each image has its own factors and its own order of the four operations. For each of the four
places in the order, the images are grouped by operation, so that none is computed in vain.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION
from mocokit.views.separable import Numbers, host, upload

LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
# Channel c at hue h is low + spread * clamp(peak + slope * |h - centre|, 0, 1); red's tent, whose
# middle is at 0 and 6, is the valley around 3.
_TENTS = ((0, 3.0, 1, -1), (1, 2.0, -1, 2), (2, 4.0, -1, 2))
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
    groups = []
    for position in range(4):
        for operation in range(4):
            chosen = rows[order[rows, position] == operation]
            chosen = chosen[factors[operation, chosen] != _NEUTRAL[operation]]
            if chosen.size:
                groups.append((operation, chosen))
    if not groups:
        return
    # One transfer for all lists, cut on the device where the host knows.
    picks = upload(np.concatenate([chosen for _, chosen in groups]), images.device)
    values = np.concatenate([factors[operation, chosen] for operation, chosen in groups])
    amounts = upload(values, images.device, images.dtype).view(-1, 1, 1, 1)
    end = 0
    for operation, chosen in groups:
        part = slice(end, end := end + len(chosen))
        change = partial(_OPERATIONS[operation], factor=amounts[part])
        _change(images, chosen, picks[part], change)


def grayscale(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) with the gray value in all three channels."""
    return _gray(images).expand_as(images).contiguous()


def grayscale_rows(images: Tensor, rows: NDArray[np.int64]) -> None:
    """`grayscale` in place, of these rows only."""
    _change(images, rows, upload(rows, images.device), _make_gray)


def solarize_rows(images: Tensor, rows: NDArray[np.int64]) -> None:
    """Invert, in place, what is .5 or more in [0, 1] of these rows."""
    _change(images, rows, upload(rows, images.device), _solarize)


def _change(
    images: Tensor, rows: NDArray[np.int64], pick: Tensor, operation: Callable[[Tensor], None]
) -> None:
    """Run an in-place operation on some rows; neighbouring rows need no copy."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1:
        operation(images[first : last + 1])
        return
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


def _brightness(images: Tensor, factor: Tensor) -> None:
    images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> None:
    # The mean of the gray image is the gray of the mean colour.
    mean = _gray(images.mean((2, 3), keepdim=True))
    images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> None:
    gray = _gray(images).mul_(1 - factor)
    images.mul_(factor).add_(gray).clamp_(0, 1)


def _hue(images: Tensor, factor: Tensor) -> None:
    """Turn the hue in HSV. Written without the sectors' table: value and chroma stay as they are.

    Masks are floats, blended by lerp: on a CPU torch.where takes twenty times as long.
    """
    red, green, blue = images.unbind(1)  # (B, H, W)
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    spread = high - low
    reddest = torch.eq(high, red, out=torch.empty_like(high))
    greenest = torch.eq(high, green, out=high)
    # The hue in sixths of the circle, times the spread.
    turn = (red - green).add_(spread, alpha=4)
    turn.lerp_((blue - red).add_(spread, alpha=2), greenest)
    turn.lerp_(green - blue, reddest)
    # A gray pixel has no hue, and its spread of 0 hides whatever stands here.
    turn.div_(spread.clamp(min=1e-12)).add_(6 * factor.view(-1, 1, 1))
    turn.sub_(torch.floor(turn / 6), alpha=6)  # remainder, five times as fast
    for channel, centre, slope, peak in _TENTS:
        tent = torch.sub(turn, centre, out=high).abs_().mul_(slope).add_(peak).clamp_(0, 1)
        torch.add(tent.mul_(spread), low, out=images[:, channel])


_OPERATIONS = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
