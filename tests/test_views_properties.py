"""Whatever is drawn from whatever image: views are finite, in range, and constant where it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from reference_views import flat, replay, spec_of

from mocokit.views import canvases as room
from mocokit.views.params import RANDOM_OPERATION, Table, draw_table
from mocokit.views.views import evaluation_views, make_views

SIDES = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 3, 64, 65, 300]))
SHARES = st.sampled_from([0.0, 0.5, 1.0])
KINDS = st.sampled_from(["bilinear", "bicubic"])
OPERATIONS = ("flip", "jitter", "grayscale", "blur", "solarize")
quick = settings(max_examples=60, deadline=None, derandomize=True)


both_ways = pytest.mark.parametrize("way", ["gathered", "each"])


def forced(way, run, *parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "_way", lambda *_: way)
        return run(*parts)


@st.composite
def canvases(draw, most=4):
    """A few images of any shapes: noise, black and white, or one colour."""
    made = []
    for seed in range(draw(st.integers(1, most))):
        shape = (draw(SIDES), draw(SIDES), 3)
        numbers = np.random.default_rng(seed)
        kind = draw(st.sampled_from(["noise", "black and white", "constant"]))
        if kind == "constant":
            made.append(np.broadcast_to(numbers.integers(0, 256, 3, np.uint8), shape).copy())
        else:
            levels = numbers.integers(0, 256, shape, np.uint8)
            made.append(levels if kind == "noise" else np.where(levels > 127, 255, 0))
    return [canvas.astype(np.uint8) for canvas in made]


@st.composite
def specs(draw):
    """Any pipeline; mean 0 and deviation 1, so that levels stay visible."""
    ends = st.sampled_from([(0.1, 0.1), (0.1, 2.0), (2.0, 2.0)])
    size = draw(st.integers(8, 72))
    order = draw(st.permutations(OPERATIONS))
    return spec_of(
        size=size,
        resize=size + draw(st.integers(0, 9)),
        order=("crop", *order[: draw(st.integers(0, len(order)))]),
        crop_area=draw(st.sampled_from([(0.001, 0.01), (0.08, 1.0), (1.0, 1.0)])),
        crop_ratio=draw(st.sampled_from([(0.05, 20.0), (3 / 4, 4 / 3), (1.0, 1.0)])),
        interpolation=draw(KINDS),
        jitter_probability=draw(SHARES),
        brightness=draw(st.sampled_from([0.0, 1.0, 9.0])),
        contrast=draw(st.sampled_from([0.0, 1.0, 9.0])),
        saturation=draw(st.sampled_from([0.0, 1.0, 9.0])),
        hue=draw(st.sampled_from([0.0, 0.1, 0.5])),
        grayscale_probability=draw(SHARES),
        blur_probability=(draw(SHARES), draw(SHARES)),
        blur_sigma=draw(ends),
        solarize_probability=(draw(SHARES), draw(SHARES)),
        flip_probability=draw(SHARES),
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )


def assert_in_range(result, count, size):
    assert result.shape == (count, 3, size, size) and result.dtype == torch.float32
    # A NaN would fail both comparisons.
    assert (result >= -1e-5).all() and (result <= 1 + 1e-5).all()


@both_ways
@given(spec=specs(), images=canvases(), view=st.integers(0, 1), seed=st.integers(0, 2**40))
@quick
def test_any_view_of_any_image_is_finite_and_in_range(way, spec, images, view, seed):
    pixels, heights, widths = flat(images)
    table = draw_table(spec, seed, 0, np.arange(len(images)), view, heights, widths)
    result = forced(way, make_views, spec, table, pixels, heights, widths, "cpu")
    assert_in_range(result, len(images), spec.size)
    evaluated = forced(way, evaluation_views, spec, pixels, heights, widths, "cpu")
    assert_in_range(evaluated, len(images), spec.size)
    for image, one in zip(images, evaluated, strict=True):
        if (image == image[0, 0]).all():
            assert (one - torch.from_numpy(image[0, 0] / 255.0).view(3, 1, 1)).abs().max() < 1e-5


def table_at_the_ends(draw, heights, widths):
    """Each number at one of its ends, each box at a border of its image."""
    count = len(heights)

    def ends(*values):
        return np.array([draw(st.sampled_from(values)) for _ in range(count)])

    tall = np.maximum(1, np.rint(heights * ends(0.0, 0.3, 1.0))).astype(np.int64)
    wide = np.maximum(1, np.rint(widths * ends(0.0, 0.3, 1.0))).astype(np.int64)
    top, left = (heights - tall) * ends(0, 1), (widths - wide) * ends(0, 1)
    orders = [draw(st.permutations(range(4))) for _ in range(count)]
    return Table(
        boxes=np.stack([top, left, tall, wide], axis=1).astype(np.int64),
        flip=ends(False, True),
        jitter=ends(False, True),
        brightness=ends(0.0, 0.6, 1.0, 1.8),
        contrast=ends(0.0, 0.6, 1.0, 1.8),
        saturation=ends(0.0, 0.6, 1.0, 1.8),
        hue=ends(-0.5, 0.0, 0.5).astype(np.float64),
        order=np.array(orders, np.int64).reshape(count, 4),
        grayscale=ends(False, True),
        sigma=ends(0.0, 0.1, 2.0),
        randaugment=np.zeros((count, 0), RANDOM_OPERATION),
        solarize=ends(False, True),
    )


PLAIN = {"size": 24, "resize": 24, "mean": (0, 0, 0), "std": (1, 1, 1)}
ENDS = spec_of(order=("crop", *OPERATIONS), interpolation="bicubic", **PLAIN)


@given(data=st.data(), images=canvases())
@quick
def test_numbers_at_their_ends_replay_through_torchvision(data, images):
    pixels, heights, widths = flat(images)
    table = table_at_the_ends(data.draw, heights, widths)
    result = forced("gathered", make_views, ENDS, table, pixels, heights, widths, "cpu")
    assert_in_range(result, len(images), ENDS.size)
    difference = (result - replay(ENDS, table, images, exact=True)).abs()
    # Where nearly gray, a last bit may turn the hue as far as the hue goes; its chroma is as small.
    assert difference.max() < 1e-3


@both_ways
@given(data=st.data(), images=canvases(), kind=KINDS)
@quick
def test_a_constant_image_stays_constant(way, data, images, kind):
    spec = spec_of(order=("crop", "flip", "blur"), interpolation=kind, **PLAIN)
    images = [np.broadcast_to(image[0, 0], image.shape).copy() for image in images]
    pixels, heights, widths = flat(images)
    table = table_at_the_ends(data.draw, heights, widths)
    result = forced(way, make_views, spec, table, pixels, heights, widths, "cpu")
    for image, one in zip(images, result, strict=True):
        assert (one - torch.from_numpy(image[0, 0] / 255.0).view(3, 1, 1)).abs().max() < 1e-5
