"""Every random number of a run, as a function of what it is for.

No random state is carried along: `uniform(seed, epoch, index, view, slot)` is a hash, so a number
depends neither on the machine, nor on the number of processes or loading workers, nor on where a
run was interrupted. `Order` does the same for the order of an epoch. Slots are named here, once,
and never renumbered: a test pins values, and a change would silently change every recorded run.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Slot(IntEnum):
    """What a random number is for.

    Views own 0-99 and 130-149, the loader 100-109, scores and health 110-119, detection 120-129,
    methods 200-299, procedural images 300-399, library generators 400-499, orders 500-599.
    """

    # Crop: ten tries of (area, ratio), as in torchvision's RandomResizedCrop, and a place.
    CROP_AREA = 0  # 0..9
    CROP_RATIO = 10  # 10..19
    CROP_TOP = 20
    CROP_LEFT = 21
    FLIP = 22
    JITTER = 30
    BRIGHTNESS = 31
    CONTRAST = 32
    SATURATION = 33
    HUE = 34
    JITTER_ORDER = 35  # 35..38
    GRAYSCALE = 40
    BLUR = 41
    SIGMA = 42
    SOLARIZE = 43

    # RandAugment, of the views too: six for each of three operations.
    RANDAUGMENT = 130  # 130..147

    SUBSTITUTE = 100  # which image stands in for one that cannot be read
    HOLD_OUT = 110  # which labelled images are kept for the monitor
    EVALUATION = 111  # an evaluation's own stream: its weights, its orders, its views
    LABELS = 112  # which images a share of the labels names
    CHOICE = 113  # which training images choose a probe's regularisation
    TEST = 114  # which images test a probe where there are no others
    HEALTH = 115  # which images health is measured on

    KEY_SHUFFLE = 200  # the order of the key images before they are cut into groups
    ENQUEUE = 201  # which view's keys join the queue, where those of one do
    BANK_NEGATIVES = 202  # which entries of a memory bank are compared with

    # Detection.
    DETECTION_ORDER = 120  # the order of its training images
    DETECTION_SIDE = 121  # which short side an image is resized to
    DETECTION_FLIP = 122
    DETECTION_WEIGHTS = 123  # the new layers' first weights
    DETECTION_DRAW = 124  # which anchors and proposals a step learns from

    # Procedural images.
    PATTERN = 300
    # Library generators (initialisation, dropout) are re-seeded from these.
    LIBRARY = 400
    INITIALISE = 401
    ORDER = 500


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 8


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every input bit moves every output bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


def _hash(*arguments: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each combination of integer arguments, which broadcast."""
    bits = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for argument in arguments:
            words = np.asarray(argument).astype(np.int64).view(np.uint64)
            bits = _mix((bits + _GOLDEN) ^ _mix(words + _GOLDEN))
    return bits


def uniform(
    seed: ArrayLike, epoch: ArrayLike, index: ArrayLike, view: ArrayLike, slot: ArrayLike
) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits; the arguments broadcast like numpy arrays.

    `index` is the image's stable number (or a position, for numbers that belong to a step).
    """
    bits = _hash(seed, epoch, index, view, slot)
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def library_seed(seed: int, step: int, slot: int = Slot.LIBRARY) -> int:
    """A 63-bit seed for a library's own generator, such as torch's, before a step."""
    return int(_hash(seed, step, 0, 0, slot) >> np.uint64(1))


class Order:
    """The order in which an epoch visits `size` images: a permutation computed at any position.

    A keyed Feistel network over Z_a x Z_b with a * b >= size (Black and Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains"), walking on while it points outside: constant memory at any size.
    """

    def __init__(self, seed: int, epoch: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one image, not {size}")
        self.size = size
        self._a = int(np.ceil(np.sqrt(size)))
        self._b = -(-size // self._a)
        self._keys = _hash(seed, epoch, np.arange(_FEISTEL_ROUNDS), 0, Slot.ORDER)

    def __getitem__(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The images at these positions of the epoch, each in [0, size)."""
        index = np.array(positions, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise IndexError(f"positions must lie in [0, {self.size})")
        index = self._permute(index)
        while (outside := index >= self.size).any():
            index = np.where(outside, self._permute(index), index)
        return index

    def _permute(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        left, right = index // self._b, index % self._b
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = (left + self._shift(right, key, self._a)) % self._a
            else:
                right = (right + self._shift(left, key, self._b)) % self._b
        return left * self._b + right

    @staticmethod
    def _shift(half: NDArray[np.int64], key: np.uint64, modulus: int) -> NDArray[np.int64]:
        with np.errstate(over="ignore"):
            bits = _mix(_mix(half.view(np.uint64) + _GOLDEN) ^ key)
        return np.asarray((bits % np.uint64(modulus)).astype(np.int64))
