"""What a run asks of images, wherever they come from."""

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import decode
from mocokit.data.index import Index
from mocokit.errors import UserError
from mocokit.files import brief

UNLABELLED = -1  # the label of an image that has no class, among others that have one


@runtime_checkable
class Source(Protocol):
    """Images with stable numbers 0 .. len - 1.

    `labels` are numbers of `classes`, or UNLABELLED; `name` is short and fits into a folder's name;
    the same content has the same `fingerprint`; `notes` are sentences that the images' owner should
    read.
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

    def stamp(self) -> str:
        """What another set of pixels never shares, as far as files' sizes and times tell.

        The fingerprint says whether it is the same data by name, and holds for a copy; what is
        computed from pixels is kept under this.
        """
        ...

    def index(self) -> Index:
        """What tells these images from others, for `save_index`."""
        ...


class Encoded(ABC):
    """Images that are decoded when they are read. Level `top` of deep ones becomes 255.

    `settled`: the scale was fixed when they were written.
    """

    top: int | None = None
    settled = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def content(self, index: int) -> bytes | None:
        """An image as an encoded file; None where bare pixels are stored. Raises BadImage."""

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image; raises BadImage."""
        content = self.content(index)
        assert content is not None
        return decode(content, bound, self.top)

    def scaled(self, fingerprint: str) -> str:
        """A fingerprint that also tells scales apart, for what is computed from pixels."""
        return fingerprint if self.top is None else f"{fingerprint} up to {self.top}"


class Splits(NamedTuple):
    """Images to train on, and others to validate on."""

    train: Source
    validation: Source | None

    def check_classes(self, remedy: str = "remove or rename it, or set data.labels=none") -> None:
        """Raises UserError for a class to validate on that no training image has.

        Sources number such classes after those of training. A run that lost a class since it began
        goes on all the same, so this is asked where something begins.
        """
        train, other = self
        if other is None or train.labels is None or other.labels is None:
            return
        for name in other.classes:
            if name not in train.classes:
                what = f"{other.name} has a class {name} to validate on that no training image has"
                raise UserError(f"{what}: {remedy}")

    def numbered_by(self, classes: tuple[str, ...]) -> "Splits":
        """The same, with validation's labels numbered by these names; others come after them."""
        other = self.validation
        if other is not None and other.labels is not None and other.classes != classes:
            every = extended(classes, other.classes)
            numbers = np.array([every.index(name) for name in other.classes], np.int64)
            other.labels, other.classes = relabelled(other.labels, numbers), every
        return self


def as_splits(source: Source | Splits) -> Splits:
    """A source's images to train on alone, or both splits as they are given.

    Raises UserError for what is neither.
    """
    splits = source if isinstance(source, Splits) else Splits(source, None)
    for one in splits if splits.validation is not None else splits[:1]:
        if not isinstance(one, Source):
            raise UserError(
                f"data = {brief(repr(one))}: must be text, a path, or a source of images with all "
                "that docs/adding/source.md asks of one"
            )
    return splits


def relabelled(labels: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same labels, with class n called numbers[n]. What has no class still has none."""
    return np.append(numbers, UNLABELLED)[labels]


def extended(classes: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of both, the first ones first."""
    return tuple(dict.fromkeys((*classes, *more)))
