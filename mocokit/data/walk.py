"""Files below a folder, by their endings: one walk, links followed, loops survived."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mocokit.data.cache import Watch
from mocokit.errors import UserError
from mocokit.files import show

Endings = frozenset[bytes]


class Closed(UserError):
    """A folder that this user may not list."""


def walk(root: Path, endings: Endings, watch: Watch) -> Iterator[bytes]:
    """Relative names of the files below `root`, in no order, with / on every system.

    Links are followed, as `find -L` does; one that leads back to a folder above it is left out.
    Links that lead nowhere are listed, so that they are reported when they are read. Folders below
    `root` that are closed to this user are left out, and `watch` has them noted. Raises UserError
    for `root` itself, and for what else fails: that may pass, and would cost images unseen.
    """
    start = os.fsencode(root)
    waiting = [(start, b"", frozenset[tuple[int, int]]())]
    while waiting:
        folder, prefix, above = waiting.pop()
        try:
            with _telling(folder, watch):
                status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            found = entries(folder, watch) if identity not in above else []
        except Closed:
            if not prefix:
                raise
            continue
        for entry in found:
            if is_folder(entry):
                waiting.append((entry.path, prefix + entry.name + b"/", above | {identity}))
            elif _is_wanted(entry, endings):
                yield prefix + entry.name
            elif why := _closed(entry):
                watch.closed[entry.path] = why


def entries(folder: bytes, watch: Watch) -> list[os.DirEntry[bytes]]:
    """What a folder holds, without hidden things."""
    with _telling(folder, watch):
        changed = os.stat(folder).st_mtime_ns
        with os.scandir(folder) as found:
            everything = list(found)
    watch.note(folder, changed, len(everything))
    # lost+found: on every mounted ext4 disk, and readable by root only.
    return [e for e in everything if e.name[:1] != b"." and e.name != b"lost+found"]


@contextmanager
def _telling(folder: bytes, watch: Watch) -> Iterator[None]:
    """Raises Closed, noted, or UserError for a folder that cannot be looked at."""
    try:
        yield
    except OSError as error:
        text = f"cannot list {show(os.fsdecode(folder))} ({error.strerror})"
        told = f"{text}: make it readable or move it away"
        if not isinstance(error, PermissionError):
            raise UserError(told) from error
        watch.closed[folder] = str(error.strerror)
        raise Closed(told) from error


def is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself, or to where this user may not look


def _closed(entry: os.DirEntry[bytes]) -> str:
    """Why what lies at a link's end may not be seen: it may be a folder, left out with it."""
    try:
        if entry.is_symlink():
            entry.stat()
    except PermissionError as error:
        return str(error.strerror)
    except OSError:
        pass
    return ""


def _is_wanted(entry: os.DirEntry[bytes], endings: Endings) -> bool:
    if not has_ending(entry.name, endings):
        return False
    try:
        # Neither pipes nor sockets, which would block when read.
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def has_ending(name: bytes, endings: Endings) -> bool:
    _, dot, ending = name.rpartition(b".")
    return bool(dot) and ending.lower() in endings
