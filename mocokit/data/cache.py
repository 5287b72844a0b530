"""Listings kept in the user's cache folder: a million images are listed once, then loaded.

A listing is valid while all that it depends on is unchanged: each directory's time of change and
number of entries, each archive's time and size. Two runs may read and write at the same time,
because a file appears whole or not at all. A damaged file is made anew, and a note says so.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mocokit.data.index import (
    Index,
    from_arrays,
    read_arrays,
    text_array,
    to_arrays,
    write_arrays,
)
from mocokit.data.names import Names
from mocokit.data.npz import DAMAGE, Arrays
from mocokit.errors import UserError
from mocokit.files import cache_folder, printable, reason_of, show

_FORMAT = 2  # 1 had no checksum
_SETTLED = 2 * 10**9  # ns; a change within the same tick of the clock would go unseen
_FORGOTTEN = 100 * 86400  # s after its last use a file is deleted


class Part(NamedTuple):
    """One split of what was found, and the folder that its names are relative to."""

    root: str
    known: Index


class Listing(NamedTuple):
    """The images to train on, those to validate on if there are any, and notes for the user."""

    train: Part
    validation: Part | None = None
    notes: tuple[str, ...] = ()


class Watch:
    """All that a listing depends on, noted before it is read.

    `closed` has the folders that this user may not list, each with the system's reason; `left` the
    links that are not followed, each with a reason, or nothing if their folder is listed already.
    """

    def __init__(self) -> None:
        self.started = time.time_ns()
        self.paths: list[bytes] = []
        self.marks: list[tuple[int, int]] = []
        self.closed: dict[bytes, str] = {}
        self.left: dict[bytes, str] = {}

    def note(self, path: bytes, time_ns: int, size: int) -> None:
        """`size` is a directory's number of entries, or a file's bytes."""
        self.paths.append(path)
        self.marks.append((time_ns, size))

    @property
    def settled(self) -> bool:
        """Whether any later change would be noticed. A change of access rights would not."""
        old = all(changed < self.started - _SETTLED for changed, _ in self.marks)
        return old and not self.closed

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence about the folders in `closed`, and one about those in `left`."""
        notes = []
        if self.closed:
            why = " or ".join(sorted(set(self.closed.values())))
            notes.append(f"left out, for they cannot be listed ({why}): {_few(self.closed)}")
        again = [path for path, why in self.left.items() if not why]
        if again:
            what = "links to folders that are listed already, or that the images lie in"
            notes.append(f"left out, {what}: {_few(again)}")
        if system := [path for path, why in self.left.items() if why]:
            notes.append(f"left out, links into the system's own folders: {_few(system)}")
        return tuple(notes)


def _few(paths: Iterable[bytes]) -> str:
    names = sorted(paths)
    shown = ", ".join(show(os.fsdecode(one)) for one in names[:4])
    return shown + (f" and {len(names) - 4:,} more" if names[4:] else "")


def listed(key: str, scan: Callable[[Watch], Listing]) -> Listing:
    """The result of `scan`, from the cache if nothing has changed since."""
    name = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
    try:
        path = cache_folder() / "listings" / f"{name}.npz"
    except UserError:  # no home: that costs time, not the run
        return scan(Watch())
    try:
        known = _recall(path, key)
        damage = ""
    except DAMAGE as error:
        known, damage = None, printable(reason_of(error)) or type(error).__name__
    if known is not None:
        return known
    watch = Watch()
    found = scan(watch)
    if watch.settled:
        with suppress(OSError):  # a full or read-only home costs time, not the run
            _remember(path, key, found, watch)
    if damage:
        note = f"the listing in {show(path)} was damaged ({damage}): images are listed anew"
        found = found._replace(notes=(*found.notes, note))
    return found


def _recall(path: Path, key: str) -> Listing | None:
    """What was kept under a key; None: nothing, or what has changed since. Raises one of DAMAGE."""
    try:
        arrays = read_arrays(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    head = json.loads(arrays["head"].tobytes())
    if head["format"] != _FORMAT:
        return None
    if _checksum(arrays) != arrays["checksum"].tobytes():
        raise ValueError("its checksum differs")
    if head["key"] != key:
        raise ValueError("it is of other images")
    watched = Names(arrays["watched.names"], arrays["watched.ends"])
    watched.check()
    with suppress(OSError):
        for place, mark in zip(watched.every(), arrays["watched.marks"].tolist(), strict=True):
            if _mark(place) != tuple(mark):
                return None
        parts = [
            Part(root, from_arrays(arrays, f"{number}."))
            for number, root in enumerate(head["roots"])
        ]
        with suppress(OSError):
            os.utime(path)  # used once more
        return Listing(parts[0], parts[1] if parts[1:] else None, tuple(head["notes"]))
    return None


def _checksum(arrays: Arrays) -> bytes:
    """Of all arrays but itself, with their names, types and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(set(arrays) - {"checksum"}):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _mark(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    folder = stat.S_ISDIR(status.st_mode)
    return status.st_mtime_ns, len(os.listdir(path)) if folder else status.st_size


def _remember(path: Path, key: str, found: Listing, watch: Watch) -> None:
    parts = [found.train, *([found.validation] if found.validation else [])]
    head = {"format": _FORMAT, "key": key, "notes": found.notes, "roots": [p.root for p in parts]}
    names = Names.of(watch.paths)
    arrays: Arrays = {"head": text_array(json.dumps(head))}
    arrays |= {"watched.names": names.text, "watched.ends": names.ends}
    arrays["watched.marks"] = np.array(watch.marks, np.int64).reshape(-1, 2)
    for number, part in enumerate(parts):
        arrays |= to_arrays(part.known, f"{number}.")
    arrays["checksum"] = np.frombuffer(_checksum(arrays), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    forget_unused(path.parent, "*.npz*")
    write_arrays(path, arrays, compressed=False)


def forget_unused(folder: Path, pattern: str) -> None:
    """Delete files that were not used for 100 days; use sets a file's time of access."""
    for other in folder.glob(pattern):
        with suppress(OSError):
            status = other.stat()
            if time.time() - max(status.st_atime, status.st_mtime) > _FORGOTTEN:
                other.unlink()
