"""The embedded demo set: procedural textures, a demonstration and not a benchmark.

Twelve classes differ in their pattern alone; colours, scale, place, angle, thickness, softness,
light and noise vary within each, so that raw pixels tell little about the class.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mocokit import chance
from mocokit.data.sources.arrays import ArraySource

SIDE = 32
TRAIN, TEST = 6000, 1200
_SEED = 0
_CHUNK = 256  # images drawn at a time: the arrays stay in a processor's cache

Field = NDArray[np.float64]  # (n, 32, 32), or what broadcasts to it

# What a random number of an image is for: slots Slot.PATTERN + 0 .. 99.
_FREQUENCY, _ANGLE, _SHIFT_U, _SHIFT_V, _DUTY, _SOFTNESS = range(6)
_DARK, _GAP, _SWAP, _TINT_A, _TINT_B = 10, 11, 12, 13, 16  # a tint takes three slots
_LIGHT, _LIGHT_ANGLE, _NOISE, _NOISE_SIZE = 20, 21, 22, 23
_SPOTS = 30  # three slots each


def demo(labelled: bool = True) -> tuple[ArraySource, ArraySource]:
    """6,000 images to train on and 1,200 to validate on, 32 x 32, equally many of each class."""
    train, test = (_split(number, size, labelled) for number, size in enumerate((TRAIN, TEST)))
    return train, test


def _split(split: int, size: int, labelled: bool) -> ArraySource:
    classes = tuple(_PATTERNS) if labelled else ()
    labels = np.arange(size, dtype=np.int64) % len(_PATTERNS)
    images = np.empty((size, SIDE, SIDE, 3), np.uint8)
    for number, pattern in enumerate(_PATTERNS.values()):
        index = np.flatnonzero(labels == number)
        for first in range(0, len(index), _CHUNK):
            chunk = index[first : first + _CHUNK]
            images[chunk] = _draw(Dice(split, chunk), pattern)
    return ArraySource(images, labels if labelled else None, "demo", classes)


class Dice:
    """The random numbers of some images of a split."""

    def __init__(self, split: int, index: NDArray[np.int64]) -> None:
        self.split, self.index = split, index[:, None, None]

    def __call__(self, slot: int, low: float = 0.0, high: float = 1.0) -> Field:
        """One number for each image, (n, 1, 1)."""
        number = chance.uniform(_SEED, self.split, self.index, 0, chance.Slot.PATTERN + slot)
        return low + (high - low) * number

    def pixels(self, slot: int) -> Field:
        """One number for each pixel, (n, 32, 32)."""
        place = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
        slot += chance.Slot.PATTERN
        return chance.uniform(_SEED, self.split, self.index, place, slot)


def _draw(dice: Dice, pattern: Callable[[Dice, Field, Field, Field], Field]) -> NDArray[np.uint8]:
    """The images (n, 32, 32, 3). In float64, so that machines agree after rounding to 8 bits."""
    x, y = _plane()
    angle = np.deg2rad(dice(_ANGLE, -20, 20))
    frequency = dice(_FREQUENCY, 2.0, 4.0)  # periods in the image's width
    u = frequency * (x * np.cos(angle) + y * np.sin(angle)) + dice(_SHIFT_U)
    v = frequency * (y * np.cos(angle) - x * np.sin(angle)) + dice(_SHIFT_V)
    softness = dice(_SOFTNESS, 0.15, 0.6)
    height = pattern(dice, u, v, frequency)  # above zero: foreground; a slope of about 4
    cover = np.clip(height / softness + 0.5, 0, 1)[..., None]
    back, front = _colours(dice)
    light_angle = dice(_LIGHT_ANGLE, 0, 2 * np.pi)
    ramp = x * np.cos(light_angle) + y * np.sin(light_angle)
    light = 1 + dice(_LIGHT, 0, 0.6) * ramp
    image = (back + (front - back) * cover) * light[..., None] + _noise(dice)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _plane() -> tuple[Field, Field]:
    """x to the right and y down, from -1/2 to 1/2, (1, 32, 32)."""
    line = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    return line[None, None, :], line[None, :, None]


def _colours(dice: Dice) -> tuple[Field, Field]:
    """Two colours, (n, 1, 1, 3), of which either may be the lighter, by a gap one can see."""
    weights = np.array([0.299, 0.587, 0.114])
    dark = dice(_DARK, 0.15, 0.5)
    light = dark + dice(_GAP, 0.25, 0.45)
    swap = dice(_SWAP) < 0.5
    colours = []
    for level, first in (
        (np.where(swap, light, dark), _TINT_A),
        (np.where(swap, dark, light), _TINT_B),
    ):
        tint = np.stack([dice(first + channel, -0.5, 0.5) for channel in range(3)], axis=-1)
        tint -= (tint * weights).sum(-1, keepdims=True)  # a tint has no brightness of its own
        colours.append(np.clip(level[..., None] + 0.6 * tint, 0, 1))
    return colours[0], colours[1]


def _noise(dice: Dice) -> Field:
    """Noise (n, 32, 32, 3); a hash has digits enough for three channels."""
    digits = dice.pixels(_NOISE)
    channels = [np.modf(digits * scale)[0] - 0.5 for scale in (1.0, 2.0**17, 2.0**34)]
    return np.stack(channels, axis=-1) * dice(_NOISE_SIZE, 0.0, 0.25)[..., None]


def _wave(u: Field) -> Field:
    """A triangle wave of period 1: 1 at whole numbers, -1 halfway between."""
    return 4 * np.abs(u - np.floor(u) - 0.5) - 1


def _from_centre(u: Field, period: float = 1.0) -> Field:
    """How far u is from the middle of its period."""
    return np.asarray(u - period * np.floor(u / period) - period / 2)


def _duty(dice: Dice, low: float, high: float) -> Field:
    return dice(_DUTY, low, high)


def _stripes(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    return _wave(u) + _duty(dice, -0.4, 0.4) + 0 * v


def _checks(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    a, b = _wave(0.75 * u), _wave(0.75 * v)
    height: Field = np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))
    return height + _duty(dice, -0.15, 0.15)


def _dots(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    radius = np.hypot(_from_centre(u), _from_centre(v))
    return 4 * (_duty(dice, 0.25, 0.36) - radius)


def _rings(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    # The centre lies up to 0.6 periods from the image's.
    a, b = u - 2.2 * dice(_SHIFT_U) + 0.6, v - 2.2 * dice(_SHIFT_V) + 0.6
    radius: Field = np.hypot(a, b)
    return _wave(radius) + _duty(dice, -0.4, 0.4)


def _grid(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    return np.maximum(_wave(u), _wave(v)) - _duty(dice, 0.35, 0.65)


def _zigzag(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    return _wave(1.2 * v + 0.4 * _wave(0.8 * u)) + _duty(dice, -0.4, 0.4)


def _waves(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    return _wave(u + 0.3 * np.sin(np.pi * v)) + _duty(dice, -0.4, 0.4)


def _bricks(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    row = np.floor(1.25 * v)
    joint_u: Field = 1 - np.abs(_from_centre(u + row, 2.0))
    joint_v: Field = 0.4 - 0.8 * np.abs(_from_centre(1.25 * v))
    nearest: Field = np.minimum(joint_u, joint_v)
    return 4 * (nearest - _duty(dice, 0.08, 0.16))


def _triangles(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    # Skewed axes: the unit square becomes two triangles with equal sides.
    third = 1 / np.sqrt(3)
    p, q = 0.75 * (u - third * v), 1.5 * third * v
    p, q = p - np.floor(p), q - np.floor(q)
    up = np.minimum(np.minimum(p, q), 1 - p - q)
    down = np.minimum(np.minimum(1 - p, 1 - q), p + q - 1)
    height: Field = 4 * np.where(p + q < 1, up, -down)
    return height + _duty(dice, -0.15, 0.15)


def _hex_dots(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    height = np.sqrt(3)
    one = np.hypot(_from_centre(u), _from_centre(v, height))
    two = np.hypot(_from_centre(u + 0.5), _from_centre(v + height / 2, height))
    return 4 * (_duty(dice, 0.25, 0.36) - np.minimum(one, two))


def _spots(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    height = np.full(np.broadcast_shapes(u.shape, v.shape), -4.0)
    for spot in range(_SPOTS, _SPOTS + 30, 3):
        a = u - dice(_SHIFT_U) - frequency * dice(spot, -0.5, 0.5)
        b = v - dice(_SHIFT_V) - frequency * dice(spot + 1, -0.5, 0.5)
        height = np.maximum(height, 4 * (dice(spot + 2, 0.25, 0.6) - np.hypot(a, b)))
    return height


def _plaid(dice: Dice, u: Field, v: Field, frequency: Field) -> Field:
    """Three tones: where bands cross, the front; where one runs, halfway."""
    softness, duty = dice(_SOFTNESS, 0.15, 0.6), _duty(dice, -0.3, 0.3)
    bands = sum(np.clip((_wave(w) + duty) / softness + 0.5, 0, 1) for w in (u, v))
    return softness * (np.asarray(bands) / 2 - 0.5)


_PATTERNS: dict[str, Callable[[Dice, Field, Field, Field], Field]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "grid": _grid,
    "zigzag": _zigzag,
    "waves": _waves,
    "bricks": _bricks,
    "triangles": _triangles,
    "hex dots": _hex_dots,
    "spots": _spots,
    "plaid": _plaid,
}
