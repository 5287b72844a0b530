"""Where images come from: everything a run asks of a data set, and the way from a path to one."""

from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mocokit.data.arrays import ArraySource, open_arrays
from mocokit.data.folder import FolderSource, open_folder
from mocokit.data.index import Index, load_index
from mocokit.data.names import short_name, show
from mocokit.errors import UserError

__all__ = ["ArraySource", "FolderSource", "Index", "Source", "Splits", "load_index", "open_data"]


class Source(Protocol):
    """Images with stable numbers 0 .. len - 1.

    `name` is short and fits into a folder's name; the same content has the same `fingerprint`.
    """

    name: str
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image; raises BadImage."""
        ...

    def describe(self, index: int) -> str:
        """What a person calls the image: one printable line."""
        ...

    def save_index(self, path: str | Path) -> None:
        """Write what tells these images from others, for `load_index`."""
        ...


class Splits(NamedTuple):
    """Images to train on, and others to validate on."""

    train: Source
    validation: Source | None


def open_data(
    path: str | Path | None, labels: Literal["auto", "folders", "none"] = "auto"
) -> Splits:
    """The images at a path: a folder, a .npz or a .npy; None is the embedded demo set."""
    if path is None:
        return _open_demo(labels)
    place = Path(path).expanduser()
    try:
        place.stat()
    except OSError as error:
        why = f"there are no images at {show(place)} ({error.strerror})"
        raise UserError(f"{why}: check data.path") from error
    if place.is_dir():
        return Splits(*open_folder(place, labels))
    if place.suffix.lower() in (".npz", ".npy"):
        return Splits(*open_arrays(place, short_name(place.stem), labels))
    remedy = "give a folder of images, an .npz or an .npy (unpack an archive first)"
    raise UserError(f"{show(place)} is a file of another kind: {remedy}")


def _open_demo(labels: Literal["auto", "folders", "none"]) -> Splits:
    from mocokit.data.patterns import demo

    if labels == "folders":
        remedy = "set auto or none, or give a folder of images"
        raise UserError(f"data.labels=folders needs a folder, not the embedded demo set: {remedy}")
    return Splits(*demo(labelled=labels != "none"))
