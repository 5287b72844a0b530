"""Images in a pack, read from the mapped file; each is checked against its checksum."""

import hashlib
import math
import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import BadImage, bounded, decode, reduced_size
from mocokit.data.index import Index, from_arrays, stamp_of
from mocokit.data.npz import DAMAGE
from mocokit.data.source import Encoded, Source
from mocokit.data.sources.folder import Labels
from mocokit.data.sources.pack import (
    BAD,
    HEAD,
    LONGEST_REASON,
    PIXELS,
    Head,
    read_index,
    unpack_head,
)
from mocokit.data.sources.several import parts_of
from mocokit.errors import UserError
from mocokit.files import printable, reason_of, show


class PackedSource(Encoded):
    """Images under the numbers, names and labels that they had when they were packed.

    offsets: (n,) int64, where each record begins. `bound` is the short side they were shrunk to.
    """

    notes: tuple[str, ...] = ()
    is_copy = False  # in the cache, of what can be read again

    def __init__(
        self,
        path: Path,
        offsets: NDArray[np.int64],
        known: Index,
        bound: int | None,
        raw: bool,
        top: int | None = None,
    ) -> None:
        self.path, self.offsets, self.bound, self.raw = path, offsets, bound, raw
        self.name, self.labels, self.classes = known.name, known.labels, known.classes
        self.names = known.names
        digest = hashlib.blake2b(f"mocokit pack 1 {bound} {raw}".encode(), digest_size=16)
        # What was shrunk was scaled too; files as they were can still be read on any scale.
        self.settled, self.top = raw or bound is not None, top
        digest.update(self.scaled(known.fingerprint).encode())
        if known.labels is not None:
            digest.update(known.labels.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()
        self._file: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getstate__(self) -> dict[str, Any]:
        """Every process maps the file itself; the system keeps one copy of what they read."""
        return self.__dict__ | {"_file": None}

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image."""
        head, content = self._record(index)
        if head.kind != PIXELS:
            return decode(content, bound, self.top)
        pixels = np.frombuffer(content, np.uint8).reshape(head.height, head.width, 3)
        return bounded(pixels, bound)

    def content(self, index: int) -> bytes | None:
        """The encoded image; None where its pixels are stored bare. Raises BadImage."""
        head, content = self._record(index)
        return None if head.kind == PIXELS else content

    def count_pixels(self, bound: int | None) -> int:
        """How many pixels its canvases have that are stored bare, by the records' heads."""
        heads = (self._head(int(start)) for start in self.offsets)
        bare = (head for head in heads if head and head.kind == PIXELS)
        return sum(math.prod(reduced_size(head.height, head.width, bound)) for head in bare)

    def lacks(self, bound: int | None) -> str:
        """What to tell whoever wants canvases of another bound than it was packed for."""
        if self.bound is None or (bound is not None and bound <= self.bound):
            return ""
        wanted = "whole images" if bound is None else f"{bound:,}"
        return (
            f"{self.name} was packed for canvases of {self.bound:,} pixels, and these views can "
            f"use {wanted}: small crops are enlarged; pack again with --recipe for sharper ones"
        )

    def _record(self, index: int) -> tuple[Head, bytes]:
        start = int(self.offsets[index])
        head = self._head(start)
        if head is None:
            raise self._damaged("no record begins here")
        first = start + HEAD.size
        content = self._map()[first : first + head.length]
        if not head.fits(content):
            raise self._damaged("the checksum differs")
        if head.kind == BAD:
            # Whoever wrote the pack wrote the reason: it stays one line, wherever it goes.
            raise BadImage(printable(content[:LONGEST_REASON].decode(errors="replace")))
        if head.kind == PIXELS and not 0 < 3 * head.height * head.width == head.length:
            raise self._damaged("its size differs")
        return head, content

    def _damaged(self, why: str) -> BadImage:
        """What to raise for a record; of a copy in the cache, the next opening makes another."""
        if not self.is_copy:
            return BadImage(f"its pack is damaged here: {why}")
        with suppress(OSError):
            damage_mark(self.path).touch()
        return BadImage(f"its copy in the cache is damaged ({why}); the next run copies it anew")

    def _head(self, start: int) -> Head | None:
        """None where no record begins."""
        try:
            return unpack_head(self._map()[start : start + HEAD.size])
        except ValueError:
            return None

    def _map(self) -> mmap.mmap:
        if self._file is None:
            try:
                with self.path.open("rb") as file:
                    self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise BadImage(f"its pack cannot be read: {error}") from error
        return self._file

    def describe(self, index: int) -> str:
        if self.names is None:
            return f"image {index} of {self.name}"
        return self.names.shown(index)

    def stamp(self) -> str:
        digest = hashlib.blake2b(np.ascontiguousarray(self.offsets).data, digest_size=16)
        return stamp_of(self.scaled(self.fingerprint) + digest.hexdigest(), [self.path])

    def index(self) -> Index:
        known = ("pack", self.name, len(self), self.fingerprint)
        return Index(*known, self.classes, self.names, self.labels, top=self.top)


def open_pack(path: Path, labels: Labels) -> tuple[PackedSource, PackedSource | None]:
    """The images of a pack to train on, and those to validate on."""
    if labels == "folders":
        remedy = "set it when packing, and auto now"
        raise UserError(f"data.labels=folders needs a folder, but {show(path)} is a pack: {remedy}")
    try:
        arrays, header = read_index(path)
        offsets, sources, first = arrays["offsets"], [], 0
        if offsets.dtype != np.int64 or offsets.ndim != 1 or (offsets < 0).any():
            raise ValueError("its index is damaged")
        for number, length in enumerate(header["lengths"]):
            known = from_arrays(arrays, f"{number}.")
            if known.length != length:
                raise ValueError("its index does not fit")
            if labels == "none":
                known = known._replace(labels=None, classes=())
            part = offsets[first : first + length]
            how = header["bound"], header["raw"], header.get("top")
            sources.append(PackedSource(path, part, known, *how))
            first += length
        if first != len(offsets) or len(sources) not in (1, 2):
            raise ValueError("its index does not fit")
    except DAMAGE as error:
        why = printable(reason_of(error))
        remedy = "run the same mocokit pack again, which goes on where it ended"
        raise UserError(f"the pack {show(path)} cannot be read ({why}): {remedy}") from error
    return sources[0], sources[1] if sources[1:] else None


def damage_mark(path: Path) -> Path:
    """The file that says that a record of this pack was found damaged."""
    return path.with_name(f".{path.name}.damaged")


def lacking(source: Source, bound: int | None) -> list[str]:
    """What each pack of a source lacks for canvases of this bound."""
    parts = parts_of(source)
    lacks = [part.lacks(bound) for part in parts if isinstance(part, PackedSource)]
    return [text for text in lacks if text]
