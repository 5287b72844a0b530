"""Colour jitter, grayscale and solarisation on batches, with torchvision's float-tensor semantics.

Each image has its own factors and its own order of the four operations, and each operation is one
affine map of a pixel's channels x, which is then cut to limits:

    brightness f    f x                                        to [0, 1]
    contrast f      f x + (1 - f) (mean of the gray image)     to [0, 1]
    saturation f    f x + (1 - f) gray(x)                      to [0, 1]
    hue             H x + (1 - d) (max(x) + min(x))            to [min(x), max(x)]

The hue need not be found to be turned. By d <= 1 sixths of the circle: red becomes
r - g + (2d - 1) b + (1 - d)(max + min), and so on around the circle; back by d is the same with
the two neighbours exchanged; and two sixths are a change of channels. So the matrix H is circulant.

Here images are changed in place, sorted into neighbours or one by one; fused.py has the same for
a compiler.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit.transfer import Numbers, to_device, to_host
from mocokit.views.params import BRIGHTNESS, CONTRAST, HUE, SATURATION
from mocokit.views.separable import per_image

LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale


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
    factors = np.stack([to_host(part) for part in (brightness, contrast, saturation, hue)])
    changed = images.clone(memory_format=torch.contiguous_format)
    jitter_rows(changed, np.arange(len(images)), factors, to_host(order))
    return changed


def jitter_rows(
    images: Tensor,
    rows: NDArray[np.int64],
    factors: NDArray[np.float64],
    order: NDArray[np.int64],
) -> None:
    """`jitter` in place, of these rows only; factors (4, B) and order (B, 4) are of all images."""
    if per_image(images):
        for row in rows:
            _jitter_one(images[row].flatten(1), factors[:, row].tolist(), order[row].tolist())
    elif rows.size:
        _jitter_sorted(images, rows, factors[:, rows], order[rows])


def _jitter_sorted(
    images: Tensor, rows: NDArray[np.int64], factors: NDArray[np.float64], order: NDArray[np.int64]
) -> None:
    """Sorted by the place of the hue: up to three steps before it, all hues, up to three after.

    So every step changes neighbours, and the costly one is taken once.
    """
    place = np.argmax(order == HUE, axis=1)
    turn = np.argsort(place, kind="stable")
    place, order, factors = place[turn], order[turn], factors[:, turn]
    bounds = np.searchsorted(place, np.arange(3), side="right").tolist()
    others = order[order != HUE].reshape(-1, 3).T  # (3, N) operations
    factor = np.take_along_axis(factors, others, 0)
    rest = 1 - factor
    circle, ends = hue_map(factors[HUE])
    mixing = [
        factor,
        np.where(others == SATURATION, rest, 0),
        np.where(others == CONTRAST, rest, 0),
    ]
    # Row c of an image's matrix has the weights from column c on, around the circle.
    turning = np.stack([np.roll(circle.T, column, 1) for column in range(3)], axis=1)
    mix = to_device(np.stack(mixing), images.device, images.dtype)[..., None, None]
    places = np.concatenate([rows[turn], np.delete(np.arange(len(images)), rows)])
    there, back = to_device(np.stack([places, np.argsort(places)]), images.device)
    sorted_ = images.index_select(0, there)
    part = sorted_[: len(rows)].flatten(2)
    for step, bound in enumerate(bounds):
        _mix(part[bound:], *mix[:, step, bound:])
    matrices, weights = (to_device(one, images.device, images.dtype) for one in (turning, ends))
    _turn_hue(part, matrices, weights.view(-1, 1, 1))
    for step, bound in enumerate(bounds):
        _mix(part[:bound], *mix[:, step, :bound])
    torch.index_select(sorted_, 0, back, out=images)


def hue_map(turns: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How to turn the hue: weights (3, N) of a channel and the two after it; of max + min (N,)."""
    whole, rest = np.divmod(6 * turns, 2)
    back = rest > 1
    part = np.where(back, 2 - rest, rest)  # sixths to turn on, or back, after whole channels
    # A channel is made of the one that stands `whole` before it, and of that one's neighbours.
    circle = np.zeros((3, len(turns)))
    image, one = np.arange(len(turns)), -(whole + back).astype(np.int64)
    circle[one % 3, image] = 1
    circle[(one + 1 + back) % 3, image] = -1
    circle[(one + 2 - back) % 3, image] = 2 * part - 1
    still = turns == 0
    return np.where(still, np.array([[1.0], [0.0], [0.0]]), circle), np.where(still, 0, 1 - part)


def _mix(pixels: Tensor, factor: Tensor, of_gray: Tensor, of_mean: Tensor) -> None:
    """Brightness, contrast or saturation of pixels (n, 3, P) in place; weights (n, 1, 1)."""
    if len(pixels):
        gray = _gray(pixels)
        mean = gray.mean(2, keepdim=True).mul_(of_mean)
        # Not addcmul, whose CPU kernel is slow where it repeats a number.
        pixels.mul_(factor).add_(gray.mul_(of_gray).add_(mean)).clamp_(0, 1)


def _turn_hue(pixels: Tensor, turning: Tensor, ends: Tensor) -> None:
    """Of pixels (n, 3, P) in place; matrices (n, 3, 3), weights of max + min (n, 1, 1)."""
    high, low = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    turned = torch.bmm(turning, pixels).add_(torch.add(high, low).mul_(ends))
    torch.clamp(turned, low, high, out=pixels)


def _jitter_one(pixels: Tensor, factors: list[float], order: list[int]) -> None:
    """Of one image's pixels (3, P) in place."""
    for operation in order:
        factor = factors[operation]
        if operation == BRIGHTNESS:
            pixels.mul_(factor).clamp_(0, 1)
        elif operation == CONTRAST:
            mean = _gray(pixels.mean(1).view(1, 3, 1)).view(1)
            pixels.mul_(factor).add_(mean, alpha=1 - factor).clamp_(0, 1)
        elif operation == SATURATION:
            gray = _gray(pixels[None])[0]
            pixels.mul_(factor).add_(gray, alpha=1 - factor).clamp_(0, 1)
        elif factor:
            _turn_one(pixels, factor)


def _turn_one(pixels: Tensor, turns: float) -> None:
    """`_turn_hue` of one image's pixels (3, P)."""
    circle, ends = hue_map(np.array([turns]))
    one, after, before = circle[:, 0].tolist()
    high, low = pixels.amax(0), pixels.amin(0)
    turned = torch.add((high + low).mul_(float(ends[0])), pixels, alpha=one)
    for channel in range(3):
        here = turned[channel]
        here.add_(pixels[(channel + 1) % 3], alpha=after).add_(
            pixels[(channel + 2) % 3], alpha=before
        )
    torch.clamp(turned, low, high, out=pixels)


def grayscale_rows(images: Tensor, rows: NDArray[np.int64]) -> None:
    """The gray value in all three channels, in place, of these rows of images (B, 3, H, W)."""
    _change(images, rows, _make_gray)


def solarize_rows(images: Tensor, rows: NDArray[np.int64]) -> None:
    """Invert, in place, what is .5 or more in [0, 1] of these rows."""
    _change(images, rows, _solarize)


def _change(images: Tensor, rows: NDArray[np.int64], operation: Callable[[Tensor], None]) -> None:
    """Run an in-place operation on some rows."""
    if per_image(images):
        for row in rows:
            operation(images[row : row + 1])
        return
    pick = to_device(rows, images.device)
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
