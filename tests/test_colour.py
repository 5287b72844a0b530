"""Colour jitter against torchvision's functional operations, applied image by image."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from reference_views import jitter as reference

from mocokit.views import separable
from mocokit.views.colour import grayscale_rows, jitter, solarize_rows

ORDERS = np.array(list(itertools.permutations(range(4))))


@pytest.fixture(params=["sorted", "one by one"], autouse=True)
def _how(request, monkeypatch):
    """On a CPU images of more than DENSE_SIDE pixels are changed one by one."""
    if request.param == "one by one":
        monkeypatch.setattr(separable, "DENSE_SIDE", 0)


def images(count, height=24, width=17, seed=0):
    """Noise, with gray, black, white and primary pixels, whose hue is undefined or on an edge."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    noise[:, :, 0] = noise[:, :1, 0]
    noise[:, :, 1, :8] = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).T
    noise[:, 0, 2] = noise[:, 1, 2]
    noise[:, 1, 3] = noise[:, 2, 3]
    return noise


def factors(count, low, high, hue, seed=0):
    draw = np.random.default_rng(seed)
    return [*draw.uniform(low, high, (3, count)), draw.uniform(-hue, hue, count)]


def expect(pixels, columns, order):
    rows = zip(pixels, np.stack(columns).T, order, strict=True)
    return torch.stack([reference(image, row, steps) for image, row, steps in rows])


@pytest.mark.parametrize(
    "low, high, hue", [(0.6, 1.4, 0.1), (0.6, 1.4, 0.4), (0, 2, 0.5), (0, 0.05, 0.5)]
)
def test_jitter_is_torchvisions_in_every_order(low, high, hue):
    order = np.concatenate([ORDERS, ORDERS])
    pixels, columns = images(len(order)), factors(len(order), low, high, hue)
    ours = jitter(pixels, *columns, order)
    assert (ours - expect(pixels, columns, order)).abs().max() < 1e-5


def test_extreme_factors_step_by_step():
    # In a chain, factors of 10 would stretch the last bits of one step to 1e-4 in the third.
    pixels, columns = images(len(ORDERS)), factors(len(ORDERS), 0, 10, 0.5)
    for position in range(4):
        step = ORDERS[:, position : position + 1]
        chosen = [
            np.where(step[:, 0] == number, columns[number], number != 3) for number in range(4)
        ]
        after = expect(pixels, columns, step)
        assert (jitter(pixels, *chosen, ORDERS) - after).abs().max() < 1e-5
        pixels = after


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("value", [-0.5, -0.25, -1 / 6, 0.0, 1 / 3, 0.5, 1.0, 2.0, 100.0])
def test_one_operation_alone(operation, value):
    if abs(value) > 0.5 if operation == 3 else value < 0:
        pytest.skip("not a factor that torchvision accepts")
    pixels = images(3)
    columns = [np.ones(3), np.ones(3), np.ones(3), np.zeros(3)]
    columns[operation] = np.full(3, value)
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    # In double precision: a factor of 100 stretches last bits of theirs as far as the bound.
    expected = torch.stack([steps[operation](image.double(), value) for image in pixels])
    ours = jitter(pixels, *columns, ORDERS[:3])
    assert (ours - expected).abs().max() < 1e-5


def test_neutral_factors_change_nothing():
    pixels = images(24)
    ours = jitter(pixels, np.ones(24), np.ones(24), np.ones(24), np.zeros(24), ORDERS)
    assert torch.equal(ours, pixels) and ours is not pixels


def test_the_input_is_left_alone_and_numbers_may_be_tensors():
    pixels, columns = images(24), factors(24, 0.2, 1.8, 0.3)
    before = pixels.clone()
    ours = jitter(pixels, *columns, ORDERS)
    assert torch.equal(pixels, before)
    tensors = [torch.from_numpy(column) for column in columns]
    assert torch.equal(jitter(pixels, *tensors, torch.from_numpy(ORDERS)), ours)
    last = pixels.contiguous(memory_format=torch.channels_last)
    assert torch.equal(jitter(last, *columns, ORDERS), ours)
    double = jitter(pixels.double(), *columns, ORDERS)
    assert double.dtype == torch.float64 and (double - ours).abs().max() < 1e-5


def test_an_image_does_not_depend_on_its_neighbours():
    pixels, columns = images(24), factors(24, 0.2, 1.8, 0.3)
    together = jitter(pixels, *columns, ORDERS)
    turned = np.random.default_rng(0).permutation(24)
    mixed = jitter(pixels[turned], *(column[turned] for column in columns), ORDERS[turned])
    assert (mixed - together[turned]).abs().max() < 1e-6
    for row in range(0, 24, 5):
        part = slice(row, row + 1)
        per_image = jitter(pixels[part], *(column[part] for column in columns), ORDERS[part])
        assert (per_image[0] - together[row]).abs().max() < 1e-6


def test_order_matters():
    pixels, columns = images(2), factors(2, 0.2, 1.8, 0.3)
    columns = [column[[0, 0]] for column in columns]
    ours = jitter(pixels[[0, 0]], *columns, ORDERS[[0, -1]])
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_no_images():
    none = np.zeros(0)
    assert jitter(images(0), none, none, none, none, ORDERS[:0]).shape == (0, 3, 24, 17)


def test_grayscale_is_torchvisions():
    pixels, rows = images(5), np.array([1, 4])
    ours, expected = pixels.clone(), pixels.clone()
    grayscale_rows(ours, rows)
    expected[rows] = TF.rgb_to_grayscale(pixels[rows], 3)
    assert (ours - expected).abs().max() < 1e-6 and torch.equal(ours[[0, 2, 3]], pixels[[0, 2, 3]])


def test_solarisation_is_torchvisions_to_the_bit():
    pixels = images(6)
    pixels[:, :, 4, :3] = torch.tensor([0.5, np.nextafter(np.float32(0.5), 0), 127 / 255])
    for rows in ([0, 1, 2], [1, 4], [5]):
        ours = pixels.clone()
        solarize_rows(ours, np.array(rows))
        expected = pixels.clone()
        expected[rows] = TF.solarize(pixels[rows], 0.5)
        assert torch.equal(ours, expected)
    # On whole levels it is PIL's, whose threshold is 128.
    whole = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    ours = (whole / 255).contiguous()
    solarize_rows(ours, np.array([0]))
    assert torch.equal((255 * ours).round(), torch.where(whole >= 128, 255 - whole, whole).float())


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_uniform_gray_stays_uniform_gray(level):
    pixels = torch.full((24, 3, 9, 9), level)
    ours = jitter(pixels, *factors(24, 0.2, 1.8, 0.5), ORDERS)
    # The luma weights sum to .9999, as torchvision's do.
    assert (ours - ours[:, :1, :1, :1]).abs().max() < 1e-6
    grayscale_rows(pixels, np.arange(24))
    assert (pixels - 0.9999 * level).abs().max() < 1e-6
