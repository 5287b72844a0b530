"""Files below a folder, by their endings: one walk that follows links and survives loops."""

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
    `root` that this user may not list are left out and noted in `watch`. Raises UserError if `root`
    itself is such a folder. Raises it for any other failure too, because one that passes would lose
    images unnoticed.
    """
    start = os.fsencode(root)
    waiting = [(start, b"", frozenset[tuple[int, int]]())]
    while waiting:
        folder, prefix, above = waiting.pop()
        try:
            with _noting_errors(folder, watch):
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
    with _noting_errors(folder, watch):
        changed = os.stat(folder).st_mtime_ns
        with os.scandir(folder) as found:
            everything = list(found)
    watch.note(folder, changed, len(everything))
    # lost+found: on every mounted ext4 disk, and readable by root only.
    return [e for e in everything if e.name[:1] != b"." and e.name != b"lost+found"]


@contextmanager
def _noting_errors(folder: bytes, watch: Watch) -> Iterator[None]:
    """For a folder that cannot be listed, raise Closed, noted in `watch`, or UserError."""
    try:
        yield
    except OSError as error:
        text = f"cannot list {show(os.fsdecode(folder))} ({error.strerror})"
        sentence = f"{text}: make it readable or move it away"
        if not isinstance(error, PermissionError):
            raise UserError(sentence) from error
        watch.closed[folder] = str(error.strerror)
        raise Closed(sentence) from error


def is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself, or into a folder that this user may not list


def _closed(entry: os.DirEntry[bytes]) -> str:
    """Why the target of a link may not be seen. It may be a folder, which is then left out."""
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
        # Reading a pipe or a socket would block.
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def has_ending(name: bytes, endings: Endings) -> bool:
    _, dot, ending = name.rpartition(b".")
    return bool(dot) and ending.lower() in endings
