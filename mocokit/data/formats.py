"""The one way to open an image: which of Pillow's formats are ever tried, chosen by content alone.

Left out, though Pillow registers them (13.0, each plugin was read): EPS and PS start Ghostscript;
WMF and EMF ask the system to draw; IPTC and DCX and FPX and MIC open another image inside, of any
format; BUFR, GRIB, HDF5 and MPEG decode nothing; FITS unpacks gzip pixel by pixel, for minutes; IM,
IMT, PCD, SPIDER, MCIDAS and XPM are guessed from a text or a few numbers; BLP, FTEX, GBR, FLI,
CUR, DDS, MSP, XBM, PIXAR and XVTHUMB hold textures, brushes, cursors, films, bits or previews.
"""

import functools
import importlib
import io
import logging
import os
from typing import IO

from PIL import Image, ImageFile

# What is wrong with a file is said once, as the reason of a bad image; Pillow would write it too.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# What each is opened by, in the order that they are tried; a JPEG with several pictures is an MPO.
_PLUGINS = {
    "JPEG": "Jpeg",
    "PNG": "Png",
    "WEBP": "WebP",
    "GIF": "Gif",
    "BMP": "Bmp",
    "TIFF": "Tiff",
    "PPM": "Ppm",
    "JPEG2000": "Jpeg2K",
    "AVIF": "Avif",
    "ICO": "Ico",
    "DIB": "Bmp",
    "PCX": "Pcx",
    "SGI": "Sgi",
    "SUN": "Sun",
    "QOI": "Qoi",
    "PSD": "Psd",
}
_TGA = "TGA"  # has no mark at its beginning, so Pillow would take many a file for one
_TGA_HEADER, _TGA_END = 18, b"TRUEVISION-XFILE.\0"
# Pixels of each kind: with a palette, in colours, in gray; run-length coded ones are 8 more.
_TGA_DEPTHS = {1: (8,), 2: (16, 24, 32), 3: (8, 16)}


def open_image(source: bytes | memoryview | IO[bytes]) -> ImageFile.ImageFile:
    """An encoded image, of which the head alone was read. It decides what it is, never a name.

    Raises whatever a plugin of Pillow raises, and UnidentifiedImageError for all other formats.
    """
    file = io.BytesIO(source) if isinstance(source, bytes | memoryview) else source
    return Image.open(file, formats=(*formats(), *((_TGA,) if is_tga(file) else ())))


def refused(head: bytes) -> str:
    """What a file is that is never opened, by its first bytes, for a message; or nothing."""
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    if start.startswith(b"%!") or head.startswith(b"\xc5\xd0\xd3\xc6"):
        return "PostScript, a program"
    if start.startswith(b"%PDF"):
        return "a PDF"
    metafile = b"\xd7\xcd\xc6\x9a", b"\1\0\x09\0", b"\2\0\x09\0"
    if head.startswith(metafile) or head[40:44] == b" EMF":
        return "a Windows metafile, a list of commands"
    if start[:5].lower() in (b"<?xml", b"<svg ", b"<!doc", b"<html"):
        return "text in tags, such as SVG or a web page"
    return ""


@functools.cache
def formats() -> tuple[str, ...]:
    """Those that this Pillow can open; an older one has no AVIF."""
    for plugin in (*_PLUGINS.values(), "Tga"):
        try:
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
        except ImportError:
            continue
    return tuple(name for name in _PLUGINS if name in Image.OPEN)


def is_tga(file: IO[bytes]) -> bool:
    """Whether a file is a TGA: version 2 says so at its end; else all of its head must fit."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_TGA_HEADER)
    if len(head) < _TGA_HEADER or head[1] > 1 or head[2] & ~8 not in _TGA_DEPTHS:
        return False
    file.seek(max(0, size - len(_TGA_END)))
    return file.read(len(_TGA_END)) == _TGA_END or _fits(head, size)


def _fits(head: bytes, size: int) -> bool:
    kind, packed = head[2] & 7, head[2] & 8
    entries, entry = int.from_bytes(head[5:7], "little"), head[7]
    width, height = (int.from_bytes(head[at : at + 2], "little") for at in (12, 14))
    depth, alpha = head[16], head[17] & 15
    if (kind == 1) != (head[1] == 1) or depth not in _TGA_DEPTHS[kind] or head[17] & 0xC0:
        return False
    if head[1] == 0 and any(head[3:8]):
        return False
    if head[1] == 1 and (entry not in (16, 24, 32) or not 0 < entries <= 256):
        return False
    least = _TGA_HEADER + head[0] + entries * entry // 8
    rows = -(-width * height // 128) if packed else width * height * depth // 8
    return width > 0 < height and alpha in (0, 1, 8) and size >= least + rows
