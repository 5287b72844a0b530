"""The random parameters of a batch of views: a table, one row per image, drawn on the host.

Every number is `chance.uniform(seed, epoch, index, view, slot)`, so a row depends on nothing but
its image, and two pipelines that differ in the order of their operations share all draws.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mocokit.chance import Slot, uniform

Interpolation = Literal["bilinear", "bicubic"]
Shares = float | tuple[float, float]  # of both views, or of the first and of the second
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_CROP_TRIES = 10
# RandAugment's operations; a Table holds their numbers here.
RANDOM_OPERATIONS = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize add",
    "color", "contrast", "brightness", "sharpness", "shear x", "shear y", "translate x",
    "translate y",
)  # fmt: skip
# Number (-1: none), its argument, and whether pixels that move are interpolated by a cubic.
RANDOM_OPERATION = np.dtype([("operation", np.int8), ("amount", np.float64), ("bicubic", np.bool_)])
_RANDOM_SLOTS, _LEVELS = 6, 10.0
BLUR_TAILS = 4.0  # sigmas at which the Gaussian is cut; beyond lies 6e-5 of its mass


@dataclass(frozen=True)
class ViewSpec:
    """The settings `views` of a run as plain values; settings/schema.py gives their meaning."""

    size: int
    order: tuple[str, ...]
    crop_area: tuple[float, float]
    crop_ratio: tuple[float, float]
    interpolation: Interpolation
    jitter_probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale_probability: float
    blur_probability: Shares
    blur_sigma: tuple[float, float]
    solarize_probability: Shares
    randaugment: tuple[int, float, float]
    flip_probability: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    canvas: int | None
    resize: int  # of the scoring view: its short side, before the centre crop of `size`

    @property
    def bytes(self) -> int:
        """Memory of one view, float32."""
        return 3 * 4 * self.size**2


class Table(NamedTuple):
    """What happens to each of N images, on the host; rows belong to images."""

    boxes: NDArray[np.int64]  # (N, 4) top, left, height, width
    flip: NDArray[np.bool_]  # (N,)
    jitter: NDArray[np.bool_]  # (N,)
    brightness: NDArray[np.float64]  # (N,) factors
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]  # (N,) turns of the colour circle
    order: NDArray[np.int64]  # (N, 4) 0 brightness 1 contrast 2 saturation 3 hue, applied in turn
    grayscale: NDArray[np.bool_]  # (N,)
    sigma: NDArray[np.float64]  # (N,) pixels, 0 where not blurred
    randaugment: NDArray[np.void]  # (N, L) of RANDOM_OPERATION, applied in turn
    solarize: NDArray[np.bool_]  # (N,)

    def rows(self, part: slice | NDArray[np.int64]) -> "Table":
        """Some of the rows, as a table."""
        return Table._make(column[part] for column in self)


def draw_table(
    spec: ViewSpec,
    seed: int,
    epoch: int,
    index: ArrayLike,
    view: int,
    heights: ArrayLike,
    widths: ArrayLike,
) -> Table:
    """The rows of these images: stable numbers `index` (N,), canvases of heights x widths (N,).

    View 0 is the first; where the settings tell two views apart, all others are as the second.
    """
    # One call for all numbers, which is several times as fast as one for each.
    slots = np.arange(Slot.SOLARIZE + 1)
    numbers = uniform(seed, epoch, np.asarray(index, np.int64)[:, None], view, slots)  # (N, slots)

    def happens(operation: str, slot: int, probability: Shares) -> NDArray[np.bool_]:
        share = probability[min(view, 1)] if isinstance(probability, tuple) else probability
        return (numbers[:, slot] < share) & (operation in spec.order)

    def factor(slot: int, strength: float) -> NDArray[np.float64]:
        return _between(numbers[:, slot], max(0.0, 1.0 - strength), 1.0 + strength)

    keys = numbers[:, Slot.JITTER_ORDER : Slot.JITTER_ORDER + 4]
    blurred = happens("blur", Slot.BLUR, spec.blur_probability)
    return Table(
        boxes=_boxes(spec, numbers, np.asarray(heights, np.int64), np.asarray(widths, np.int64)),
        flip=happens("flip", Slot.FLIP, spec.flip_probability),
        jitter=happens("jitter", Slot.JITTER, spec.jitter_probability),
        brightness=factor(Slot.BRIGHTNESS, spec.brightness),
        contrast=factor(Slot.CONTRAST, spec.contrast),
        saturation=factor(Slot.SATURATION, spec.saturation),
        hue=_between(numbers[:, Slot.HUE], -spec.hue, spec.hue),
        order=np.argsort(keys, axis=1, kind="stable").astype(np.int64),
        grayscale=happens("grayscale", Slot.GRAYSCALE, spec.grayscale_probability),
        sigma=np.where(blurred, _between(numbers[:, Slot.SIGMA], *spec.blur_sigma), 0.0),
        randaugment=_random_operations(spec, seed, epoch, np.asarray(index, np.int64), view),
        solarize=happens("solarize", Slot.SOLARIZE, spec.solarize_probability),
    )


def _between(share: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * share


def _random_operations(
    spec: ViewSpec, seed: int, epoch: int, index: NDArray[np.int64], view: int
) -> NDArray[np.void]:
    """(N, L): each of the L drawn is applied with probability 1/2, as in timm."""
    if "randaugment" not in spec.order:
        return np.zeros((len(index), 0), RANDOM_OPERATION)
    layers = spec.randaugment[0]
    slots = Slot.RANDAUGMENT + np.arange(layers * _RANDOM_SLOTS).reshape(layers, _RANDOM_SLOTS)
    numbers = uniform(seed, epoch, index[:, None, None], view, slots)  # (N, L, 6)
    which, whether, radius, angle, sign, kind = np.moveaxis(numbers, 2, 0)
    _, magnitude, deviation = spec.randaugment
    # Box and Muller's normal number.
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
    level = np.clip(magnitude + deviation * normal, 0, _LEVELS) / _LEVELS
    signed = np.where(sign < 0.5, -level, level)
    enhance = 1.8 * level + 0.1
    amounts = {
        "rotate": 30 * signed,  # degrees, counter-clockwise
        "posterize": np.floor(4 * level),  # bits kept
        "solarize": np.floor(256 * level),  # inverted from this level on
        "solarize add": np.floor(110 * level),  # levels added below 128
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), enhance),
        **dict.fromkeys(("shear x", "shear y"), 0.3 * signed),  # pixels a pixel
        **dict.fromkeys(("translate x", "translate y"), 0.45 * signed),  # of the side
    }
    drawn = np.zeros(which.shape, RANDOM_OPERATION)
    number = np.floor(which * len(RANDOM_OPERATIONS)).astype(np.int8)
    drawn["operation"] = np.where(whether < 0.5, number, -1)
    for operation, amount in amounts.items():
        chosen = drawn["operation"] == RANDOM_OPERATIONS.index(operation)
        drawn["amount"] = np.where(chosen, amount, drawn["amount"])
    drawn["bicubic"] = kind < 0.5
    return drawn


def _boxes(
    spec: ViewSpec,
    numbers: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Boxes (N, 4) from the numbers of all slots (N, slots)."""
    tries = np.arange(_CROP_TRIES)
    areas, ratios = numbers[:, Slot.CROP_AREA + tries], numbers[:, Slot.CROP_RATIO + tries]
    size = _crop_size(spec, areas, ratios, heights, widths)
    return _place(*size, numbers[:, Slot.CROP_TOP], numbers[:, Slot.CROP_LEFT], heights, widths)


def _crop_size(
    spec: ViewSpec,
    areas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Height, width and whether a try fitted, from shares (N, 10): the first try that fits.

    Else the largest box in the middle with the nearest ratio allowed, as torchvision falls back.
    """
    area = (heights * widths)[:, None] * _between(areas, *spec.crop_area)
    low, high = spec.crop_ratio
    ratio = np.exp(_between(ratios, math.log(low), math.log(high)))
    # rint and Python's round agree: halves go to the even neighbour.
    width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = (np.arange(len(fits)), fits.argmax(axis=1))
    shape = widths / heights
    tallest = np.where(shape < low, np.rint(widths / low), heights).astype(np.int64)
    widest = np.where(shape > high, np.rint(heights * high), widths).astype(np.int64)
    found = np.asarray(fits.any(axis=1))
    return (
        np.where(found, height[first], np.maximum(tallest, 1)),
        np.where(found, width[first], np.maximum(widest, 1)),
        found,
    )


def _place(
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    found: NDArray[np.bool_],
    down: NDArray[np.float64],
    across: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Boxes (N, 4): anywhere inside the image, or in its middle where no try fitted."""
    spare_down, spare_across = heights - height, widths - width
    top = np.where(found, np.floor(down * (spare_down + 1)), spare_down // 2)
    left = np.where(found, np.floor(across * (spare_across + 1)), spare_across // 2)
    return np.stack([top, left, height, width], axis=1).astype(np.int64)


def canvas_bound(spec: ViewSpec) -> int:
    """Training: the short side in pixels that canvases keep, from the crops or as `canvas` says.

    How an image is scored has no part in it: that must not change what a run computes.
    """
    return max(spec.canvas or 0, _crop_bound(spec))


def scoring_bound(spec: ViewSpec) -> int:
    """Scoring: the short side in pixels that canvases keep, whatever `canvas` an old run had.

    With at least the pixels of the crops, a photo is not shrunk by its decoder close to `resize`:
    antialiasing is left to the view, as in the papers.
    """
    return max(spec.resize, _crop_bound(spec))


def _crop_bound(spec: ViewSpec) -> int:
    """The short side in pixels beyond which no crop has more than `size` pixels to give.

    The smallest crop of a square image is the narrowest of the smallest area, or, where all ratios
    are of one side of 1, the widest that fits.
    """
    low, high = spec.crop_ratio
    drawn = spec.size / math.sqrt(spec.crop_area[0] * min(low, 1 / high))
    return max(math.ceil(drawn), math.ceil(spec.size * max(low, 1 / high)))


def seen_share(spec: ViewSpec, height: float, width: float) -> float:
    """The share of an image's area that the scoring view shows."""
    short, long = sorted((height, width))
    return (spec.size / spec.resize) ** 2 * short / long


def describe(spec: ViewSpec) -> list[tuple[str, str, str]]:
    """The augmentation as a table: (operation, probability, parameters), in applied order."""
    names = {"crop": "random resized crop", "jitter": "colour jitter", "blur": "Gaussian blur"}
    rows = _rows(spec)
    return [
        *((names.get(operation, operation), *rows[operation]) for operation in spec.order),
        ("normalise", "1", f"mean {_listed(spec.mean)}, deviation {_listed(spec.std)}"),
        (
            "scoring view",
            "1",
            f"short side resized to {spec.resize}, {spec.interpolation}, antialiased; "
            f"centre crop {spec.size} x {spec.size}; normalised",
        ),
    ]


def _rows(spec: ViewSpec) -> dict[str, tuple[str, str]]:
    """Probability and parameters of each operation."""

    def factor(strength: float) -> str:
        return _span(max(0.0, 1 - strength), 1 + strength)

    return {
        "crop": (
            "1",
            f"area uniform in {_span(*spec.crop_area)} of the image, width/height log-uniform in "
            f"{_span(*spec.crop_ratio)}, ten tries, else the central crop; "
            f"resized to {spec.size} x {spec.size}, {spec.interpolation}, antialiased",
        ),
        "jitter": (
            f"{spec.jitter_probability:.4g}",
            f"factors uniform: brightness {factor(spec.brightness)}, contrast "
            f"{factor(spec.contrast)}, saturation {factor(spec.saturation)}, hue shift "
            f"{_span(-spec.hue, spec.hue)} turns; in random order, clamped to [0, 1] after each",
        ),
        "grayscale": (f"{spec.grayscale_probability:.4g}", "0.2989 R + 0.587 G + 0.114 B"),
        "blur": (
            _shares(spec.blur_probability),
            f"Gaussian, sigma uniform in {_span(*spec.blur_sigma)} pixels of the view, "
            f"cut at {BLUR_TAILS:g} sigma, edges repeated",
        ),
        "solarize": (_shares(spec.solarize_probability), "x becomes 1 - x where x is .5 or more"),
        "randaugment": (
            "1/2 each",
            f"{spec.randaugment[0]} of {len(RANDOM_OPERATIONS)} operations drawn, magnitude normal "
            f"({spec.randaugment[1]:.4g}, {spec.randaugment[2]:.4g}) of 10, on whole levels",
        ),
        "flip": (f"{spec.flip_probability:.4g}", "left to right"),
    }


def _shares(probability: Shares) -> str:
    if isinstance(probability, tuple):
        return f"{probability[0]:.4g} first, {probability[1]:.4g} second"
    return f"{probability:.4g}"


def _span(low: float, high: float) -> str:
    return f"[{low:.4g}, {high:.4g}]"


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
