"""Every kind of image against a conversion that is plain to see."""

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from mocokit.data.decode import BadImage, bounded, decode, reduced_size


def photo(height: int = 48, width: int = 64) -> Image.Image:
    """Smooth, without symmetry, so that lossy codecs and turns both show."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    channels = [x * 255, y * 255, 255 * np.clip(1 - x - y / 2, 0, 1)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def levels() -> np.ndarray:
    return np.linspace(0, 65535, 40 * 30).reshape(40, 30)


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "PPM"])
def test_rgb_of_every_format_equals_pillow(kind: str) -> None:
    content = encoded(photo(), kind)
    pixels = decode(content, None)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(pixels, expected)


def test_a_path_and_its_content_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    photo().save(path)
    np.testing.assert_array_equal(decode(path, None), np.asarray(photo()))
    np.testing.assert_array_equal(decode(str(path), None), decode(path.read_bytes(), None))


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "CMYK"])
def test_other_modes_equal_pillow(mode: str) -> None:
    kind = {"YCbCr": "TIFF", "CMYK": "TIFF"}.get(mode, "PNG")
    content = encoded(photo().convert(mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode(content, None), expected)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_jpeg_show_the_photo(mode: str) -> None:
    pixels = decode(encoded(photo().convert(mode), "JPEG", quality=95), None)
    expected = np.asarray(photo().convert(mode).convert("RGB"))
    assert np.abs(pixels.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_scale(kind: str) -> None:
    image = Image.fromarray(levels().astype(np.uint16))
    pixels = decode(encoded(image, kind), None)
    assert pixels.shape == (40, 30, 3)
    expected = np.rint(levels().astype(np.uint16) / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.stack([expected] * 3, -1))


def test_dark_sixteen_bit_images_stay_dark() -> None:
    image = Image.fromarray(np.full((8, 8), 200, np.uint16))
    assert decode(encoded(image, "TIFF"), None).max() == 1


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floats_are_read_on_the_scale_that_holds_them(top: float) -> None:
    image = Image.fromarray((levels() / 65535 * top).astype(np.float32))
    pixels = decode(encoded(image, "TIFF"), None)
    assert np.abs(pixels[..., 0].astype(float) - levels() / 257).max() <= 0.51


@pytest.mark.parametrize("value", [-1.0, 1e9, float("nan")])
def test_floats_without_a_scale_are_bad(value: float) -> None:
    image = Image.fromarray(np.array([[0, value]], np.float32))
    with pytest.raises(BadImage, match="scale"):
        decode(encoded(image, "TIFF"), None)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_white(kind: str) -> None:
    rgba = np.dstack([np.asarray(photo()), np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = decode(encoded(Image.fromarray(rgba), kind, **options), None)
    assert np.abs(pixels - over_white(rgba)).max() <= 1


def test_gray_with_alpha_lies_on_white() -> None:
    gray_alpha = np.dstack([np.full((4, 5), 100, np.uint8), np.full((4, 5), 51, np.uint8)])
    pixels = decode(encoded(Image.fromarray(gray_alpha, "LA"), "PNG"), None)
    assert pixels.shape == (4, 5, 3)
    assert np.abs(pixels - (0.2 * 100 + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency_lies_on_white(kind: str) -> None:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 3, 4))
    pixels = decode(encoded(image, kind, transparency=0), None)
    assert (pixels[:, :3] == 255).all() and (pixels[:, 3:] == (0, 0, 255)).all()


def test_transparent_colour_of_an_rgb_png_is_white() -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    image.putpixel((0, 0), (1, 2, 3))
    pixels = decode(encoded(image, "PNG", transparency=(10, 20, 30)), None)
    assert (pixels[0, 0] == (1, 2, 3)).all() and (pixels[1:] == 255).all()


def test_transparent_level_of_sixteen_bit_gray_is_white() -> None:
    image = Image.fromarray(np.array([[0, 20000, 20001, 65535]], np.uint16))
    pixels = decode(encoded(image, "PNG", transparency=20000), None)
    assert pixels[0, :, 0].tolist() == [0, 255, 78, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(content, None) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(), kind, exif=exif)
    pixels = decode(content, None)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert pixels.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    if orientation == 6:  # stated without Pillow: the top of the photo is its right side
        plain = np.rot90(np.asarray(photo()), -1).astype(int)
        assert np.abs(plain - pixels).mean() < 5


def test_damaged_exif_leaves_a_good_image() -> None:
    content = encoded(photo(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode(content, None).shape == (48, 64, 3)


@pytest.mark.parametrize(
    "size, bound, expected",
    [
        ((640, 480), 100, (160, 120)),  # short side: 4 x 120
        ((640, 480), 121, (320, 240)),  # by 2, though 3 would do: JPEG decoders know no 3
        ((640, 480), 240, (320, 240)),
        ((640, 480), 241, (640, 480)),
        ((641, 479), 60, (81, 60)),  # by 4 and then 2
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_reduced_by_whole_factors_to_no_less_than_the_bound(
    size: tuple[int, int], bound: int, expected: tuple[int, int], orientation: int, kind: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(photo(size[1], size[0]), kind, exif=exif), bound)
    height, width, _ = pixels.shape
    assert (width, height) == (expected if orientation == 1 else expected[::-1])
    assert min(height, width) >= min(bound, *size)
    whole = photo(size[1], size[0]).resize(expected, Image.Resampling.BOX)
    turned = np.asarray(whole) if orientation == 1 else np.rot90(np.asarray(whole), -1)
    assert np.abs(pixels.astype(int) - turned).mean() < 2


def test_a_jpeg_far_above_the_bound_is_reduced_further_than_the_codec_can() -> None:
    assert decode(encoded(photo(960, 1280), "JPEG"), 30).shape == (30, 40, 3)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 400))
@settings(max_examples=40)
def test_one_size_of_canvas_for_all_formats(height: int, width: int, bound: int) -> None:
    """Boxes are drawn for the canvas: a file and its bare pixels must give the same."""
    image = Image.new("L", (width, height))
    expected = reduced_size(height, width, bound)
    assert decode(encoded(image, "JPEG"), bound).shape[:2] == expected
    assert decode(encoded(image, "PNG"), bound).shape[:2] == expected
    assert bounded(np.zeros((height, width, 3), np.uint8), bound).shape[:2] == expected
    assert min(height, width, bound) <= min(expected) < 2 * bound


def test_a_huge_jpeg_that_the_decoder_reduces_is_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    large = encoded(photo(150, 200), "JPEG")  # 30,000 pixels; of 40,000 Pillow opens none
    assert decode(large, 70).shape == (75, 100, 3)
    for content, bound in ((large, None), (large, 100), (encoded(photo(150, 200), "PNG"), 70)):
        with pytest.raises(BadImage, match="more than 20,000 pixels, refused"):
            decode(content, bound)
    with pytest.raises(BadImage, match="more than 20,000 pixels, refused"):
        decode(encoded(photo(250, 200), "JPEG"), 20)


def test_threads_leave_the_callers_warnings_as_they_are() -> None:
    content = encoded(photo(), "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode(content, None), range(400)))
    assert list(warnings.filters) == before


def test_palettes_and_transparency_are_reduced_as_colours() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 0])
    image.paste(0, (0, 0, 8, 1))
    pixels = decode(encoded(image, "PNG", transparency=0), 4)
    assert pixels.shape == (4, 4, 3) and (pixels[1:] == (200, 100, 0)).all()
    assert np.abs(pixels[0].astype(int) - (228, 178, 128)).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7])
def test_truncated_files_are_bad(kind: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    with pytest.raises(BadImage) as caught:
        decode(content[: int(len(content) * part)], None)
    assert 0 < len(str(caught.value)) < 130 and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"\xff\xd8\xff\xe0" * 30])
def test_what_is_no_image_is_bad(content: bytes) -> None:
    with pytest.raises(BadImage, match="empty" if not content else "not an image|."):
        decode(content, None)


def test_random_damage_raises_nothing_but_bad_image() -> None:
    random = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        content = np.frombuffer(encoded(photo(), kind), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[random.integers(0, min(200, len(content)), 6)] = random.integers(0, 256, 6)
            try:
                pixels = decode(damaged.tobytes(), 32)
            except BadImage:
                continue
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_files_that_cannot_be_opened_are_bad(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="No such file"):
        decode(tmp_path / "gone.jpg", None)
    with pytest.raises(BadImage, match="Is a directory"):
        decode(tmp_path, None)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", __import__("zlib").crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + check + b"\0\0\0\0IDAT" + b"\0" * 20
    )


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused_whether_pillow_warns_or_raises(side: int) -> None:
    with pytest.raises(BadImage, match="decompression bomb"):
        decode(png_header(side, side), 32)


def test_filters_for_warnings_are_left_as_they_were() -> None:
    before = list(warnings.filters)
    decode(encoded(photo(), "PNG"), None)
    with pytest.raises(BadImage):
        decode(b"x", None)
    assert warnings.filters == before
