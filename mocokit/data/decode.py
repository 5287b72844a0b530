"""Encoded images to RGB pixels, as a viewer shows them and no larger than any crop can use."""

import io
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mocokit.files import read_regular

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


MAX_BYTES = 2**30  # of an encoded image; Pillow's limit of pixels holds for what is inside


class _Quiet:
    """Ignores warnings while any thread is inside: Pillow warns of harmless oddities.

    `warnings.catch_warnings` alone, in two threads at once, can leave them ignored for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.__exit__(None, None, None)


_quiet = _Quiet()


class BadImage(Exception):
    """An image that cannot be turned into pixels; the text is a short reason."""


def read_file(path: str | Path) -> bytes:
    """What a regular file holds; raises BadImage for all else, without waiting for it."""
    try:
        return read_regular(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise BadImage(_reason(error)) from error


def decode(source: str | Path | bytes | memoryview, bound: int | None) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a file, or of its content as bytes.

    A larger image is reduced by whole factors as long as its short side stays >= `bound`: to
    `reduced_size`, whatever its format.
    """
    try:
        content = source if isinstance(source, bytes | memoryview) else read_file(source)
        if not content:
            raise BadImage("the file is empty")
        with _quiet, Image.open(io.BytesIO(content)) as image:
            return _pixels(image, bound)
    except BadImage:
        raise
    except Exception as error:
        # Pillow's plugins answer damaged content with nearly every type of exception.
        raise BadImage(_reason(error)) from error


def _pixels(image: Image.Image, bound: int | None) -> NDArray[np.uint8]:
    if bound is not None:
        # JPEG only: the decoder skips the high frequencies, by a factor of 2, 4 or 8.
        image.draft(None, (bound, bound))
    # Of twice as many Pillow itself opens none.
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
        raise BadImage(_bomb())
    image.load()
    turn = _TURNS.get(_orientation(image))
    shown = _reduced(_rgb(image), bound)
    if turn is not None:
        shown = shown.transpose(turn)
    return np.array(shown)


def bounded(pixels: NDArray[np.uint8], bound: int | None) -> NDArray[np.uint8]:
    """Pixels (H, W, 3), reduced as those of a file are."""
    if bound is None or min(pixels.shape[:2]) // bound < 2:
        return pixels.copy()
    return np.array(_reduced(Image.fromarray(pixels), bound))


def reduced_size(height: int, width: int, bound: int | None) -> tuple[int, int]:
    """Of the canvas of an image of this height and width."""
    while factor := _factor(min(height, width), bound):
        height, width = -(-height // factor), -(-width // factor)
    return height, width


def _factor(short: int, bound: int | None) -> int | None:
    """By how much to reduce next: 8, 4, 2, or not at all.

    A JPEG decoder's factors, so that an image has one size in every format.
    """
    return None if bound is None else next((f for f in (8, 4, 2) if short // bound >= f), None)


def _reduced(image: Image.Image, bound: int | None) -> Image.Image:
    while factor := _factor(min(image.size), bound):
        image = image.reduce(factor)
    return image


def look_at(content: bytes) -> tuple[str, int, int]:
    """Format, height and width of an encoded image, by its head; raises BadImage."""
    try:
        with _quiet, Image.open(io.BytesIO(content)) as image:
            return image.format or "?", image.height, image.width
    except Exception as error:
        raise BadImage(_reason(error)) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # A viewer shows an image whose EXIF block is damaged, unturned.
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB: transparency over white, deep pixels scaled to 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.asarray(image)
        seen = _eight_bits(levels)
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # a PNG's one level of gray that is not to be seen
            seen[levels == clear] = 255
        image = Image.fromarray(seen)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Gray levels (H, W) of 16 or 32 bits, or floats, on the scale that holds them: 8 bits.

    Pillow's own conversion cuts off at 255, which makes nearly every 16-bit image white.
    """
    levels = values.astype(np.float64)
    low, high = levels.min(), levels.max()
    scales = [1.0, 255.0, 65535.0] if values.dtype.kind == "f" else [255.0, 65535.0]
    if values.dtype.itemsize == 2:
        scales = [65535.0]
    scale = next((scale for scale in scales if high <= scale), None)
    if scale is None or not low >= 0:
        raise BadImage(f"gray levels from {low:g} to {high:g} have no known scale")
    return np.rint(levels * (255.0 / scale)).astype(np.uint8)


def _bomb() -> str:
    return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, refused as a decompression bomb"


def _reason(error: Exception) -> str:
    """A line that a person understands."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a kind that Pillow cannot read"
    if isinstance(error, Image.DecompressionBombError):
        return _bomb()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:120]
    return text or type(error).__name__
