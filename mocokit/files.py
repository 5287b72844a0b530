"""Files written whole or not at all, locks, the cache folder, text for a terminal, kept memory."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mocokit.errors import UserError

_LARGEST = 2**25 - 2**16  # bytes; glibc's own limit is 32 MiB with what it adds to a block


def keep_freed_memory() -> None:
    """Under glibc, let what is freed stay with the process; elsewhere this does nothing.

    glibc returns large blocks to the system at once, and more below them, so that a loop that frees
    and takes some megabytes for each batch has every page cleared for it anew. What it calls large
    is the largest such block that was ever freed, up to 32 MiB: so one is taken and freed.
    """
    np.empty(_LARGEST, np.uint8)


@contextmanager
def whole(path: Path, *, sync: bool = False, sole_writer: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends.

    If the block fails, `path` stays as it was and the partial file is deleted. `sync` writes the
    content to the disk before the file takes its place, so that a power cut cannot leave an empty
    file under the name. With `sole_writer` a killed attempt leaves a partial file that the next
    attempt overwrites; without it, processes and threads that write at the same time do not meet.
    """
    partial = partial_of(path)
    if not sole_writer:
        writer = f"{os.getpid()}-{threading.get_ident()}"
        partial = path.with_name(f"{path.name}.{writer}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """Where a sole writer writes a file before it is whole."""
    return path.with_name(f"{path.name}.partial")


def write_bytes(path: Path, content: bytes, *, sole_writer: bool = False) -> None:
    """All of it or nothing."""
    with whole(path, sole_writer=sole_writer) as file:
        file.write(content)


def write_text(path: Path, text: str, *, sole_writer: bool = False) -> None:
    """All of it or nothing, in UTF-8."""
    write_bytes(path, text.encode(), sole_writer=sole_writer)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file, which is made where it is missing. The lock ends with the process.

    Raises BlockingIOError if another process holds it and `wait` is false.
    """
    with open(path, "a", encoding="utf-8") as file:
        lock(file, wait=wait)
        yield


def lock(file: IO[Any], *, wait: bool = True) -> None:
    """Lock an open file until it is closed, as `locked` does."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where the lock is left out
        return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def cache_folder() -> Path:
    """The user's folder for what can be made again: $MOCOKIT_CACHE, else the system's place.

    Raises UserError for a user without a home, as in some containers.
    """
    try:
        if own := os.environ.get("MOCOKIT_CACHE"):
            return Path(own).expanduser()
        if base := os.environ.get("XDG_CACHE_HOME"):
            return Path(base) / "mocokit"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "mocokit"
        caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
        return Path.home() / caches / "mocokit"
    except RuntimeError:  # pathlib's, for want of a home
        raise UserError(
            "this user has no home folder to keep a cache in; set MOCOKIT_CACHE to a folder"
        ) from None


def printable(text: str) -> str:
    """Text that somebody else wrote, on one line and without a terminal's control characters."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def show(path: str | Path) -> str:
    """A path for a message."""
    return printable(str(path))


def reason_of(error: BaseException) -> str:
    """Why something failed, in one short line: without the path that the caller names itself."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    return " ".join(str(text).split())[:120]
