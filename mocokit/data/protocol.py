"""What a run asks of images, wherever they come from."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mocokit.data.index import Index


class Source(Protocol):
    """Images with stable numbers 0 .. len - 1.

    `name` is short and fits into a folder's name; the same content has the same `fingerprint`;
    `notes` are sentences that the images' owner should read.
    """

    name: str
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image; raises BadImage."""
        ...

    def content(self, index: int) -> bytes | None:
        """An image as an encoded file; None where bare pixels are stored. Raises BadImage."""
        ...

    def describe(self, index: int) -> str:
        """What a person calls the image: one printable line."""
        ...

    def index(self) -> Index:
        """What tells these images from others, for `save_index`."""
        ...


class Splits(NamedTuple):
    """Images to train on, and others to validate on."""

    train: Source
    validation: Source | None
