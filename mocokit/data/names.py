"""File names: many of them at little cost."""

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mocokit.files import printable

_SHOWN = 1000  # bytes of a name; longer ones are no file's


class Names:
    """Many file names in two arrays, so that processes share them: a list's would be copied."""

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[bytes]) -> "Names":
        lengths = np.fromiter(map(len, names), np.int64, len(names))
        return cls(np.frombuffer(b"".join(names), np.uint8), np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.raw(index))

    def raw(self, index: int) -> bytes:
        """A name as the file system knows it."""
        index = range(len(self.ends))[index]
        first = int(self.ends[index - 1]) if index else 0
        return self.text[first : int(self.ends[index])].tobytes()

    def check(self) -> None:
        """Raises ValueError where the ends do not divide the text."""
        text, ends = self.text, self.ends
        numbers = ends.ndim == text.ndim == 1 and ends.dtype.kind in "iu" and text.dtype == np.uint8
        if not numbers or (np.diff(ends, prepend=0) < 0).any():
            raise ValueError("its names are damaged")
        if (int(ends[-1]) if len(ends) else 0) != len(text):
            raise ValueError("its names are damaged")

    def shown(self, index: int) -> str:
        """A name for a message: on one line, and of a length that fits there."""
        first = int(self.ends[index - 1]) if index else 0
        if int(self.ends[index]) - first <= _SHOWN:
            return printable(self[index])
        return printable(os.fsdecode(self.text[first : first + _SHOWN].tobytes())) + "..."

    def every(self) -> Iterator[bytes]:
        """All names, much faster than one by one."""
        text, first = self.text.tobytes(), 0
        for last in self.ends.tolist():
            yield text[first:last]
            first = last


def short_name(text: str) -> str:
    """A text as a part of a file name on any system."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:40].strip("-._") or "images"
