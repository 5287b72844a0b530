"""Images in an array: a .npz with the keys of MedMNIST, or a .npy."""

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mocokit.data.index import Index, save_index
from mocokit.data.names import show
from mocokit.errors import UserError


class ArraySource:
    """uint8 images (N, H, W, 3), or gray (N, H, W) or (N, H, W, 1); the row is the number.

    The fingerprint is a hash of pixels and labels.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[Any] | None,
        name: str,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        self.images, self.name = images, name
        self.labels = None if labels is None else np.asarray(labels).reshape(-1).astype(np.int64)
        self.classes = numbered(self.labels) if classes is None else classes
        self.fingerprint = self._digest()

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

    def save_index(self, path: str | Path) -> None:
        """Write length and fingerprint, for `load_index`."""
        save_index(Index("array", self.name, len(self), self.fingerprint), path)

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
    """Names for classes that have only numbers."""
    return tuple(
        map(str, range(max((int(one.max()) + 1 for one in labels if one is not None), default=0)))
    )


def open_arrays(
    path: Path, name: str, labels: Literal["auto", "folders", "none"]
) -> tuple[ArraySource, ArraySource | None]:
    """The images of a .npy or .npz to train on, and those to validate on."""
    if labels == "folders":
        raise UserError(
            f"data.labels=folders needs a folder, but {show(path)} is a file: set auto or none"
        )
    if path.suffix.lower() == ".npy":
        images = _images(path, "its array", _load(path, "r"))
        return ArraySource(images, None, name), None
    with _load(path, None) as archive:
        if "train_images" not in archive.files:
            keys = ", ".join(archive.files) or "none"
            remedy = "save the images under train_images"
            raise UserError(f"{show(path)} lacks the key train_images (it has: {keys}): {remedy}")
        images = _images(path, "train_images", _member(path, archive, "train_images"))
        # As in MedMNIST: test_images are what a figure is quoted on.
        held = next((k for k in ("test", "val") if f"{k}_images" in archive.files), None)
        held_images = held and _images(
            path, f"{held}_images", _member(path, archive, f"{held}_images")
        )
        train_labels = held_labels = None
        if labels != "none":
            train_labels = _labels(path, archive, "train", len(images))
            if isinstance(held_images, np.ndarray):
                held_labels = _labels(path, archive, str(held), len(held_images))
    classes = numbered(train_labels, held_labels)
    train = ArraySource(images, train_labels, name, classes)
    if not isinstance(held_images, np.ndarray):
        return train, None
    return train, ArraySource(held_images, held_labels, name, classes)


def _load(path: Path, mode: Literal["r"] | None) -> Any:
    try:
        loaded = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    if isinstance(loaded, np.ndarray) != (path.suffix.lower() == ".npy"):
        raise UserError(f"the content of {show(path)} is not what its ending says: rename it")
    return loaded


def _member(path: Path, archive: Any, key: str) -> NDArray[Any]:
    try:
        return np.asarray(archive[key])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error, f"{key} of ") from error


def _unreadable(path: Path, error: Exception, part: str = "") -> UserError:
    if "allow_pickle" in str(error) or "pickle" in str(error):
        risk = "holds pickled objects, and opening a pickle can run any program"
        return UserError(f"{part}{show(path)} {risk}: save plain arrays of numbers instead")
    why = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
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


def _labels(path: Path, archive: Any, split: str, count: int) -> NDArray[np.int64] | None:
    key = f"{split}_labels"
    if key not in archive.files:
        return None
    labels = _member(path, archive, key)
    where = f"{key} of {show(path)}"
    if labels.shape not in ((count,), (count, 1)):
        wanted = f"one class for each of {count} images: mend it, or set data.labels=none"
        raise UserError(f"{where} has shape {labels.shape}, not {wanted}")
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        found = labels.dtype if labels.dtype.kind not in "iu" else f"the label {labels.min()}"
        remedy = "number the classes from 0, or set data.labels=none"
        raise UserError(f"{where} holds {found}: {remedy}")
    return labels.reshape(-1).astype(np.int64)
