"""The images in tar archives: where each lies, and its class. Archives are read, never unpacked.

Whoever made an archive may have meant harm: names are never used as paths, links, devices and
sparse members are left out, and no length that a header claims is believed.
"""

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from mocokit.data.cache import Watch
from mocokit.data.decode import MAX_BYTES
from mocokit.data.sources.folder import IMAGES, split_names
from mocokit.data.walk import has_ending
from mocokit.errors import UserError
from mocokit.files import printable, show

_LONGEST_HEADER = 2**20  # bytes; an archive could claim any length for a member's name
_LONGEST_CLASS = 1000
_LONGEST_NAME = 4096  # bytes; no file's path is longer
_TAR_DAMAGE = (
    *(tarfile.TarError, ValueError, OSError, EOFError, RecursionError, OverflowError),
    *(AttributeError, TypeError, IndexError, KeyError),
)


class Member(NamedTuple):
    """An image in an archive, what its sample's .cls says, and its name in its split."""

    archive: int
    name: bytes
    offset: int
    length: int
    label: str | None
    inner: bytes


def members_of(paths: list[Path], watch: Watch, notes: list[str]) -> list[Member]:
    """All images of these archives, in order; what was left out is added to `notes`."""
    found: list[Member] = []
    for number, path in enumerate(paths):
        try:
            status = path.stat()
            watch.note(os.fsencode(path), status.st_mtime_ns, status.st_size)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"the archive {show(path)} is a pipe or a device: give a file")
            with path.open("rb") as file:
                found += _images(number, file, _regular(path, file, status.st_size, notes))
        except OSError as error:
            raise UserError(f"cannot read the archive {show(path)} ({error.strerror})") from error
    return found


def splits_inside(members: list[Member]) -> tuple[list[Member], list[Member]] | None:
    """Images in a folder train/ within the archives, and those beside it to validate on.

    Of other spellings (Train, train2017) one is taken if there is another to validate on.
    """
    inner = [one.inner for one in members]
    while len({name.partition(b"/")[0] for name in inner}) == 1 and b"/" in inner[0]:
        if inner[0].startswith(b"train/"):
            break
        inner = [name.partition(b"/")[2] for name in inner]
    parts: dict[bytes, list[Member]] = {}
    for name, one in zip(inner, members, strict=True):
        top, _, rest = name.partition(b"/")
        parts.setdefault(top if rest else b"", []).append(one._replace(inner=rest))
    train, beside = split_names(os.fsdecode(top) for top in parts)
    if train is None or (train != "train" and beside is None):
        return None
    return parts[os.fsencode(train)], parts[os.fsencode(beside)] if beside else []


class _Entry(NamedTuple):
    name: bytes
    offset: int
    length: int


def _regular(path: Path, file: IO[bytes], size: int, notes: list[str]) -> Iterator[_Entry]:
    """The plain members that lie within the file: neither links, devices, nor sparse ones."""
    if file.read(2) == b"\x1f\x8b":
        remedy = "gunzip it, since compressed archives cannot be read at random"
        raise UserError(f"{show(path)} is compressed: {remedy}")
    file.seek(0)
    left_out, endless, end = 0, 0, 0
    guarded: Any = _Guarded(file)
    try:
        with tarfile.open(fileobj=guarded, mode="r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                end = archive.offset  # type: ignore[attr-defined]
                within = 0 <= member.size <= size - member.offset_data
                name = member.name.encode("utf-8", "surrogateescape")
                plain = member.isreg() and not member.issparse() and within
                if plain and len(name) <= _LONGEST_NAME:
                    yield _Entry(name, member.offset_data, member.size)
                elif plain:
                    endless += 1
                elif not member.isdir():
                    left_out += 1
    except _TAR_DAMAGE as error:
        if end == 0:
            why = printable(" ".join(str(error).split())[:120])
            raise UserError(f"{show(path)} is no tar archive ({why}): make it again") from error
    if left_out:
        notes.append(f"{show(path)}: {left_out} members are links, devices or cut off, left out")
    if endless:
        longer = f"have names of more than {_LONGEST_NAME:,} bytes"
        notes.append(f"{show(path)}: {endless} members {longer}, left out")
    file.seek(min(end, size))
    if any(file.read(512)):
        notes.append(f"{show(path)} is damaged after byte {end:,}: what follows is left out")


class _Guarded:
    """A file that is read in small pieces only: a header may claim that it is of any length."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise ValueError(f"a header of {size:,} bytes")
        return self._read(size)


def _images(archive: int, file: IO[bytes], entries: Iterator[_Entry]) -> Iterator[Member]:
    """The images among an archive's members, each with the label of its sample."""
    sample: list[_Entry] = []
    key = None
    for entry in entries:
        folder, _, base = entry.name.rpartition(b"/")
        if base[:1] == b".":  # hidden, as what macOS writes beside every file
            continue
        if (new := (folder, base.partition(b".")[0])) != key:
            yield from _of_sample(archive, file, sample)
            sample, key = [], new
        sample.append(entry)
    yield from _of_sample(archive, file, sample)


def _of_sample(archive: int, file: IO[bytes], sample: list[_Entry]) -> Iterator[Member]:
    label = None
    for entry in sample:
        if entry.name.endswith(b".cls") and entry.length <= _LONGEST_CLASS:
            file.seek(entry.offset)
            label = file.read(entry.length).decode("utf-8", "replace").strip()
    images = [one for one in sample if has_ending(one.name, IMAGES) and one.length <= MAX_BYTES]
    # `7.jpg` beside `7.mask.png` is the image; where all have more parts, all are images.
    plain = [one for one in images if one.name.rpartition(b"/")[2].count(b".") == 1]
    for one in plain or images:
        yield Member(archive, one.name, one.offset, one.length, label, one.name.removeprefix(b"./"))
