"""The table: torchvision's crop, the stated distributions, and rows that know only their image."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_views import cifar, spec_of, v1, v2, v3
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from mocokit.chance import Slot, uniform
from mocokit.errors import UserError
from mocokit.settings import from_yaml, replace, to_yaml
from mocokit.settings.schema import Settings, Views
from mocokit.views.colour import LUMA
from mocokit.views.params import (
    RANDOM_OPERATIONS,
    ViewSpec,
    canvas_bound,
    describe,
    draw_table,
    scoring_bound,
)

N = 100_000


def draw(spec, n=N, height=300, width=400, view=0, seed=1, epoch=2):
    return draw_table(spec, seed, epoch, np.arange(n), view, np.full(n, height), np.full(n, width))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def assert_uniform(values, low, high):
    assert values.min() >= low and values.max() <= high
    assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-3


def test_spec_has_exactly_the_settings():
    assert tuple(ViewSpec.__dataclass_fields__) == (*Views.model_fields, "resize")
    assert ViewSpec(**Views().model_dump(), resize=256).order == Views().order


def scalar_crop(spec, seed, epoch, index, view, height, width):
    """torchvision's get_params, number by number."""
    low, high = spec.crop_ratio

    def number(slot):
        return float(uniform(seed, epoch, index, view, slot))

    for attempt in range(10):
        area = spec.crop_area[0] + np.diff(spec.crop_area)[0] * number(Slot.CROP_AREA + attempt)
        log_ratio = math.log(low) + (math.log(high) - math.log(low)) * number(
            Slot.CROP_RATIO + attempt
        )
        target, ratio = area * height * width, math.exp(log_ratio)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = math.floor(number(Slot.CROP_TOP) * (height - h + 1))
            return top, math.floor(number(Slot.CROP_LEFT) * (width - w + 1)), h, w
    if width / height < low:
        w, h = width, round(width / low)
    elif width / height > high:
        w, h = round(height * high), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(32, 32), (300, 400), (90, 30), (7, 5), (20, 200)])
def test_boxes_are_torchvisions_algorithm(height, width):
    spec = cifar()
    boxes = draw(spec, 300, height, width).boxes
    expected = [scalar_crop(spec, 1, 2, i, 0, height, width) for i in range(300)]
    assert boxes.tolist() == [list(box) for box in expected]


@pytest.mark.parametrize("side", [1, 5, 7, 22, 26])
def test_halves_of_pixels_go_to_the_even_neighbour(side):
    """As in torchvision: Python's round. A quarter of the area of a square halves its side."""
    one = {"crop_area": (0.25, 0.25), "crop_ratio": (1.0, 1.0)}
    torch.manual_seed(0)
    image = torch.empty(3, side, side)
    *_, height, width = RandomResizedCrop.get_params(image, [0.25, 0.25], [1.0, 1.0])
    boxes = draw(spec_of(**one), 20, side, side).boxes
    assert (boxes[:, 2:] == [height, width]).all()


@pytest.mark.parametrize("height, width", [(300, 400), (64, 200)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    ours = draw(v2(), 6000, height, width).boxes
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (1, 1), (1, 50)])
def test_fallback_is_torchvisions_central_crop(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    expected = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
    assert (draw(v2(), 50, height, width).boxes == np.array(expected)).all()


def test_boxes_lie_within_their_images():
    sizes = np.random.default_rng(0).integers(1, 60, (2, 5000))
    boxes = draw_table(cifar(), 0, 0, np.arange(5000), 1, *sizes).boxes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes.T).all()


def test_area_and_log_ratio_are_uniform_where_every_try_fits():
    boxes = draw(spec_of(crop_area=(0.2, 0.5)), height=4000, width=4000).boxes
    area = boxes[:, 2] * boxes[:, 3] / 4000**2
    # Whole pixels may lie just outside the ends.
    assert_uniform(area.clip(0.2, 0.5), 0.2, 0.5)
    log_ratio = np.log(boxes[:, 3] / boxes[:, 2])
    assert_uniform(log_ratio.clip(math.log(0.75), -math.log(0.75)), math.log(0.75), -math.log(0.75))
    assert abs(stats.spearmanr(area, log_ratio).statistic) < 0.03
    for place in places(boxes, 4000, 4000).T:
        assert_uniform(place, 0, 1)


def test_factors_shares_and_orders():
    spec = spec_of(brightness=0.3, contrast=1.5, saturation=0.2, hue=0.3, flip_probability=0.25)
    table = draw(spec)
    assert_uniform(table.brightness, 0.7, 1.3)
    assert_uniform(table.contrast, 0.0, 2.5)
    assert_uniform(table.saturation, 0.8, 1.2)
    assert_uniform(table.hue, -0.3, 0.3)
    assert_uniform(table.sigma[table.sigma > 0], 0.1, 2.0)
    shares = {"flip": 0.25, "jitter": 0.8, "grayscale": 0.2}
    for name, share in shares.items():
        assert stats.binomtest(int(getattr(table, name).sum()), N, share).pvalue > 1e-3, name
    assert stats.binomtest(int((table.sigma > 0).sum()), N, 0.5).pvalue > 1e-3
    assert (np.sort(table.order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(table.order, axis=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_the_two_views_have_shares_of_their_own():
    first, second = draw(v3()), draw(v3(), view=1)
    assert (first.sigma > 0).all() and not first.solarize.any()
    assert stats.binomtest(int((second.sigma > 0).sum()), N, 0.1).pvalue > 1e-3
    assert stats.binomtest(int(second.solarize.sum()), N, 0.2).pvalue > 1e-3
    assert abs(np.corrcoef(second.sigma > 0, second.solarize)[0, 1]) < 4.5 / math.sqrt(N)
    third = draw(v3(), view=2)
    assert 0.08 < (third.sigma > 0).mean() < 0.12 and 0.18 < third.solarize.mean() < 0.22


@pytest.mark.parametrize("view", [0, 1])
def test_one_number_is_that_number_for_both_views(view):
    one = spec_of(order=v3().order, blur_probability=0.3, solarize_probability=0.2)
    pair = spec_of(order=v3().order, blur_probability=[0.3, 0.3], solarize_probability=[0.2, 0.2])
    assert same(draw(one, view=view), draw(pair, view=view))
    # And without solarisation no other number moves.
    bare = draw(spec_of(blur_probability=0.3), view=view)
    assert not bare.solarize.any()
    assert same(draw(one, view=view)[:-1], bare[:-1])


@pytest.mark.parametrize("value", [1.5, [0.1], [0.1, 2], [0.1, 0.2, 0.3], "often"])
def test_other_shares_are_refused(value):
    with pytest.raises(ValidationError):
        spec_of(blur_probability=value)
    with pytest.raises(ValidationError):
        spec_of(solarize_probability=value)
    with pytest.raises(UserError, match=r"views\.blur_probability = "):
        replace(Settings(), {"views.blur_probability": value})


def test_a_pair_of_shares_survives_the_file():
    ours = replace(Settings(), {"views.blur_probability": [1, 0.1]})
    assert ours.views.blur_probability == (1.0, 0.1)
    assert from_yaml(to_yaml(ours)) == ours


def places(boxes, height=300, width=400):
    """Where a box lies of where it could, (N, 2) in (0, 1)."""
    return (boxes[:, :2] + 0.5) / (np.array([height, width]) - boxes[:, 2:] + 1)


def test_columns_views_and_epochs_are_independent():
    spec = v2()
    one, other, later = draw(spec), draw(spec, view=1), draw(spec, epoch=3)
    columns = np.stack(
        [
            *(np.asarray(getattr(one, name), float) for name in one._fields[1:6]),
            *(part.astype(float) for part in (one.hue, one.grayscale, one.sigma)),
            *(np.asarray(getattr(other, name), float) for name in one._fields[1:6]),
            *(np.asarray(getattr(later, name), float) for name in one._fields[1:6]),
            *places(one.boxes).T,
            *places(other.boxes).T,
        ]
    )
    correlation = np.corrcoef(columns)
    off = correlation[~np.eye(len(columns), dtype=bool)]
    assert np.abs(off).max() < 4.5 / math.sqrt(N)


def test_extremes_of_probability():
    never = draw(spec_of(**dict.fromkeys(
        ("jitter_probability", "grayscale_probability", "blur_probability", "flip_probability"), 0
    )))  # fmt: skip
    assert not (never.flip.any() or never.jitter.any() or never.grayscale.any())
    assert not never.sigma.any()
    always = draw(spec_of(**dict.fromkeys(
        ("jitter_probability", "grayscale_probability", "blur_probability", "flip_probability"), 1
    )))  # fmt: skip
    assert always.flip.all() and always.jitter.all() and always.grayscale.all()
    assert (always.sigma > 0).all()


def test_an_absent_operation_is_never_applied_and_moves_no_other_draw():
    full, bare = draw(v2()), draw(spec_of(order=("crop",)))
    assert not (bare.flip.any() or bare.jitter.any() or bare.grayscale.any() or bare.sigma.any())
    for name in ("boxes", "brightness", "contrast", "saturation", "hue", "order"):
        assert np.array_equal(getattr(full, name), getattr(bare, name)), name
    turned = draw(spec_of(order=("crop", "flip", "blur", "grayscale", "jitter")))
    assert same(full, turned)


def test_rows_depend_on_their_image_alone():
    spec, index = v2(), np.array([5, 900, 2, 77, 31, 8])
    heights, widths = np.array([30, 300, 40, 64, 500, 20]), np.array([40, 31, 400, 64, 20, 20])
    whole = draw_table(spec, 3, 1, index, 1, heights, widths)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        piece = draw_table(spec, 3, 1, index[part], 1, heights[part], widths[part])
        assert same(piece, whole.rows(part))
    swapped = draw_table(spec, 3, 1, index[::-1], 1, heights[::-1], widths[::-1])
    assert same(swapped, [column[::-1] for column in whole])
    for changed in (
        draw_table(spec, 4, 1, index, 1, heights, widths),
        draw_table(spec, 3, 2, index, 1, heights, widths),
        draw_table(spec, 3, 1, index, 0, heights, widths),
    ):
        assert not (changed.brightness == whole.brightness).any()
        assert not np.array_equal(changed.boxes, whole.boxes)


def test_golden_rows():
    """A change of these numbers changes every recorded run."""
    table = draw_table(v2(), 0, 0, [0, 1, 2], 1, [300, 32, 10], [400, 32, 100])
    assert table.boxes.tolist() == [[42, 54, 246, 189], [10, 13, 20, 19], [0, 43, 10, 13]]
    assert table.brightness == pytest.approx([1.22004085, 1.36945498, 0.77499658], abs=1e-8)
    assert table.hue == pytest.approx([0.00942578, 0.07637327, -0.04830569], abs=1e-8)
    assert table.sigma == pytest.approx([0, 0.18072078, 0.25437295], abs=1e-8)
    assert table.order.tolist() == [[2, 0, 1, 3], [1, 0, 3, 2], [2, 0, 1, 3]]


def test_types_and_shapes_also_without_images():
    for n in (0, 3):
        table = draw(v2(), n)
        assert table.boxes.shape == table.order.shape == (n, 4)
        assert table.boxes.dtype == table.order.dtype == np.int64
        for name in ("flip", "jitter", "grayscale", "solarize"):
            assert getattr(table, name).dtype == bool and getattr(table, name).shape == (n,)
        for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
            assert getattr(table, name).dtype == np.float64 and getattr(table, name).shape == (n,)


def test_canvas_bound():
    assert canvas_bound(v2()) == 579
    assert canvas_bound(cifar()) == math.ceil(32 / math.sqrt(0.08 * 0.75))
    whole = spec_of(size=64, crop_area=(1, 1), crop_ratio=(1, 1), resize=73)
    assert canvas_bound(whole) == 64 and scoring_bound(whole) == 73
    kept = dataclasses.replace(whole, canvas=256)  # an unfinished run of 0.1
    assert canvas_bound(kept) == 256 and scoring_bound(kept) == 73
    assert canvas_bound(spec_of(size=100, resize=100, crop_area=(1, 1), crop_ratio=(1, 4))) == 200


@pytest.mark.parametrize("height, width", [(579, 579), (579, 900), (1200, 579)])
def test_no_crop_of_a_bounded_canvas_is_smaller_than_the_view(height, width):
    # The bound loses nothing: a crop of it has at least `size` pixels, but for rounding.
    assert draw(v2(), 5000, height, width).boxes[:, 2:].min() >= 223


@pytest.mark.parametrize("ratio", [(2.0, 3.0), (0.3, 0.5), (1.5, 2.0)])
@pytest.mark.parametrize("area", [(0.9, 1.0), (0.2, 1.0)])
def test_nor_is_a_crop_that_no_try_fitted(ratio, area):
    """Of a square, where every ratio allowed is another, the fallback is the thinnest crop."""
    spec = spec_of(size=100, resize=100, crop_ratio=ratio, crop_area=area)
    bound = canvas_bound(spec)
    assert draw(spec, 5000, bound, bound).boxes[:, 2:].min() >= 99


def test_description_names_every_number():
    rows = describe(v1())
    assert [row[0] for row in rows] == [
        "random resized crop", "grayscale", "colour jitter", "flip", "normalise", "scoring view"
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["1", "0.2", "1", "0.5", "1", "1"]
    told = dict((row[0], row[2]) for row in rows)
    assert "[0.2, 1]" in told["random resized crop"] and "224 x 224" in told["random resized crop"]
    assert "[0.75, 1.333]" in told["random resized crop"]
    assert told["colour jitter"].count("[0.6, 1.4]") == 3
    assert "[-0.4, 0.4] turns" in told["colour jitter"]
    assert "0.485, 0.456, 0.406" in told["normalise"] and "0.225" in told["normalise"]
    assert "256" in told["scoring view"]
    luma = " + ".join(f"{weight:.4g} {name}" for weight, name in zip(LUMA, "RGB", strict=True))
    assert told["grayscale"] == luma
    blur = {row[0]: row for row in describe(v2())}["Gaussian blur"]
    assert blur[1] == "0.5" and "[0.1, 2] pixels" in blur[2]
    assert [row[0] for row in describe(v2())][1:-2] == [
        "colour jitter", "grayscale", "Gaussian blur", "flip"
    ]  # fmt: skip
    third = {row[0]: row for row in describe(v3())}
    assert third["Gaussian blur"][1] == "1 first, 0.1 second"
    assert third["solarize"] == (
        "solarize",
        "0 first, 0.2 second",
        "x becomes 1 - x where x is .5 or more",
    )


def test_description_gives_each_number_its_place():
    order = ("crop", "jitter", "randaugment")
    spec = spec_of(
        size=100, resize=120, order=order, interpolation="bicubic", brightness=0.1, contrast=0.2,
        saturation=0.3, hue=0.05, randaugment=(3, 9, 0.5),
    )  # fmt: skip
    told = {row[0]: row[1:] for row in describe(spec)}
    assert told["colour jitter"][1].startswith(
        "factors uniform: brightness [0.9, 1.1], contrast [0.8, 1.2], saturation [0.7, 1.3], "
        "hue shift [-0.05, 0.05] turns; in random order"
    )
    assert told["random resized crop"][1].endswith("resized to 100 x 100, bicubic, antialiased")
    assert told["scoring view"][1].startswith(
        "short side resized to 120, bicubic, antialiased; centre crop 100 x 100; "
    )
    assert told["randaugment"] == (
        "1/2 each",
        f"3 of {len(RANDOM_OPERATIONS)} operations drawn, magnitude normal (9, 0.5) of 10, "
        "on whole levels",
    )


def test_the_fallback_has_a_pixel_at_least():
    """Where the nearest ratio allowed of a line of pixels is thinner than one."""
    assert draw(spec_of(crop_ratio=(4.0, 5.0)), 3, 50, 1).boxes[:, 2:].tolist() == [[1, 1]] * 3
    assert draw(spec_of(crop_ratio=(0.2, 0.25)), 3, 1, 50).boxes[:, 2:].tolist() == [[1, 1]] * 3
