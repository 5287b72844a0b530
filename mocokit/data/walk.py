"""Files below a folder, by their endings: one walk that follows links and lists no folder twice."""

import heapq
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mocokit.data.cache import Watch
from mocokit.errors import UserError
from mocokit.files import show

Endings = frozenset[bytes]
MOST_FOLDERS, MOST_FILES = 2_000_000, 100_000_000


class Closed(UserError):
    """A folder that this user may not list."""


def walk(root: Path, endings: Endings, watch: Watch, within: Path | None = None) -> Iterator[bytes]:
    """Relative names of the files below `root`, in no order, with / on every system.

    Links are followed, as `find -L` does, but each folder is listed once, by its own name if it is
    below `root`, else by the first of its links. Left out and noted in `watch` are other links to
    it, links to a folder that `root` lies in, and the system's own folders (/proc, /sys, /dev).
    Links that lead nowhere are listed, so that they are reported when they are read. Folders below
    `root` that this user may not list are left out and noted in `watch`. Raises UserError if `root`
    itself is such a folder. Raises it for any other failure too, because one that passes would lose
    images unnoticed. `within`: a folder that `root` is looked for in, so that links to it, or to
    what it lies in, are left out too.
    """
    start = os.fsencode(root)
    seen = _above(os.fsencode(within) + b"/." if within else start)
    system = _system_disks(os.fsencode(within or root))
    folders, links, files = [(start, b"")], list[tuple[bytes, bytes]](), 0
    while folders or links:
        # Folders before links, and links in their order: what is left out follows from the tree.
        linked = not folders
        folder, prefix = heapq.heappop(links)[::-1] if linked else folders.pop()
        try:
            with _noting_errors(folder, watch):
                status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if (prefix or within) and (identity in seen or status.st_dev in system):
                watch.left[folder] = "the system's own" if status.st_dev in system else ""
                continue
            seen.add(identity)
            found = entries(folder, watch)
        except Closed:
            if not prefix:
                raise
            continue
        for entry in found:
            if is_folder(entry):
                below = prefix + entry.name + b"/"
                if entry.is_symlink():
                    heapq.heappush(links, (below, entry.path))
                else:
                    folders.append((entry.path, below))
            elif _is_wanted(entry, endings):
                files += 1
                yield prefix + entry.name
            elif why := _closed(entry):
                watch.closed[entry.path] = why
        if len(seen) + len(links) > MOST_FOLDERS or files > MOST_FILES:
            most = f"{MOST_FOLDERS:,} folders or {MOST_FILES:,} images"
            raise UserError(f"below {show(root)} are more than {most}: give a folder further down")


def _above(folder: bytes) -> set[tuple[int, int]]:
    """The folders that a folder lies in, and itself if /. ends its path, by device and number."""
    found = set()
    whole = Path(os.fsdecode(os.path.realpath(folder)))
    for place in (*([whole] if folder.endswith(b"/.") else []), *whole.parents):
        with suppress(OSError):
            status = os.stat(place)
            found.add((status.st_dev, status.st_ino))
    return found


def _system_disks(start: bytes) -> set[int]:
    """What /proc, /sys and /dev lie on, where programs and devices look like files."""
    found = set()
    for place in (b"/proc", b"/sys", b"/dev"):
        with suppress(OSError):
            found.add(os.stat(place).st_dev)
    with suppress(OSError):
        found -= {os.stat(start).st_dev, os.stat(b"/").st_dev}
    return found


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
