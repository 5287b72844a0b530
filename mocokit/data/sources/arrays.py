"""Images in an array: a .npz with the keys of MedMNIST, or a .npy."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mocokit.data.index import Index
from mocokit.data.npz import DAMAGE, Archive, map_array
from mocokit.errors import UserError
from mocokit.files import printable, reason_of, show

MAX_CLASSES = 10**6


class ArraySource:
    """uint8 images (N, H, W, 3), or gray (N, H, W) or (N, H, W, 1); the row is the number.

    The fingerprint is a hash of pixels and labels, unless a cheaper one is known.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[Any] | None,
        name: str,
        classes: tuple[str, ...] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        self.images, self.name = images, name
        self.labels = None if labels is None else np.asarray(labels).reshape(-1).astype(np.int64)
        self.classes = numbered(self.labels) if classes is None else classes
        self.fingerprint = fingerprint or self._digest()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image; arrays are small, so `bound` is not needed."""
        pixels: NDArray[np.uint8] = self.gather(np.array([index]))[0]
        return pixels

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The pixels (n, H, W, 3) of many images at once."""
        pixels = np.asarray(self.images[indices])
        return pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, axis=3)

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def content(self, index: int) -> None:
        """Arrays hold bare pixels."""

    def stamp(self) -> str:
        return self.fingerprint

    def index(self) -> Index:
        return Index("array", self.name, len(self), self.fingerprint)

    def _digest(self) -> str:
        digest = hashlib.blake2b(b"mocokit array 1", digest_size=16)
        digest.update(repr(self.images.shape).encode())
        rows = max(1, 2**24 // max(1, self.images[:1].size))
        for first in range(0, len(self.images), rows):
            # In parts: an array mapped from disk need not fit into memory.
            digest.update(np.ascontiguousarray(self.images[first : first + rows]).data)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def numbered(*labels: NDArray[np.int64] | None) -> tuple[str, ...]:
    """Names for classes that have only numbers; raises UserError for numbers of another kind."""
    most = max((int(one.max(initial=-1)) for one in labels if one is not None), default=-1)
    if most >= MAX_CLASSES:
        remedy = "number the classes from 0, or set data.labels=none"
        raise UserError(f"there is a class number {most}, above {MAX_CLASSES:,}: {remedy}")
    return tuple(map(str, range(most + 1)))


def open_arrays(
    path: Path, name: str, labels: Literal["auto", "folders", "none"]
) -> tuple[ArraySource, ArraySource | None]:
    """The images of a .npy or .npz to train on, and those to validate on."""
    if labels == "folders":
        raise UserError(
            f"data.labels=folders needs a folder, but {show(path)} is a file: set auto or none"
        )
    if path.suffix.lower() == ".npy":
        images = _images(path, "its array", _map(path))
        return ArraySource(images, None, name), None
    with _opened(path) as archive:
        return _splits(path, archive, name, labels != "none")


def _splits(
    path: Path, archive: Archive, name: str, labelled: bool
) -> tuple[ArraySource, ArraySource | None]:
    keys = archive.files
    if "train_images" not in keys:
        found, remedy = (
            printable(", ".join(keys))[:300] or "none",
            "save the images under train_images",
        )
        raise UserError(f"{show(path)} lacks the key train_images (it has: {found}): {remedy}")
    # As in MedMNIST: test_images are what a figure is quoted on.
    held = next((split for split in ("test", "val") if f"{split}_images" in keys), None)
    parts = []
    for split in ("train", held) if held else ("train",):
        images = _images(path, f"{split}_images", _member(path, archive, f"{split}_images"))
        parts.append((images, _labels(path, archive, split, len(images)) if labelled else None))
    classes = numbered(*(labels for _, labels in parts))
    sources = [ArraySource(images, labels, name, classes) for images, labels in parts]
    return sources[0], sources[1] if held else None


def _map(path: Path) -> NDArray[Any]:
    try:
        return map_array(path)
    except DAMAGE as error:
        raise _unreadable(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[Archive]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
            raise UserError(f"{show(path)} holds a single array: let its name end in .npy")
        try:
            archive = Archive(file)
        except DAMAGE as error:
            raise _unreadable(path, error) from error
        yield archive


def _member(path: Path, archive: Archive, key: str) -> NDArray[Any]:
    try:
        return archive[key]
    except DAMAGE as error:
        raise _unreadable(path, error, f"{key} of ") from error


def _unreadable(path: Path, error: Exception, part: str = "") -> UserError:
    if "pickle" in str(error) or "Python objects" in str(error):
        risk = "holds pickled objects, and opening a pickle can run any program"
        return UserError(f"{part}{show(path)} {risk}: save plain arrays of numbers instead")
    why = printable(reason_of(error))
    return UserError(f"{part}{show(path)} cannot be read ({why}): save or download it again")


def _images(path: Path, key: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    where = f"{key} of {show(path)}"
    if images.dtype != np.uint8:
        raise UserError(f"{where} has type {images.dtype}: save it as uint8, 0 to 255")
    gray = images.ndim == 3 and images.shape[2] != 3
    if not (gray or (images.ndim == 4 and images.shape[3] in (1, 3))):
        wanted = "(images, height, width, 3), or without the 3 if gray"
        raise UserError(f"{where} has shape {images.shape}: save it as {wanted}")
    if images.size == 0:
        raise UserError(f"{where} has shape {images.shape}, without a pixel: give it images")
    return images


def _labels(path: Path, archive: Archive, split: str, count: int) -> NDArray[np.int64] | None:
    key = f"{split}_labels"
    if key not in archive.files:
        return None
    labels = _member(path, archive, key)
    where = f"{key} of {show(path)}"
    if labels.shape not in ((count,), (count, 1)):
        wanted = f"one class for each of {count} images: mend it, or set data.labels=none"
        raise UserError(f"{where} has shape {labels.shape}, not {wanted}")
    wrong = labels.dtype.kind not in "iu"
    if wrong or labels.min() < 0 or labels.max() >= MAX_CLASSES:
        number = labels.min() if not wrong and labels.min() < 0 else labels.max()
        found = labels.dtype if wrong else f"the label {number}"
        remedy = "number the classes from 0, or set data.labels=none"
        raise UserError(f"{where} holds {found}: {remedy}")
    return labels.reshape(-1).astype(np.int64)
