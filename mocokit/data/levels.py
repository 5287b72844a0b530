"""From the bands of an opened image to 8 bits of RGB: depth, transparency, bands left out."""

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from mocokit.data.formats import open_image

FULL = 65535  # the largest of 16 bits
TOPS = (1, *(2**bits - 1 for bits in range(8, 17)))  # of a scale; 1 is for floats alone
_BITS, _SAMPLES, _EXTRA, _MAXIMUM = 258, 277, 338, 281  # TIFF tags
_MEANING, _PLANES = 262, 284
_SPARE = 1, 2  # ExtraSamples: transparency, multiplied into the colours or not
_OTHER_END = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


class NoScale(ValueError):
    """Levels that the scale does not hold; the text is a short reason."""


def shown(image: ImageFile.ImageFile, content: Any, top: int | None) -> Image.Image:
    """The image in mode RGB: transparency over white, deep levels scaled to 8 bits.

    `top` is the level of all the set's images that becomes 255; without it, each image's container
    says: 16 bits, or, of 32 bits and floats, the least of the usual ranges that holds the image.
    `content` is what the image was opened from. Raises NoScale.
    """
    _check_planes(image)
    deep = _raw_mode(image) if top is not None and top < FULL else ""
    image.load()
    seen: Image.Image = image
    if is_gray(image):
        levels = np.asarray(image)
        gray = _eight_bits(levels, top)
        if image.format == "TIFF" and _tags(image).get(_MEANING) == 0:
            gray = 255 - gray  # 0 is white, which Pillow heeds up to 8 bits
        clear = image.info.get("transparency")
        if isinstance(clear, int):  # a PNG's one level of gray that is not to be seen
            gray[levels == clear] = 255
        return Image.fromarray(gray).convert("RGB")
    if deep:
        assert top is not None
        seen = Image.fromarray(_scaled(_words(image, content, deep), image, top), image.mode)
    if seen.mode == "La":
        seen = seen.convert("LA")
    if image.has_transparency_data and says_transparent(image, content):
        layer = seen.convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return seen if seen.mode == "RGB" else seen.convert("RGB")


def _check_planes(image: ImageFile.ImageFile) -> None:
    """Raises NoScale for what Pillow reads as if its levels had 8 bits, into noise."""
    if image.format == "TIFF" and _tags(image).get(_PLANES) == 2 and _bits(image) > 8:
        raise NoScale(
            f"a TIFF of {_bits(image)} bits with each band in a plane of its own, which is not "
            "read: save it with its bands together"
        )


def is_gray(image: Image.Image) -> bool:
    """Whether Pillow gives one band of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not loaded yet has levels of more than 8 bits in memory."""
    return is_gray(image) or bool(_raw_mode(image))


def highest(image: ImageFile.ImageFile, content: Any) -> tuple[float, int]:
    """The highest level of a deep image, and the bits that its file declares, or 0."""
    bits, scaled = _declared(image, content), 0
    deep = _raw_mode(image)
    image.load()
    levels = np.asarray(image) if is_gray(image) else _words(image, content, deep)[..., :3]
    if levels.dtype.kind != "f" and 8 < bits < 16:
        # PNG asks that levels of fewer bits are spread over all 16; many writers do not.
        low = levels & (2 ** (16 - bits) - 1)
        spread = (low == 0).all() or (low == levels >> bits).all()
        scaled = 16 if spread and levels.max() >= 2**bits else 0
    low_end = float(levels.min())
    return (float(levels.max()) if low_end >= 0 else float("nan")), scaled or bits


def top_for(level: float, bits: int) -> int | None:
    """The least 2**n - 1, n from 8 to 16, that holds a level and as many bits as a file declares.

    None for what has no scale of these: NaN, below zero, above 16 bits.
    """
    if not 0 <= level <= FULL:
        return None
    return int(2 ** max(8, bits, math.ceil(level).bit_length()) - 1)


def left_out(image: ImageFile.ImageFile, content: Any) -> int:
    """How many bands of a file are neither colours nor, as the file says, transparency."""
    bands = len(image.getbands())
    hidden = image.mode in ("RGBA", "LA", "La", "PA") and not says_transparent(image, content)
    if image.format == "TIFF":
        return max(0, int(_tags(image).get(_SAMPLES, bands)) - bands + hidden)
    return int(hidden)


def says_transparent(image: ImageFile.ImageFile, content: Any) -> bool:
    """Whether the file says that its last band is transparency, where a band may be any other."""
    if image.format == "TIFF":
        extra = _tags(image).get(_EXTRA, ())
        return any(one in _SPARE for one in (extra if isinstance(extra, tuple) else (extra,)))
    if image.format == "JPEG2000":
        return image.mode in ("P", "PA") or _channel_is_opacity(bytes(content[: 2**16]))
    if image.format == "TGA":
        return image.mode == "P" or bool(content[17] & 15)
    return image.format != "PSD"  # there it is a mask as often, and colours lie on white


def _tags(image: Any) -> dict[int, Any]:
    tags: dict[int, Any] = image.tag_v2
    return tags


def _channel_is_opacity(head: bytes) -> bool:
    """By a JPEG 2000's box of channel definitions: (channel, type, what for) of 2 bytes each."""
    at = head.find(b"cdef")
    if at < 0:
        return False
    count = int.from_bytes(head[at + 4 : at + 6], "big")
    kinds = (head[at + 8 + 6 * n : at + 10 + 6 * n] for n in range(min(count, 16)))
    return any(kind in (b"\0\1", b"\0\2") for kind in kinds)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How colours of 16 bits lie in the file, of which Pillow keeps the upper 8; or nothing.

    Premultiplied ones (RGBa) are left as Pillow gives them.
    """
    if not image.tile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return ""
    args = image.tile[0][3]
    raw = args if isinstance(args, str) else args[0] if args else ""
    deep = isinstance(raw, str) and raw[-4:-1] == ";16" and not raw.startswith("RGBa")
    return str(raw) if deep else ""


def _words(image: ImageFile.ImageFile, content: Any, raw: str) -> NDArray[np.uint16]:
    """(H, W, C) levels of 16 bits: the upper bytes are loaded, the lower read as if swapped."""
    if raw.startswith("LA"):  # 4 bytes a pixel: both of gray, both of transparency
        four = np.asarray(_again(content, "RGBA")).astype(np.uint16)
        gray, clear = four[..., 0] << 8 | four[..., 1], four[..., 2] << 8 | four[..., 3]
        return np.stack([gray, gray, gray, clear], -1)
    low = np.asarray(_again(content, raw[:-1] + _OTHER_END[raw[-1]]))
    words: NDArray[np.uint16] = np.asarray(image).astype(np.uint16) << 8 | low
    return words


def _again(content: Any, raw: str) -> Image.Image:
    image = open_image(content)
    tiles = []
    for codec, place, offset, args in image.tile:
        changed = raw if isinstance(args, str) or args is None else (raw, *args[1:])
        tiles.append(ImageFile._Tile(codec, place, offset, changed))
    image.tile = tiles
    image.load()
    return image


def _scaled(words: NDArray[np.uint16], image: Image.Image, top: int) -> NDArray[np.uint8]:
    """Colours on the scale; transparency, of which 65,535 is none, as Pillow gives it.

    If it does not exceed the scale anywhere, its writer had the scale in mind there too.
    """
    bands = words.shape[-1]
    scaled = bands - (image.mode == "RGBA" and words[..., -1].max() > top)
    seen = np.array(np.asarray(image))
    seen[..., :scaled] = _eight_bits(words[..., :scaled], top)
    return seen


def _eight_bits(values: NDArray[Any], top: int | None) -> NDArray[np.uint8]:
    """Levels of 16 or 32 bits, or floats, on the scale, or the one that holds them, as 8 bits.

    Pillow's own conversion cuts off at 255, which makes nearly every 16-bit image white.
    """
    levels = values.astype(np.float64)
    low, high = levels.min(), levels.max()
    scale = _usual(values.dtype, high) if top is None else top
    if scale is None or (top is None and not low >= 0):
        raise NoScale(f"gray levels from {low:g} to {high:g} have no known scale")
    if not 0 <= low <= high <= scale:
        bits = f" ({scale.bit_length()} bits)" if scale > 1 else ""
        held = f"0 to {scale:,}{bits}, the range that was found in the other images"
        raise NoScale(f"levels from {low:g} to {high:g} do not fit {held}")
    seen: NDArray[np.uint8] = np.rint(levels * (255.0 / scale)).astype(np.uint8)
    return seen


def _usual(kind: np.dtype[Any], high: float) -> int | None:
    """The least of the usual scales that holds this level; None: there is none."""
    scales = [1, 255, FULL] if kind.kind == "f" else [255, FULL]
    return next((top for top in ([FULL] if kind.itemsize == 2 else scales) if high <= top), None)


def _declared(image: ImageFile.ImageFile, content: Any) -> int:
    """The bits that the file says its levels have, 9 to 16, or 0. A container says nothing."""
    bits = 0
    if image.format == "TIFF":
        tags = _tags(image)
        given, most = _bits(image), tags.get(_MAXIMUM, 0)
        most = max(most) if isinstance(most, tuple) else most
        bits = given if given < 16 else int(most).bit_length()
    elif image.format == "PPM" and image.mode == "I":
        bits = 16  # Pillow stretches what the file declares to that
    elif image.format == "PNG":
        bits = max(_significant(bytes(content[: 2**16])), default=0)
    return bits if 8 < bits <= 16 else 0


def _bits(image: ImageFile.ImageFile) -> int:
    """Of a level in a TIFF."""
    bits = _tags(image).get(_BITS, 0)
    return int(max(bits) if isinstance(bits, tuple) else bits)


def _significant(head: bytes) -> bytes:
    """A PNG's chunk of significant bits, which comes before palette and pixels."""
    at = 8
    while at + 8 <= len(head):
        length, kind = int.from_bytes(head[at : at + 4], "big"), head[at + 4 : at + 8]
        if kind == b"sBIT":
            return head[at + 8 : at + 8 + min(length, 4)]
        if kind in (b"IDAT", b"PLTE"):
            break
        at += length + 12
    return b""
