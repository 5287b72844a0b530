"""Encoded images to RGB pixels, as a viewer shows them and no larger than any crop can use."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from mocokit.data.formats import open_image, refused
from mocokit.data.levels import highest, is_deep, left_out, shown, top_for
from mocokit.files import printable, read_regular, reason_of

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


ALONE = 0  # not a level: the scale of an image that belongs to no data set
_SLOW = ("qoi", "ppm", "ppm_plain", "bmp_rle")  # decoders that Pillow has in Python
_SLOW_PIXELS = 2**24
_MOST_SCANS = 2000  # in a file with all that is embedded; a progressive JPEG has some 10
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


class Look(NamedTuple):
    """What the head of an encoded image says.

    deep: more than 8 bits a level; floats: as fractions; left_out: bands that are neither colours
    nor transparency; orientation: as EXIF numbers it, 5 to 8 exchanging height and width
    """

    kind: str
    height: int
    width: int
    deep: bool
    floats: bool
    left_out: int
    orientation: int


class BadImage(Exception):
    """An image that cannot be turned into pixels; the text is a short reason."""


def read_file(path: str | Path) -> bytes:
    """What a regular file holds; raises BadImage for all else, without waiting for it."""
    try:
        return read_regular(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise BadImage(_reason(error)) from error


def decode(
    source: str | Path | bytes | memoryview, bound: int | None, top: int | None = ALONE
) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a file, or of its content as bytes.

    A larger image is reduced by whole factors as long as its short side stays >= `bound`: to
    `reduced_size`, whatever its format. `top` is the level that becomes 255 in images of more than
    8 bits, as `levels.shown` has it. Without it, a file is taken for a whole data set, unless it
    reaches no more than 255 of 16 bits, as a dark image does. Raises BadImage.
    """
    try:
        content = source if isinstance(source, bytes | memoryview) else read_file(source)
        with _opened(content) as image:
            if top == ALONE:
                top = _own_top(content) if is_deep(image) else None
            return _pixels(image, content, bound, top)
    except BadImage:
        raise
    except Exception as error:
        # Pillow's plugins answer damaged content with nearly every type of exception.
        raise BadImage(_reason(error)) from error


@contextmanager
def _opened(content: bytes | memoryview | IO[bytes]) -> Iterator[ImageFile.ImageFile]:
    """An image that is not loaded yet; raises BadImage for files that are none."""
    if isinstance(content, bytes | memoryview) and not content:
        raise BadImage("the file is empty")
    with _quiet:
        try:
            image = open_image(content)
        except UnidentifiedImageError:
            raise BadImage(_unknown(content)) from None
        with image:
            yield image


def _unknown(content: bytes | memoryview | IO[bytes]) -> str:
    if not isinstance(content, bytes | memoryview):
        content.seek(0)
        content = content.read(64)
    if kind := refused(bytes(content[:64])):
        return f"it is {kind}, which is not opened: convert it to PNG or JPEG"
    return "not an image, or of a kind that is not read here: convert it to PNG or JPEG"


def _pixels(
    image: ImageFile.ImageFile, content: bytes | memoryview, bound: int | None, top: int | None
) -> NDArray[np.uint8]:
    if bound is not None:
        # JPEG only: the decoder skips the high frequencies, by a factor of 2, 4 or 8.
        image.draft(None, (bound, bound))
    check_size(image)
    _check_scans(content)
    turned = shown(image, content, top)
    turn = _TURNS.get(_orientation(image))
    turned = _reduced(turned, bound)
    return np.array(turned if turn is None else turned.transpose(turn))


def check_size(image: ImageFile.ImageFile) -> None:
    """Raises BadImage for an image that would take too much memory, or minutes."""
    pixels = image.width * image.height
    # Of twice as many Pillow itself opens none.
    if pixels > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
        raise BadImage(_bomb())
    if pixels > _SLOW_PIXELS and image.tile and image.tile[0][0] in _SLOW:
        raise BadImage(f"more than {_SLOW_PIXELS:,} pixels in a form that is decoded one by one")


def _check_scans(content: bytes | memoryview) -> None:
    """Each scan of a progressive JPEG goes over all pixels, and needs a few bytes in the file."""
    if bytes(content[:2]) == b"\xff\xd8":
        scans = bytes(content).count(b"\xff\xda")
        if scans > _MOST_SCANS:
            raise BadImage(f"a JPEG of {scans:,} scans, refused: it would take minutes")


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


def look_at(content: bytes | memoryview | IO[bytes]) -> Look:
    """What an encoded image is, by its head; raises BadImage. A file is read as far as needed."""
    try:
        with _opened(content) as image:
            bands = left_out(image, content) if isinstance(content, bytes | memoryview) else 0
            size = image.height, image.width
            kind, floats = image.format or "?", image.mode == "F"
            return Look(kind, *size, is_deep(image), floats, bands, _orientation(image))
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(error)) from error


def _own_top(content: bytes | memoryview) -> int | None:
    top = top_for(*highest_of(content))
    return top if top is not None and top > 255 else None


def highest_of(content: bytes | memoryview) -> tuple[float, int]:
    """The highest level of an image of more than 8 bits, and the bits that it declares, or 0."""
    try:
        with _opened(content) as image:
            check_size(image)
            return highest(image, content)
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(_reason(error)) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # A viewer shows an image whose EXIF block is damaged, unturned.
        return 1


def _bomb() -> str:
    return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, refused as a decompression bomb"


def _reason(error: Exception) -> str:
    """A line that a person understands; what a file wrote into it cannot end the line."""
    if isinstance(error, Image.DecompressionBombError):
        return _bomb()
    if isinstance(error, KeyError):  # of a plugin's table of varieties
        return f"of a variety that Pillow cannot read ({printable(repr(error)[:80])})"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return printable(reason_of(error)) or type(error).__name__
