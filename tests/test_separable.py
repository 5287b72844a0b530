"""Crops against PIL, blur against a Gaussian in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFilter
from reference_views import crop_exact, crop_levels, gaussian, picture

from mocokit.views import separable
from mocokit.views.canvases import enlarge_boxes, enlarges
from mocokit.views.separable import crop_boxes, crop_resize, gaussian_blur, resize_window

LEVEL = 1 / 255


def planes(canvas):
    return torch.from_numpy(canvas).permute(2, 0, 1)


# PIL rounds twice, after the columns and after the rows; a row of the cubic's weights has an
# absolute sum of up to 1.25.
ROUNDED = {"bilinear": 1.002, "bicubic": 1.13}
both_kinds = pytest.mark.parametrize("kind", ROUNDED)


def of_noise(name, height, width):
    draw = np.random.default_rng(1)
    if name == "picture":
        return picture(height, width)
    if name == "bright":
        return (255 - draw.integers(0, 20, (height, width, 3))).astype(np.uint8)
    return (255 * draw.integers(0, 2, (height, width, 3))).astype(np.uint8)


@both_kinds
@pytest.mark.parametrize("name", ["picture", "bright", "black and white"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_half_products_are_right_to_a_quarter_of_a_level(device, name, kind):
    canvas = of_noise(name, 300, 400)
    boxes = np.array([[0, 0, 300, 400], [0, 0, 99, 140], [20, 30, 224, 224], [9, 50, 63, 90]])
    images = planes(canvas)[None].expand(len(boxes), -1, -1, -1).to(device)
    flip = np.array([False, True, False, True])
    double = crop_boxes(images.double() / 255, boxes, 96, flip, kind)
    half = crop_boxes(images, boxes, 96, flip, kind, half=True if device == "cpu" else None)
    assert half.dtype == torch.float32 and not torch.equal(half, double.float())
    error = (half - double).abs() / LEVEL
    assert error.max() < 0.25 and error.mean() < 0.02
    sizes, resized = np.array([[300, 400]] * 4), np.array([[120, 160]] * 4)
    corner = np.array([[0, 0], [10, 20], [24, 64], [3, 60]])
    double = resize_window(images.double() / 255, sizes, resized, corner, 96, kind)
    half = resize_window(images, sizes, resized, corner, 96, kind, half=True)
    error = (half - double).abs() / LEVEL
    assert error.max() < 0.25 and error.mean() < 0.02


@pytest.mark.parametrize("level", [0, 1, 100, 128, 255])
@both_kinds
def test_half_products_leave_uniform_images_uniform(level, kind):
    images = torch.full((3, 3, 70, 80), level, dtype=torch.uint8)
    boxes = np.array([[3, 60, 67, 11], [0, 0, 1, 1], [0, 0, 70, 80]])
    crops = crop_boxes(images, boxes, 33, np.array([True, False, True]), kind, half=True)
    assert (crops - level / 255).abs().max() < 0.07 * LEVEL


def check_crops(canvas, boxes, size, kind):
    boxes = np.array(boxes)
    images = planes(canvas)[None].expand(len(boxes), -1, -1, -1)
    straight = np.zeros(len(boxes), bool)
    ours = crop_boxes(images, torch.from_numpy(boxes), size, torch.from_numpy(straight), kind)
    exact = torch.stack([crop_exact(canvas, box, size, kind) for box in boxes])
    rounded = torch.stack([crop_levels(canvas, box, size, kind) for box in boxes])
    assert ours.shape == (len(boxes), 3, size, size) and ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5
    assert (ours - rounded).abs().max() < ROUNDED[kind] * LEVEL
    halved = crop_boxes(images, boxes, size, straight, kind, half=True)
    double = crop_boxes(images.double() / 255, boxes, size, straight, kind)
    assert halved.dtype == torch.float32 and halved.min() >= 0 and halved.max() <= 1
    error = (halved - double).abs() / LEVEL
    assert error.max() < 0.25 and error.mean() < 0.02
    return ((ours * 255).round() - rounded * 255).abs().mean()


@both_kinds
@pytest.mark.parametrize("size", [8, 32, 224])
def test_crops_are_pils_enlarging_and_shrinking(size, kind):
    height, width = 150, 260
    boxes = [
        (0, 0, height, width),
        (10, 20, 32, 32),
        (10, 20, 130, 17),
        (0, 0, 40, 60),
        (height - 40, width - 60, 40, 60),
        (0, width - 1, height, 1),
        (height - 1, 0, 1, width),
        (0, 0, 1, 1),
        (height - 1, width - 1, 1, 1),
        (70, 90, 2, 3),
        (3, 5, 8, 224),
    ]
    assert check_crops(picture(height, width), boxes, size, kind) < 0.3


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_box_of_any_image(data):
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    tall = data.draw(st.integers(1, height - top))
    wide = data.draw(st.integers(1, width - left))
    size = data.draw(st.integers(1, 70))
    canvas = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    check_crops(canvas, [(top, left, tall, wide)], size, data.draw(st.sampled_from([*ROUNDED])))


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_enlarged_boxes_are_the_same_crops(data):
    """As the dense product's in float64, and as PIL's on the box alone; also of one pixel."""
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    size = data.draw(st.integers(max(height, width), 70))
    canvas = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1)]
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    tall, wide = (data.draw(st.integers(1, most)) for most in (height - top, width - left))
    boxes = np.array([*boxes, (top, left, tall, wide)] * 2)
    flip = np.array([False] * 3 + [True] * 3)
    images = planes(canvas)[None].expand(6, -1, -1, -1)
    assert enlarges(images, size, "bilinear") and not enlarges(images, size, "bicubic")
    assert not enlarges(images, max(height, width) - 1, "bilinear")
    ours = enlarge_boxes(images, boxes, size, flip)
    double = crop_boxes(images.double() / 255, boxes, size, flip)
    assert ours.dtype == torch.float32 and ours.shape == double.shape
    assert (ours - double).abs().max() < 1e-5
    exact = torch.stack([crop_exact(canvas, box, size, "bilinear") for box in boxes[:3]])
    assert (ours[:3] - exact).abs().max() < 1e-5
    assert (ours[3:] - exact.flip(-1)).abs().max() < 1e-5


def test_flip_mirrors_the_crop():
    images = planes(picture(40, 50))[None].expand(2, -1, -1, -1)
    boxes = np.array([[3, 4, 30, 20]] * 2)
    straight, mirrored = crop_resize(images, boxes, 16, np.array([False, True]))
    assert torch.equal(mirrored, straight.flip(-1))
    assert not torch.equal(mirrored, straight)


def test_nothing_beyond_the_box_is_seen():
    box = np.array([[5, 6, 12, 9]])
    canvas = picture(30, 30)
    other = 255 - canvas
    other[5:17, 6:15] = canvas[5:17, 6:15]
    crops = [
        crop_resize(planes(image)[None], box, 16, np.array([False])) for image in (canvas, other)
    ]
    assert torch.equal(*crops)


def test_kinds_of_images_and_of_numbers_agree():
    canvas = picture(40, 50)
    boxes, flip = np.array([[3, 4, 30, 20]]), np.array([True])
    levels = planes(canvas)[None]
    ours = crop_resize(levels, boxes, 16, flip)
    single = crop_resize(levels.float() / 255, boxes, 16, flip)
    double = crop_resize(levels.double() / 255, torch.from_numpy(boxes), 16, torch.tensor(flip))
    half = crop_resize(levels.bfloat16() / 255, boxes, 16, flip)
    assert (ours.dtype, single.dtype, half.dtype) == (torch.float32,) * 3
    assert double.dtype == torch.float64
    assert (ours - double).abs().max() < 1e-6 and (single - double).abs().max() < 1e-6
    assert (half - double).abs().max() < 1e-2
    # A whole image at its own size is itself, in double precision to the bit.
    whole = np.array([[0, 0, 40, 40]])
    square = levels[..., :40].double()
    assert torch.equal(crop_resize(square, whole, 40, np.array([False])), square)


def test_wrong_shapes_are_refused():
    images, boxes, flip = torch.zeros(2, 3, 8, 8), np.zeros((2, 4)), np.zeros(2, bool)
    with pytest.raises(ValueError, match="boxes"):
        crop_resize(images, boxes[:1], 4, flip)
    with pytest.raises(ValueError, match="flip"):
        crop_resize(images, boxes, 4, flip[:1])
    with pytest.raises(ValueError, match="images"):
        crop_resize(images[0], boxes, 4, flip)
    with pytest.raises(ValueError, match="sigma"):
        gaussian_blur(images, np.zeros(1))


def test_window_of_a_full_resize():
    canvas = picture(60, 90)
    padded = np.zeros((70, 95, 3), np.uint8)
    padded[:60, :90] = canvas
    whole = np.asarray(Image.fromarray(canvas).resize((48, 32), Image.Resampling.BILINEAR))
    ours = resize_window(
        planes(padded)[None],
        np.array([[60, 90]]), np.array([[32, 48]]), np.array([[5, 11]]), 24,
    )  # fmt: skip
    expected = planes(whole[5:29, 11:35].astype(np.float32)) / 255
    assert (ours[0] - expected).abs().max() <= 1.001 * LEVEL


SIGMAS = np.array([0.0, 0.1, 0.3, 0.5, 1.0, 1.37, 2.0, 3.5])


def both_ways(images, sigma, monkeypatch):
    for side in (0, 10**6):
        monkeypatch.setattr(separable, "DENSE_SIDE", side)
        yield gaussian_blur(images, sigma)


@pytest.mark.parametrize("height, width", [(96, 70), (32, 32), (5, 9), (1, 3)])
def test_blur_is_a_gaussian(height, width, monkeypatch):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 2, (len(SIGMAS), 3, height, width)).astype(np.float64)
    pairs = zip(images, SIGMAS, strict=True)
    expected = np.stack([gaussian(image, sigma) if sigma else image for image, sigma in pairs])
    for single in both_ways(torch.from_numpy(images).float(), SIGMAS, monkeypatch):
        # Cutting at four sigma is what remains; black-and-white noise is the worst case.
        assert np.abs(single.numpy() - expected).max() < 0.05 * LEVEL
        assert torch.equal(single[0], torch.from_numpy(images[0]).float())
    one, other = both_ways(torch.from_numpy(images), torch.from_numpy(SIGMAS), monkeypatch)
    assert one.dtype == other.dtype == torch.float64
    assert (one - other).abs().max() < 1e-12


def test_blur_of_one_image_does_not_depend_on_its_neighbours(monkeypatch):
    images = torch.rand(len(SIGMAS), 3, 40, 40, generator=torch.Generator().manual_seed(0))
    for together in both_ways(images, SIGMAS, monkeypatch):
        for row, sigma in enumerate(SIGMAS):
            per_image = gaussian_blur(images[row : row + 1], np.array([sigma]))
            assert (per_image[0] - together[row]).abs().max() < 1e-6
    before = images.clone()
    gaussian_blur(images, SIGMAS)
    assert torch.equal(images, before)


def test_blur_beside_pils():
    # PIL stands a Gaussian in by three box blurs on whole levels: close, not equal.
    canvas = picture(96, 96)
    for sigma, most, mean in ((0.3, 25, 4), (0.5, 5, 1), (1.0, 8, 1), (1.5, 12, 1), (2.0, 12, 1)):
        theirs = np.asarray(Image.fromarray(canvas).filter(ImageFilter.GaussianBlur(sigma)))
        ours = gaussian_blur(planes(canvas)[None].float(), np.array([sigma]))[0]
        difference = (ours - planes(theirs.astype(np.float32))).abs()
        assert difference.max() < most and difference.mean() < mean, sigma


@pytest.mark.parametrize("level", [0, 1, 77, 255])
def test_uniform_images_stay_uniform(level):
    images = torch.full((2, 3, 70, 80), level, dtype=torch.uint8)
    boxes = np.array([[3, 60, 67, 11], [0, 0, 1, 1]])
    crops = crop_resize(images, boxes, 100, np.array([True, False]))
    assert (crops - level / 255).abs().max() < 1e-6
    assert (gaussian_blur(crops, np.array([2.0, 0.3])) - level / 255).abs().max() < 1e-6
