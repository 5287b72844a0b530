"""Images by their numbers and sizes alone, for whoever has the pixels already."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import BadImage
from mocokit.data.index import Index
from mocokit.data.source import Source


class Unread:
    """A source whose pixels (H, W, 0) have no channels; what is `bad`, by number, stays bad.

    heights, widths: (N,) int64.
    """

    def __init__(
        self,
        source: Source,
        heights: NDArray[np.int64],
        widths: NDArray[np.int64],
        bad: Mapping[int, str],
    ) -> None:
        self.source, self.heights, self.widths, self.bad = source, heights, widths, bad
        self.name, self.labels, self.classes = source.name, source.labels, source.classes
        self.fingerprint, self.notes = source.fingerprint, source.notes

    def __len__(self) -> int:
        return len(self.heights)

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """Nothing, of an image's height and width; raises BadImage."""
        if index in self.bad:
            raise BadImage(self.bad[index])
        return np.empty((self.heights[index], self.widths[index], 0), np.uint8)

    def content(self, index: int) -> bytes | None:
        return self.source.content(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def stamp(self) -> str:
        return self.source.stamp()

    def index(self) -> Index:
        return self.source.index()
