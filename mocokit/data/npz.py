"""Arrays of a .npz that anybody may have written: sizes are looked at before memory is taken."""

import ast
import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, IndexError, RuntimeError, MemoryError),
    *(SyntaxError, RecursionError, AssertionError),
)  # what reading a damaged .npz may raise
_LARGEST_DIRECTORY = 2**20  # bytes, of some 10,000 arrays
_END = struct.Struct("<4s4H2IH")  # the end of a zip's directory; the sixth field is its size
# What stands before that end in files above 4 GiB: the same in 64 bits, and where that begins.
_END64 = struct.Struct("<4sQ2H2L4Q4sLQL")
_LONGEST_COMMENT = 2**16
_LONGEST_HEADER = 10_000  # bytes, as numpy has it
_NUMBERS = re.compile(r"[<>|=]?([uif][1248]|b1|f16)")


class Archive:
    """A .npz, open; its arrays are read one by one. Raises one of DAMAGE."""

    def __init__(self, file: IO[bytes]) -> None:
        file.seek(0)
        if file.read(1) == b"\x80":
            raise ValueError("Python objects, which are pickled")
        size = file.seek(0, os.SEEK_END)
        first = file.seek(max(0, size - _END64.size - _END.size - _LONGEST_COMMENT))
        if _directory(file.read(), first) > _LARGEST_DIRECTORY:
            raise ValueError("its directory is larger than 1 MiB")
        self._zip = zipfile.ZipFile(file)
        self.files = [
            name.removesuffix(".npy") for name in self._zip.namelist() if name.endswith(".npy")
        ]

    def __getitem__(self, key: str) -> NDArray[Any]:
        """An array of numbers, which fits into this machine's memory."""
        info = self._zip.getinfo(f"{key}.npy")
        with self._zip.open(info) as member:
            header = Header.read(member, info.file_size)
            if info.file_size > memory():
                needed = f"{info.file_size / 2**30:,.1f} GiB"
                raise ValueError(f"it takes {needed}, more than this machine's memory")
            content = member.read()  # to the end, where its checksum is compared
        flat = np.frombuffer(content, header.kind)
        found: NDArray[Any] = flat.reshape(header.shape, order=header.order)
        return found

    def every(self) -> Arrays:
        """All arrays, which together fit into memory."""
        total = sum(info.file_size for info in self._zip.infolist())
        if total > memory():
            raise ValueError(f"it takes {total / 2**30:,.1f} GiB, more than this machine's memory")
        return {key: self[key] for key in self.files}


def _directory(tail: bytes, first: int) -> int:
    """Bytes of a zip's directory by its last bytes, which begin at `first`. Raises BadZipFile."""
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + _END.size:
        raise zipfile.BadZipFile("File is not a zip file")
    size: int = _END.unpack_from(tail, at)[5]
    if (at64 := at - _END64.size) >= 0:
        mark, *fields = _END64.unpack_from(tail, at64)
        if fields[9] == b"PK\6\7":  # then zipfile believes this size, and not the other
            if mark != b"PK\6\6" or fields[11] != first + at64:
                raise zipfile.BadZipFile("its directory lies elsewhere than it says")
            size = max(size, fields[7])
    return size


class Header(NamedTuple):
    """What comes before the numbers of an array. numpy's own reader warns, and believes it."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    kind: np.dtype[Any]
    size: int  # bytes of the header

    @classmethod
    def read(cls, file: IO[bytes], size: int) -> "Header":
        """Of a .npy of `size` bytes, at its beginning; raises one of DAMAGE if it does not fit."""
        start = file.read(8)
        if start[:6] != npy.MAGIC_PREFIX or start[6:] not in (b"\1\0", b"\2\0"):
            raise ValueError("it is no array")
        form = "<H" if start[6] == 1 else "<I"
        (length,) = struct.unpack(form, file.read(struct.calcsize(form)))
        if length > _LONGEST_HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        fields = ast.literal_eval(file.read(length).decode("latin-1"))
        shape, text = fields["shape"], fields["descr"]
        if not isinstance(text, str) or "O" in text:
            raise ValueError("Python objects, which are pickled")
        if not _NUMBERS.fullmatch(text):
            raise ValueError(f"it holds {text[:20]}, not numbers")
        kind, begin = np.dtype(text), 8 + struct.calcsize(form) + length
        whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not whole or begin + math.prod(shape) * kind.itemsize != size:
            raise ValueError("its shape is not that of its content")
        return cls(shape, "F" if fields["fortran_order"] else "C", kind, begin)


def map_array(path: Path) -> NDArray[Any]:
    """The array of a .npy, mapped from the disk. Raises one of DAMAGE."""
    with path.open("rb") as file:
        header = Header.read(file, path.stat().st_size)
    if not math.prod(header.shape):
        return np.zeros(header.shape, header.kind)
    return np.memmap(path, header.kind, "r", header.size, header.shape, header.order)


def memory() -> int:
    """Bytes of this machine's memory; where the system does not say, 64 GiB."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**36
