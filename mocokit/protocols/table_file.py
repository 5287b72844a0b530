"""The file of a table: rows of float32 behind the header of a .npy, with a checksum for each batch.

Nothing is believed that the file says of itself: its header and its size must be the ones that the
images and the network give, and a batch of rows counts only if its checksum is right. So a file
that a kill left, and one with damage, cost the batches that are missing, and no others.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mocokit.files import writing
from mocokit.protocols.features import BATCH

SUM_BYTES = 8
NONE = bytes(SUM_BYTES)  # in place of the checksum of a batch that is not yet computed
REMEDY = "set MOCOKIT_CACHE to a folder with free space, or use --no-cache"


class TableFile:
    """An open file. The caller holds a lock."""

    def __init__(self, file: IO[bytes], path: Path, key: str, shape: tuple[int, int]) -> None:
        self._file, self._path, self._key, self._shape = file, path, key, shape
        self._head = header(shape)
        self._sums = len(self._head) + shape[0] * shape[1] * 4
        self.notes: list[str] = []
        self.unread: NDArray[np.int64] = np.arange(0)  # images of good batches; see `missing`

    @classmethod
    @contextmanager
    def open(cls, path: Path, key: str, shape: tuple[int, int]) -> Iterator["TableFile"]:
        """The file at `path`, for rows of this shape; a new one if it is no such file.

        Raises MocokitError where it cannot be read or written.
        """
        notes = []
        with writing(path, remedy=REMEDY):
            if os.path.lexists(path) and not _is_table(path, shape):
                notes.append(f"the features in {path} are damaged: they are computed again")
                os.unlink(path)  # another process may have mapped it
            file = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        with file:
            table = cls(file, path, key, shape)
            table.notes = notes
            with writing(path, remedy=REMEDY):
                if not os.fstat(file.fileno()).st_size:
                    file.write(table._head)
                    file.truncate(_size(shape))
                os.utime(path)  # the least recently used are deleted first
            yield table

    def missing(self) -> NDArray[np.int64]:
        """The batches that are not there, or damaged. Keeps which images of the others are unread.

        What is not yet written is not mapped into memory: on a full disk in memory, such as
        /dev/shm, the system would kill the process for it.
        """
        right, unread = [], []
        with writing(self._path, remedy=REMEDY):
            sums = [self._sum(block) for block in range(self._blocks)]
            for block in range(self._blocks):
                content = self._content(block)
                right.append(sums[block] == self._hash(block, content))
                if right[block]:
                    first = np.frombuffer(content, "<f4")[:: self._shape[1]]
                    unread.append(block * BATCH + np.flatnonzero(np.isnan(first)))
        self.unread = np.concatenate([np.arange(0), *unread])
        damaged = sum(one != NONE and not good for one, good in zip(sums, right, strict=True))
        if damaged:
            self.notes.append(
                f"{damaged} of {self._blocks} batches of features in {self._path} are damaged: "
                "they are computed again"
            )
        return np.flatnonzero(~np.array(right))

    def write(self, block: int, rows: NDArray[np.float32]) -> None:
        """The rows of a batch and then their checksum. Raises MocokitError."""
        content = rows.tobytes()
        with writing(self._path, room=_size(self._shape), remedy=REMEDY):
            self._put(len(self._head) + block * BATCH * 4 * self._shape[1], content)
            self._put(self._sums + block * SUM_BYTES, self._hash(block, content))

    def sync(self) -> None:
        """Write all of it to the disk."""
        with writing(self._path, remedy=REMEDY):
            os.fsync(self._file.fileno())

    def rows(self) -> NDArray[np.float32]:
        """All rows (N, D), mapped into memory, once all are written."""
        with writing(self._path, remedy=REMEDY):
            # Copy on write, because torch warns of arrays that are read-only. No code writes to it.
            return np.memmap(
                self._path, np.dtype("<f4"), "c", offset=len(self._head), shape=self._shape
            )

    @property
    def _blocks(self) -> int:
        return -(-self._shape[0] // BATCH)

    def _content(self, block: int) -> bytes:
        place = len(self._head) + block * BATCH * 4 * self._shape[1]
        length = min(BATCH * 4 * self._shape[1], self._sums - place)
        return self._get(place, length)

    def _hash(self, block: int, content: bytes) -> bytes:
        """Of a batch under this name, at this place."""
        person = f"{block:x}".encode()
        salt = bytes.fromhex(self._key)[:16]
        return hashlib.blake2b(content, digest_size=SUM_BYTES, salt=salt, person=person).digest()

    def _sum(self, block: int) -> bytes:
        return self._get(self._sums + block * SUM_BYTES, SUM_BYTES)

    def _get(self, place: int, length: int) -> bytes:
        self._file.seek(place)
        parts = []
        while length and (part := self._file.read(length)):
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _put(self, place: int, content: bytes) -> None:
        self._file.seek(place)
        while content:
            content = content[self._file.write(content) :]


def _is_table(path: Path, shape: tuple[int, int]) -> bool:
    """Whether this is a regular file with the header and the size of a table of this shape."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != _size(shape):
        return False
    with open(path, "rb") as file:
        return file.read(len(header(shape))) == header(shape)


def _size(shape: tuple[int, int]) -> int:
    blocks = -(-shape[0] // BATCH)
    return len(header(shape)) + shape[0] * shape[1] * 4 + blocks * SUM_BYTES


def header(shape: tuple[int, int]) -> bytes:
    """The header of a .npy file of float32 rows."""
    buffer = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
