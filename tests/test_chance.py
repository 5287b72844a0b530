"""Chance: pinned values, uniformity, independence of every argument, and the epoch's order."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from mocokit.chance import Order, Slot, library_seed, uniform

N = 100_000
GOLDEN = [0.6926401764953013, 0.024193666337138486, 0.7790460953899947]
GOLDEN_ORDER = [8, 2, 4, 5, 7, 1, 9, 0, 3, 6]
GOLDEN_SEED = 7456730726438319008
GOLDEN_SEEDS = {  # of seed 5 and step 2, by a transcription of SplitMix64 in Python's integers
    Slot.LIBRARY: 2566022893992198336,
    Slot.INITIALISE: 8141860532702159996,
    Slot.EVALUATION: 2536849902303648560,
    Slot.DETECTION_ORDER: 4389865458311043799,
    Slot.DETECTION_WEIGHTS: 3614920170855833809,
    Slot.DETECTION_DRAW: 7099795660713278828,
}


def test_values_are_pinned():
    """A change here changes every recorded run: never adapt the numbers to the code."""
    got = uniform(0, 0, np.arange(3), 0, 0)
    np.testing.assert_array_equal(got, GOLDEN)
    assert list(Order(3, 1, 10)[np.arange(10)]) == GOLDEN_ORDER
    assert library_seed(0, 1) == GOLDEN_SEED


def test_every_slot_has_a_library_seed_of_its_own():
    """The upper bits of the number that `uniform` has there; values pinned beside them."""
    of = {
        (seed, step, slot): library_seed(seed, step, slot)
        for seed in (0, 5, 2**63 - 1)
        for step in (0, 1, 2, 10**6)
        for slot in Slot
    }
    assert len({*of.values()}) == len(of) and all(0 <= one < 2**63 for one in of.values())
    for (seed, step, slot), found in of.items():
        assert (found >> 10) * 2.0**-53 == uniform(seed, step, 0, 0, slot), (seed, step, slot)
    assert library_seed(0, 1) == of[0, 1, Slot.LIBRARY]
    assert {slot: of[5, 2, slot] for slot in GOLDEN_SEEDS} == GOLDEN_SEEDS


def test_slots_are_pinned():
    assert {slot.name: int(slot) for slot in Slot} == {
        "CROP_AREA": 0,
        "CROP_RATIO": 10,
        "CROP_TOP": 20,
        "CROP_LEFT": 21,
        "FLIP": 22,
        "JITTER": 30,
        "BRIGHTNESS": 31,
        "CONTRAST": 32,
        "SATURATION": 33,
        "HUE": 34,
        "JITTER_ORDER": 35,
        "GRAYSCALE": 40,
        "BLUR": 41,
        "SIGMA": 42,
        "SOLARIZE": 43,
        "RANDAUGMENT": 130,
        "SUBSTITUTE": 100,
        "HOLD_OUT": 110,
        "EVALUATION": 111,
        "LABELS": 112,
        "CHOICE": 113,
        "TEST": 114,
        "HEALTH": 115,
        "DETECTION_ORDER": 120,
        "DETECTION_SIDE": 121,
        "DETECTION_FLIP": 122,
        "DETECTION_WEIGHTS": 123,
        "DETECTION_DRAW": 124,
        "KEY_SHUFFLE": 200,
        "ENQUEUE": 201,
        "BANK_NEGATIVES": 202,
        "PATTERN": 300,
        "LIBRARY": 400,
        "INITIALISE": 401,
        "ORDER": 500,
    }


@pytest.mark.parametrize("argument", range(5))
def test_uniform_along_every_argument(argument):
    arguments = [7, 7, 7, 7, 7]
    arguments[argument] = np.arange(N)
    numbers = uniform(*arguments)
    assert numbers.dtype == np.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-4
    # neighbours are independent: pairs fill the unit square evenly, differences have no mean
    pairs = np.histogram2d(numbers[:-1], numbers[1:], bins=16, range=[[0, 1]] * 2)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("argument", range(5))
def test_streams_that_differ_in_one_argument_are_independent(argument):
    base, other = [3, 3, 3, 3, 3], [3, 3, 3, 3, 3]
    other[argument] = 4
    free = 2 if argument != 2 else 1
    base[free] = other[free] = np.arange(N)
    a, b = uniform(*base), uniform(*other)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    pairs = np.histogram2d(a, b, bins=16, range=[[0, 1]] * 2)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


def test_swapped_arguments_give_other_numbers():
    assert len({float(uniform(*np.roll([1, 2, 3, 4, 5], k))) for k in range(5)}) == 5


def test_low_bits_are_random_too():
    bits = (uniform(0, 0, np.arange(N), 0, 0) * 2.0**53).astype(np.uint64) & np.uint64(1)
    assert abs(bits.mean() - 0.5) < 0.01


def test_arguments_broadcast():
    table = uniform(1, 2, np.arange(4)[:, None], 0, np.arange(3))
    assert table.shape == (4, 3)
    assert table[2, 1] == uniform(1, 2, 2, 0, 1)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 3000))
def test_order_is_a_permutation(seed, epoch, size):
    assert sorted(Order(seed, epoch, size)[np.arange(size)]) == list(range(size))


@given(st.integers(0, 99), st.lists(st.integers(0, 999), max_size=20))
def test_order_can_be_asked_anywhere(seed, positions):
    order = Order(seed, 0, 1000)
    whole = order[np.arange(1000)]
    assert list(order[positions]) == [whole[p] for p in positions]


def test_orders_of_epochs_and_seeds_differ():
    orders = [tuple(Order(s, e, 500)[np.arange(500)]) for s in (0, 1) for e in (0, 1, 2)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize(("size", "bins"), [(5, 5), (64, 16), (1000, 20)])
def test_every_image_is_equally_likely_anywhere(size, bins):
    first = np.array([Order(seed, 0, size)[[0, size // 2, size - 1]] for seed in range(4000)])
    for column in first.T:
        counts = np.histogram(column, bins=bins, range=(0, size))[0]
        assert stats.chisquare(counts).pvalue > 1e-4
    neighbours = np.abs(first[:, 0] - first[:, 1])
    assert 0.8 < neighbours.mean() / (size / 3) < 1.25


def test_order_of_a_billion_images_costs_nothing():
    order = Order(0, 0, 10**9)
    found = order[np.arange(10**6, 10**6 + 1000)]
    assert len(set(found)) == 1000 and found.max() > 9 * 10**8


def test_order_refuses_what_lies_outside():
    with pytest.raises(IndexError, match=r"\[0, 5\)"):
        Order(0, 0, 5)[[5]]
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 0, 0)
