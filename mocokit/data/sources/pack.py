"""A pack: all images of a data set, bounded, in one file that is read at random.

    magic | header (JSON) | record, record, ... | index (.npz) | trailer

A record is a small head with a checksum of itself and of what follows: a file as it was, where
nothing would be gained by making it smaller; else the smaller image, as a JPEG or as bare pixels;
or the reason why the image cannot be read. Records follow one another in the order of the images,
so that a pack that was broken off is gone on with after its last whole record. The index says where
each record is.
"""

import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocokit.data.decode import BadImage, look_at
from mocokit.data.index import to_arrays
from mocokit.data.levels import TOPS
from mocokit.data.npz import Archive, Arrays
from mocokit.data.source import Source, Splits
from mocokit.errors import UserError
from mocokit.files import lock, printable, show

MAGIC = b"mocokit pack 2\n\0"  # 1 had no checksum of heads
HEAD = struct.Struct("<4sBxxxIIQI")  # mark, kind, height, width, length, checksum
TRAILER = struct.Struct("<QQI16s")  # the index: offset, length, checksum; and the magic
BAD, FILE, SHRUNK, PIXELS = range(4)  # what a record holds
_MARK = b"IMG\n"
_QUALITY = 95
_CAUTIOUS = (  # no link is followed, no pipe waited for
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)
_CHUNK = 64  # images between two flushes
_LARGEST_HEADER = 2**26  # bytes
LONGEST_REASON = 500  # characters


class Head(NamedTuple):
    """What comes before a record's content; the checksum is of both."""

    kind: int
    height: int
    width: int
    length: int
    checksum: int

    @classmethod
    def of(cls, kind: int, height: int, width: int, content: bytes) -> "Head":
        """The head of this content."""
        own = struct.pack("<BII", kind, height, width)
        return cls(kind, height, width, len(content), zlib.crc32(own, zlib.crc32(content)))

    def fits(self, content: bytes) -> bool:
        """Whether it is the head of this content, and both are whole."""
        return self == Head.of(self.kind, self.height, self.width, content)


class Packed(NamedTuple):
    """How many images were bad, how many were shrunk to a JPEG, and the size of the pack."""

    bad: int
    shrunk: int
    bytes: int


def unpack_head(content: bytes | memoryview) -> Head:
    """Raises ValueError where no record begins."""
    if len(content) < HEAD.size:
        raise ValueError("the pack ends")
    mark, *rest = HEAD.unpack(content[: HEAD.size])
    if mark != _MARK:
        raise ValueError("there is no record")
    return Head(*rest)


def write_pack(
    splits: Splits,
    target: Path,
    bound: int | None,
    raw: bool,
    threads: int,
    advance: Callable[[int], None],
    remedy: str = "make room or choose another file, and run it again",
    anew: bool = False,
) -> Packed:
    """Pack training and validation images, in this order; without a bound, the files as they are.

    `advance(n)` counts the images that are done, those of an earlier attempt first. What lies under
    the name of the unfinished pack is never emptied, unless it is one of the same images and
    settings, or `anew`. Raises UserError, with `remedy` if the target cannot be written.
    """
    sources = [source for source in splits if source is not None]
    header = {
        "bound": bound,
        "raw": raw,
        # Not the fingerprint, which may be of names alone: an attempt at other pixels is dropped.
        "images": [source.stamp() for source in sources],
        "lengths": [len(source) for source in sources],
    }
    tops = [top for source in sources if (top := source.index().top) is not None]
    if tops:  # left out elsewhere, as 0.1 wrote it
        header["top"] = tops[0]
    part, replaced = target.with_name(target.name + ".part"), os.path.lexists(target)
    places = [(source, number) for source in sources for number in range(len(source))]
    record = partial(_record, bound=bound, raw=raw)
    try:
        with _locked(part) as file:
            heads, offsets = _taken_up(file, header, part, anew)
            advance(len(heads))
            with ThreadPoolExecutor(threads) as pool:
                for first in range(len(heads), len(places), _CHUNK):
                    chunk = places[first : first + _CHUNK]
                    for head, content in pool.map(record, *zip(*chunk, strict=True)):
                        offsets.append(file.tell())
                        heads.append(head)
                        file.write(HEAD.pack(_MARK, *head) + content)
                    file.flush()
                    advance(len(chunk))
            _finish(file, sources, np.array(offsets, np.int64))
            if os.path.lexists(target) and not replaced:
                raise UserError(f"{show(target)} has come to be there: move it away, and run again")
            os.replace(part, target)
    except OSError as error:
        where = f"cannot write {show(part)} ({error.strerror})"
        raise UserError(f"{where}: {remedy}") from error
    bad, shrunk = (sum(head.kind == kind for head in heads) for kind in (BAD, SHRUNK))
    return Packed(bad, shrunk, os.stat(target).st_size)


def _record(source: Source, number: int, bound: int | None, raw: bool) -> tuple[Head, bytes]:
    try:
        content = source.content(number)
        if bound is None and not raw and content is not None:
            return Head.of(FILE, 0, 0, content), content
        pixels = source.read(number, bound)
        height, width = pixels.shape[:2]
        if raw or content is None:
            kind, content = PIXELS, pixels.tobytes()
        elif {height, width} == set(look_at(content)[1:3]):
            kind = FILE  # nothing was shrunk: the same pixels, at no loss
        else:
            kind, content = SHRUNK, _jpeg(pixels)
    except BadImage as reason:
        text = printable(str(reason))[:LONGEST_REASON]
        kind, height, width, content = BAD, 0, 0, text.encode("utf-8", "replace")
    return Head.of(kind, height, width, content), content


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue()


@contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    """The unfinished pack, open to read and write, and locked against other processes."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _CAUTIOUS
    try:
        number = os.open(part, flags, 0o666)
    except OSError:
        if os.path.lexists(part) and not _is_plain(os.lstat(part)):
            raise _not_ours(part, "a link, a device or a pipe") from None
        raise
    with open(number, "a+b") as file:
        if not _is_plain(os.fstat(number)):
            raise _not_ours(part, "a link, a device or a pipe")
        try:
            lock(file, wait=False)
            here = os.stat(part)
        except (BlockingIOError, FileNotFoundError):
            raise UserError(f"another process is writing {show(part)}: wait for it") from None
        if not os.path.samestat(here, os.fstat(number)):  # it was finished in between
            raise UserError(f"another process has written {show(part)}: run it again")
        yield file


def _is_plain(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)


def _not_ours(part: Path, what: str) -> UserError:
    return UserError(f"{show(part)} is {what}: move it away, or choose another file")


def _taken_up(
    file: IO[bytes], header: dict[str, Any], part: Path, anew: bool
) -> tuple[list[Head], list[int]]:
    """The whole records of an earlier attempt at the same pack; what is beyond them is cut off."""
    text = json.dumps(header).encode()
    start = MAGIC + struct.pack("<I", len(text)) + text
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found = file.read(len(start))
    if not (anew or start.startswith(found)):
        ours = found.startswith(MAGIC)
        other = "an unfinished pack of other images or settings" if ours else "no unfinished pack"
        raise _not_ours(part, other)
    heads: list[Head] = []
    offsets: list[int] = []
    if found == start:
        while True:
            offset = file.tell()
            try:
                head = unpack_head(file.read(HEAD.size))
            except ValueError:
                break
            # A length that the file does not have is no record's, however absurd it is.
            content = file.read(head.length) if head.length <= size - file.tell() else b""
            if not head.fits(content):
                break
            heads.append(head)
            offsets.append(offset)
        file.truncate(offset)
        file.seek(offset)
    else:
        file.truncate(0)
        file.seek(0)  # `tell` counts from where the reading ended, though all is written to the end
        file.write(start)
    return heads, offsets


def _finish(file: IO[bytes], sources: list[Source], offsets: NDArray[np.int64]) -> None:
    arrays: Arrays = {"offsets": offsets}
    for number, source in enumerate(sources):
        arrays |= to_arrays(source.index()._replace(extra={}), f"{number}.")
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    index = packed.getvalue()
    offset = file.tell()
    file.write(index + TRAILER.pack(offset, len(index), zlib.crc32(index), MAGIC))
    file.flush()
    os.fsync(file.fileno())


def read_index(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Index and header of a finished pack; raises OSError or ValueError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER.size))
        end = file.read()
        if len(end) < TRAILER.size:
            raise ValueError("it was not written to its end")
        offset, length, checksum, magic = TRAILER.unpack(end)
        if magic != MAGIC or offset + length + TRAILER.size != size or offset < len(MAGIC) + 4:
            raise ValueError("it was not written to its end")
        file.seek(offset)
        index = file.read(length)
        if zlib.crc32(index) != checksum:
            raise ValueError("its index is damaged")
        file.seek(len(MAGIC))
        (long,) = struct.unpack("<I", file.read(4))
        if long > min(_LARGEST_HEADER, offset):
            raise ValueError("its header is damaged")
        header: dict[str, Any] = json.loads(file.read(long))
    _check(header)
    return Archive(io.BytesIO(index)).every(), header


def _check(header: Any) -> None:
    """Raises ValueError or one of DAMAGE for a header that no pack has."""
    bound, raw, top, lengths = (header.get(key) for key in ("bound", "raw", "top", "lengths"))
    counts = isinstance(lengths, list) and all(type(n) is int and n >= 0 for n in lengths)
    sizes = bound is None or (type(bound) is int and bound > 0)
    if not (counts and sizes and type(raw) is bool and (top is None or top in TOPS)):
        raise ValueError("its header is damaged")


def is_pack(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
