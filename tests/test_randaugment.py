"""RandAugment against timm's own operations, which are PIL's, image by image."""

import numpy as np
import pytest
import torch
from gpus import waiting_is_an_error
from PIL import Image
from reference_views import flat, levels as levels_of, picture, spec_of
from scipy import stats
from test_params import draw, same
from timm.data.auto_augment import _RAND_TRANSFORMS, LEVEL_TO_ARG, NAME_TO_OP

from mocokit.views.params import RANDOM_OPERATION, RANDOM_OPERATIONS, draw_table
from mocokit.views.randaugment import _gray, randaugment
from mocokit.views.sheet import _random_words
from mocokit.views.views import make_views

FILL = (0.485, 0.456, 0.406)
KINDS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
GOLDEN = [[-1, 7], [-1, -1], [-1, 9], [0, 7], [-1, 4], [7, 4]]
AMOUNTS = [0.0, 1.9, 0.0, 0.0, 0.0, 1.9, 0.0, 1.7531137, 0.0, 4.0, 1.9, 3.0]
BICUBIC = [False, False, True, False, False, True, True, True, True, True, False, True]
INFOMIN = {"order": ("crop", "flip", "jitter", "blur", "randaugment", "grayscale")}


def timms(name):
    found = {one.lower().removesuffix("rel"): one for one in _RAND_TRANSFORMS}
    return found[name.replace(" ", "")]


def oracle(image, drawn):
    """(H, W, 3) uint8 under what was drawn, (L,)."""
    view = Image.fromarray(image)
    colour = tuple(round(255 * part) for part in FILL)
    for number, amount, bicubic in drawn.tolist():
        if number >= 0:
            name = timms(RANDOM_OPERATIONS[number])
            whole = name in ("Posterize", "Solarize", "SolarizeAdd")
            arguments = (int(amount) if whole else amount,) if LEVEL_TO_ARG[name] else ()
            view = NAME_TO_OP[name](view, *arguments, fillcolor=colour, resample=KINDS[bicubic])
    return np.asarray(view)


def ours(images, drawn):
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255).contiguous()
    randaugment(tensor, drawn, FILL)
    whole = tensor * 255
    assert (
        (whole - whole.round()).abs().max() < 1e-3 and (tensor >= 0).all() and (tensor <= 1).all()
    )
    return whole.round().permute(0, 2, 3, 1).numpy().astype(int)


def one_of(name, amounts, bicubic=False):
    drawn = np.zeros((len(amounts), 1), RANDOM_OPERATION)
    drawn["operation"], drawn["bicubic"] = RANDOM_OPERATIONS.index(name), bicubic
    drawn["amount"][:, 0] = amounts
    return drawn


def odd_images(height=23, width=31):
    draw_ = np.random.default_rng(0)
    dark = draw_.integers(90, 121, (height, width, 3), dtype=np.uint8)
    black_white = (255 * draw_.integers(0, 2, (height, width, 3))).astype(np.uint8)
    flat_ = np.full((height, width, 3), 77, np.uint8)
    half = np.where(np.arange(width)[:, None] < 3, 200, 10) + np.zeros((height, 1, 3), int)
    steps = np.arange(height * width * 3).reshape(height, width, 3) % 256
    odd = [picture(height, width), dark, black_white, flat_, half, steps]
    return [image.astype(np.uint8) for image in odd]


def test_the_operations_are_timms_without_inc():
    assert [timms(name) for name in RANDOM_OPERATIONS] == _RAND_TRANSFORMS


RANGES = {
    "rotate": (-30, 30), "posterize": (1, 4), "solarize": (0, 256), "solarize add": (0, 110),
    "shear x": (-0.3, 0.3), "shear y": (-0.3, 0.3), "translate x": (-0.45, 0.45),
    "translate y": (-0.45, 0.45),
}  # fmt: skip
MOVES = ("rotate", "shear x", "shear y", "translate x", "translate y")
BLENDS = ("color", "contrast", "brightness", "sharpness")


@pytest.mark.parametrize("name", RANDOM_OPERATIONS)
def test_each_operation_is_pils(name):
    low, high = RANGES.get(name, (0.1, 1.9))
    images = [image for image in odd_images() for _ in range(12)]
    amounts = np.linspace(low, high, len(images))[np.random.default_rng(0).permutation(len(images))]
    amounts[:6] = [low, high, low, high, (low + high) / 2, (low + high) / 2]
    if name in ("posterize", "solarize", "solarize add"):
        amounts = np.floor(amounts)
    for bicubic in (False, True) if name in MOVES else (False,):
        drawn = one_of(name, amounts, bicubic)
        expected = np.stack([oracle(*pair) for pair in zip(images, drawn, strict=True)])
        difference = np.abs(ours(images, drawn) - expected)
        # PIL blends and interpolates in single precision and cuts: a last bit is a level.
        most = 1 if name in MOVES + BLENDS else 0
        assert difference.max() <= most and (difference > 0).mean() < 1e-3
        assert name in ("posterize",) or (expected != np.stack(images)).any()


def test_no_bits_are_black():
    """As they were in PIL, which refuses them by now; only magnitudes below 2.5 ask for it."""
    assert (ours(odd_images(), one_of("posterize", [0.0] * 6)) == 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (40, 3)])
def test_tiny_images(shape):
    images = [picture(*shape, seed) for seed in range(len(RANDOM_OPERATIONS))]
    drawn = np.zeros((len(images), 1), RANDOM_OPERATION)
    drawn["operation"][:, 0] = np.arange(len(images))
    drawn["amount"] = 1.0
    expected = np.stack([oracle(*pair) for pair in zip(images, drawn, strict=True)])
    assert np.abs(ours(images, drawn) - expected).max() <= 1


def test_gray_is_pils_to_the_level():
    colours = np.random.default_rng(0).integers(0, 256, (300, 1000, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    tensor = torch.from_numpy(colours).permute(2, 0, 1)[None].float()
    assert (_gray(tensor)[0, 0].numpy() == expected).all()


def test_views_are_rounded_first_and_others_stay_to_the_bit():
    between = torch.rand(15, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    drawn = np.zeros((15, 2), RANDOM_OPERATION)
    drawn["operation"] = [[number, -1] for number in range(15)]
    drawn["amount"] = 1.0
    drawn["operation"][4:6] = -1
    whole, ours = (255 * between).round() / 255, between.clone()
    randaugment(ours, drawn, FILL)
    randaugment(whole, drawn, FILL)
    assert torch.equal(ours[4:6], between[4:6])
    changed = [row for row in range(15) if row not in (4, 5)]
    assert torch.equal(ours[changed], whole[changed])


def test_a_mean_beyond_white_fills_with_white():
    """As in timm, which takes at most 255; whatever comes next finds a level."""
    spec = spec_of(**INFOMIN, size=16, resize=16, mean=(1.2, 0.5, -0.1))
    drawn = one_of("rotate", [30.0] * 2)
    drawn = np.concatenate([drawn, one_of("equalize", [0.0] * 2)], axis=1)
    images = torch.full((2, 3, 16, 16), 0.5)
    randaugment(images, drawn, spec.mean)
    assert (255 * images[:, :, 0, 0]).round().tolist() == [[255, 128, 0]] * 2


def test_whole_views_replay():
    """Whole images at their own size, so that what RandAugment is given is in whole levels."""
    spec = spec_of(
        size=32, resize=32, order=("crop", "randaugment"), crop_area=(1, 1), crop_ratio=(1, 1),
        randaugment=(3, 9.0, 1.0), mean=FILL,
    )  # fmt: skip
    canvases = [picture(32, 32, seed) for seed in range(200)]
    pixels, heights, widths = flat(canvases)
    table = draw_table(spec, 3, 1, np.arange(200), 1, heights, widths)
    made = levels_of(spec, make_views(spec, table, pixels, heights, widths, "cpu"))
    expected = np.stack([oracle(*pair) for pair in zip(canvases, table.randaugment, strict=True)])
    difference = np.abs(made.permute(0, 2, 3, 1).numpy() - expected)
    # A level that falls to the other side of a cut may be stretched by what follows.
    assert difference.max() < 20 and (difference > 0.01).mean() < 2e-3
    still = (table.randaugment["operation"] < 0).all(1)
    assert 10 < still.sum() < 50 and (difference[still] < 1e-3).all()


def test_draws_are_timms_in_distribution():
    spec = spec_of(**INFOMIN, randaugment=(3, 5.0, 1.0))
    drawn = draw(spec).randaugment
    assert drawn.shape == (100_000, 3)
    for layer in drawn.T:
        counts = np.bincount(layer["operation"] + 1, minlength=16)
        assert stats.binomtest(int(counts[0]), 100_000, 0.5).pvalue > 1e-3
        assert stats.chisquare(counts[1:]).pvalue > 1e-3
        assert abs(layer["bicubic"].mean() - 0.5) < 0.01
    pairs = np.histogram2d(*drawn["operation"].T[:2], bins=16)[0]
    assert stats.chi2_contingency(pairs).pvalue > 1e-3
    for name in ("rotate", "shear x", "translate y", "color", "sharpness"):
        amount = drawn["amount"][drawn["operation"] == RANDOM_OPERATIONS.index(name)]
        level, sign = np.abs(amount), amount < 0
        turned = LEVEL_TO_ARG[timms(name)](10.0, {})[0]
        level = (level - 0.1) / 0.18 if name in BLENDS else 10 * level / abs(turned)
        assert stats.kstest(level, "norm", args=(5, 1)).pvalue > 1e-3, name
        assert name in BLENDS or stats.binomtest(int(sign.sum()), len(sign)).pvalue > 1e-3
    moved = drawn[np.isin(drawn["operation"], [RANDOM_OPERATIONS.index(name) for name in MOVES])]
    level = np.select(
        [moved["operation"] == RANDOM_OPERATIONS.index(name) for name in MOVES],
        [np.abs(moved["amount"]) / RANGES[name][1] for name in MOVES],
    )
    # How far a magnitude lies from its mean tells nothing of the others either.
    columns = [moved["amount"] < 0, moved["bicubic"], level, np.abs(level - 0.5)]
    correlation = np.corrcoef(np.stack([*columns, moved["operation"]]).astype(float))
    assert np.abs(correlation[~np.eye(5, dtype=bool)]).max() < 4.5 / np.sqrt(len(moved))
    assert not same([drawn], [draw(spec, view=1).randaugment])
    assert not same([drawn], [draw(spec, epoch=3).randaugment])


@pytest.mark.parametrize("magnitude", [0.0, 5.0, 7.3, 10.0])
def test_arguments_are_timms(magnitude):
    drawn = draw(spec_of(**INFOMIN, randaugment=(3, magnitude, 0.0)), 3000).randaugment.ravel()
    for number, name in enumerate(RANDOM_OPERATIONS):
        amounts = np.abs(drawn["amount"][drawn["operation"] == number])
        function = LEVEL_TO_ARG[timms(name)]
        arguments = function(magnitude, {}) if function else 0
        # timm gives some as a number, some as a tuple of one.
        expected = abs(arguments[0] if isinstance(arguments, tuple) else arguments)
        assert len(amounts) > 100 and np.abs(amounts - expected).max() < 1e-12, name


def test_off_by_default_and_no_other_draw_moves():
    plain = draw(spec_of(order=INFOMIN["order"][:4] + ("grayscale",)), 1000)
    full = draw(spec_of(**INFOMIN), 1000)
    assert plain.randaugment.shape == draw(spec_of(), 10).randaugment.shape[:0] + (1000, 0)
    for name in plain._fields:
        if name != "randaugment":
            assert np.array_equal(getattr(plain, name), getattr(full, name))
    with pytest.raises(ValueError, match="flip before randaugment"):
        spec_of(order=("crop", "randaugment", "flip"))
    for wrong in ((4, 10, 0.5), (0, 10, 0.5), (2, 11, 0.5), (2, 10, -1)):
        with pytest.raises(ValueError, match="randaugment"):
            spec_of(randaugment=wrong)


def test_golden_draws():
    """A change of these numbers changes every recorded run."""
    table = draw_table(spec_of(**INFOMIN), 0, 0, range(6), 1, [32] * 6, [32] * 6)
    assert table.randaugment["operation"].tolist() == GOLDEN
    assert table.randaugment["amount"].ravel() == pytest.approx(AMOUNTS, abs=1e-6)
    assert table.randaugment["bicubic"].ravel().tolist() == BICUBIC


def test_the_sheet_names_what_was_drawn():
    drawn = np.array([(3, -12.5, True), (-1, 0, False), (0, 0, True)], RANDOM_OPERATION)
    assert _random_words(drawn) == ["rotate -12.5", "autocontrast"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_cpus_levels_and_never_waits():
    images = torch.from_numpy(np.stack([picture(40, 40, seed) for seed in range(256)]))
    images = images.permute(0, 3, 1, 2).float().div(255).contiguous()
    drawn = draw(spec_of(**INFOMIN), 256).randaugment
    theirs = images.cuda()
    randaugment(theirs.clone(), drawn, FILL)
    with waiting_is_an_error():
        randaugment(theirs, drawn, FILL)
    randaugment(images, drawn, FILL)
    difference = (255 * (theirs.cpu() - images)).abs()
    assert difference.max() < 20 and (difference > 0.01).float().mean() < 2e-3
