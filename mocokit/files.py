"""Files written whole or not at all, logs, bounded reading, locks, the cache folder, safe text."""

import errno
import json
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mocokit.errors import MocokitError, UserError, printable as printable

_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
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
def writing(
    path: str | Path, *, room: int | None = None, remedy: str = "make room, or name another place"
) -> Iterator[None]:
    """Turn the system's refusal to write, such as a full disk, into one sentence.

    It says what could not be written, why, how much `room` in bytes that needs, and the remedy.
    Raises MocokitError.
    """
    try:
        yield
    except OSError as error:
        needs = "" if room is None else f"it needs about {max(room, 2**20) / 2**20:,.0f} MiB; "
        raise MocokitError(
            f"cannot write {show(path)} ({reason_of(error)}); {needs}what was saved before is "
            f"untouched: {remedy}"
        ) from None


def append_line(path: Path, text: str) -> None:
    """Append one line, and begin a new one where a crash left the last line cut short."""
    with open(path, "a+b") as file:
        start = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            start = b"" if file.read(1) == b"\n" else b"\n"
        file.write(start + text.encode("utf-8", "surrogateescape") + b"\n")


def json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a file of JSON lines, and how many of its lines are damaged.

    A damaged line costs itself and nothing else: cut short, no UTF-8, no JSON, or no object.
    A missing file is empty. Raises OSError as `read_regular` does.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return [], 0
    found, damaged = [], 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            damaged += 1
    return found, damaged


def read_regular(path: str | Path, limit: int = 2**30) -> bytes:
    """What a regular file of at most `limit` bytes holds.

    Raises OSError, whose `strerror` says why, for all else: a pipe or a device is not waited for.
    """
    number = os.open(path, os.O_RDONLY | _AT_ONCE)
    with open(number, "rb", buffering=0) as file:
        status = os.fstat(number)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "neither a file nor a link to one")
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit / 2**20:,.0f} MiB, refused")
        return file.readall()


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


def brief(text: str, most: int = 100) -> str:
    """Text that somebody else wrote, `printable` and not longer than a message can bear."""
    shown = printable(text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def show(path: str | Path) -> str:
    """A path for a message."""
    return printable(str(path))


def reason_of(error: BaseException) -> str:
    """Why something failed, in one short line: without the path that the caller names itself."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    return printable(" ".join(str(text)[:1000].split())[:120]) or type(error).__name__
