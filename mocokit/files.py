"""Files written whole or not at all, logs, bounded reading, locks, the cache folder, safe text."""

import errno
import json
import os
import re
import shlex
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mocokit.errors import MocokitError, UserError, printable as printable

# What Markdown reads as markup, with GitHub's links and formulas. Inside a word "_" is text.
_MARKUP = re.compile(r"[\\`*\[\]<>|~#&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READER_SECONDS = 10.0  # that a pipe's reader has to come
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
        with open(partial, "w+b") as file:  # to be read too, by who adds to an archive
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

    It says what could not be written, why, how much `room` in bytes that needs, and the remedy;
    where room is not what lacks, it does not speak of room. Raises MocokitError.
    """
    try:
        yield
    except OSError as error:
        lacks_room = error.errno in _NO_ROOM
        needs = f"it needs about {max(room or 0, 2**20) / 2**20:,.0f} MiB; "
        needs = "" if room is None or not lacks_room else needs
        remedy = remedy if lacks_room else remedy.replace("make room", "put that right")
        raise MocokitError(
            f"cannot write {show(path)} ({reason_of(error)}); {needs}what was saved before is "
            f"untouched: {remedy}"
        ) from None


def append_line(path: Path, text: str) -> None:
    """Append one line, and begin a new one where a crash left the last line cut short."""
    with os.fdopen(open_own(path), "a+b") as file:
        start = b""
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            start = b"" if file.read(1) == b"\n" else b"\n"
        file.write(start + text.encode("utf-8", "surrogateescape") + b"\n")


def open_own(path: Path) -> int:
    """A file of ours, open to read and to append; it is made where it is missing.

    Raises OSError for what somebody else put in its place: a pipe or a device is not waited for.
    """
    number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _AT_ONCE, 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "neither a file nor a link to one", str(path))
    return number


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


def given(path: str | Path) -> Path:
    """A path that a user gave, with ~ expanded, whether or not there is something.

    Raises UserError if it cannot be known: a folder on the way is closed, a name is too long.
    """
    try:
        full = Path(path).expanduser()
        full.exists()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~ of an unknown user
        raise UserError(
            f"cannot look at {show(path)} ({reason_of(error)}); give another path"
        ) from None
    return full


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
            most = f"{limit / 2**20:,g} MiB" if limit >= 2**16 else f"{limit:,} bytes"
            raise OSError(errno.EFBIG, f"larger than {most}, refused")
        return file.readall()


def check_result(path: str | Path, option: str, ours: Callable[[bytes], bool]) -> None:
    """Raises UserError where `write_result` would not write: asked before hours of work."""
    try:
        why = _refusal(_followed(path), path, ours)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        why = reason_of(error)
    if why:
        raise UserError(f"cannot write {show(path)} ({why}); choose another place with {option}")


def write_result(
    path: str | Path, content: bytes, option: str, ours: Callable[[bytes], bool]
) -> None:
    """Write a file that the user asked for with `option`, and destroy nothing of the user's.

    A device, a pipe and an open file, such as /dev/stdout, are written into. A link stays, and its
    target is written. A file takes a new one's place whole, if it is empty or `ours` knows its
    content as an earlier result. Raises UserError for any other file, and MocokitError where the
    system refuses to write.
    """
    check_result(path, option, ours)
    place = _followed(path)
    number = _open_file(place)
    with writing(path, remedy=f"choose another place with {option}"):
        if number is not None:
            for stream in (sys.stdout, sys.stderr):  # what was printed before comes first
                stream.flush()
            _write_all(number, content)
        elif os.path.exists(place) and not os.path.isfile(place):
            number = _open_pipe(place)
            try:
                _write_all(number, content)
            finally:
                os.close(number)
        else:
            write_bytes(Path(place), content)


def _refusal(place: str, asked: str | Path, ours: Callable[[bytes], bool]) -> str:
    """Why a file cannot be written; empty if it can."""
    if (number := _open_file(place)) is not None:
        os.fstat(number)
        return "" if _is_writable(number) else "it is open to be read alone"
    folder = os.path.dirname(place) or "."
    try:
        kind = os.stat(place).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if place != os.path.abspath(os.path.expanduser(os.fspath(asked))):
            return f"it is a link to {show(place)}, which does not exist"
        if not os.path.isdir(folder):
            return f"there is no folder {show(folder)}"
        return "" if os.access(folder, os.W_OK | os.X_OK) else "you may not write there"
    for test, name in ((stat.S_ISDIR, "folder"), (stat.S_ISBLK, "disk"), (stat.S_ISSOCK, "socket")):
        if test(kind):
            return f"it is a {name}"
    regular = stat.S_ISREG(kind)
    if not all(os.access(one, os.W_OK) for one in ([place, folder] if regular else [place])):
        return "you may not write there"
    if regular and os.path.getsize(place) and not ours(read_regular(place)):
        return "there is another file, which would be lost"
    return ""


def _followed(path: str | Path) -> str:
    """What a path's links lead to; an open file is left at its name, which is a link too."""
    place = os.path.abspath(os.path.expanduser(os.fspath(path)))
    for _ in range(40):
        if _open_file(place) is not None or not os.path.islink(place):
            return place
        place = os.path.normpath(os.path.join(os.path.dirname(place), os.readlink(place)))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _open_file(place: str) -> int | None:
    """The number of the open file that a path such as /dev/stdout or /dev/fd/63 names."""
    if place in (names := ("/dev/stdin", "/dev/stdout", "/dev/stderr")):
        return names.index(place)
    match = re.fullmatch(rf"(?:/dev|/proc/(?:self|{os.getpid()}))/fd/(\d{{1,9}})", place)
    return int(match[1]) if match else None


def _is_writable(number: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows, which has no such paths
        return True
    return fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _open_pipe(place: str) -> int:
    """A device, or a pipe that somebody reads; for a reader it waits a little."""
    for _ in range(int(_READER_SECONDS * 10)):
        try:
            number = os.open(place, os.O_WRONLY | _AT_ONCE | getattr(os, "O_NOCTTY", 0))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.1)
        else:
            os.set_blocking(number, True)
            return number
    raise OSError(errno.ENXIO, "nobody reads it")


def _write_all(number: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(number, left) :]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file, which is made where it is missing. The lock ends with the process.

    Raises BlockingIOError if another process holds it and `wait` is false.
    """
    with os.fdopen(open_own(path), "a") as file:
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


def markdown(text: str) -> str:
    """Text that somebody else wrote, on one line of Markdown that shows it as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def show(path: str | Path) -> str:
    """A path for a message."""
    return printable(str(path))


def shell_word(text: str | Path) -> str:
    """A word of a command to copy, on one line: bash reads the very same bytes from it."""
    text = str(text)
    if text.isprintable():
        return shlex.quote(text)
    plain = (
        chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in os.fsencode(text)
    )
    return f"$'{''.join(plain)}'"


def reason_of(error: BaseException) -> str:
    """Why something failed, in one short line: without the path that the caller names itself."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    return printable(" ".join(str(text)[:1000].split())[:120]) or type(error).__name__


class Unheard:
    """A stream of text that may have lost its reader. Nothing written to it fails.

    A pipe may have been closed, the log's disk may be full, the terminal may be gone. `error` is
    what stopped the first text that did not arrive, if one did not.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Pass the text on; characters that the stream cannot encode are escaped."""
        try:
            if self.stream is not None:
                self.stream.write(text)
        except UnicodeEncodeError as error:
            name = error.encoding
            return self.write(text.encode(name, "backslashreplace").decode(name))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = self.error or error
        return len(text)

    def flush(self) -> None:
        """Pass on what is still held back."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
