"""A folder of images: found in one walk, numbered by name, read one at a time."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import decode
from mocokit.data.index import Index, save_index
from mocokit.data.names import Names, printable, short_name, show
from mocokit.errors import UserError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
_SUFFIXES = frozenset(extension.encode() for extension in EXTENSIONS)
_VALIDATION = ("val", "valid", "validation", "test")  # the first that exists is taken

Labels = Literal["auto", "folders", "none"]


class FolderSource:
    """Images below `root`; image i is the i-th of their relative names in the order of bytes.

    The fingerprint covers names and labels, not `root` or times of change: those differ between
    copies of the same folder, on which a run must be able to go on.
    """

    def __init__(
        self,
        root: str | Path,
        names: Names | Iterable[str],
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...],
        name: str,
    ) -> None:
        if not isinstance(names, Names):
            encoded = [os.fsencode(one) for one in names]
            order = sorted(range(len(encoded)), key=encoded.__getitem__)
            names = Names.of([encoded[i] for i in order])
            labels = None if labels is None else np.asarray(labels, np.int64)[order]
        self.root, self.names, self.labels = Path(root), names, labels
        self.classes, self.name = classes, name
        self.fingerprint = self._digest()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image."""
        return decode(self.root / self.names[index], bound)

    def describe(self, index: int) -> str:
        return printable(self.names[index])

    def save_index(self, path: str | Path) -> None:
        """Write names, labels and fingerprint, for `load_index`."""
        known = ("folder", self.name, len(self), self.fingerprint)
        save_index(Index(*known, self.classes, self.names, self.labels), path)

    @classmethod
    def of_index(cls, root: str | Path, index: Index) -> "FolderSource":
        """The images below `root` by the numbers of an index, without a walk."""
        if index.names is None:
            raise UserError(f"the index of {index.name} names no files: give the images themselves")
        return cls(root, index.names, index.labels, index.classes, index.name)

    def _digest(self) -> str:
        digest = hashlib.blake2b(b"mocokit folder 1", digest_size=16)
        digest.update(np.asarray(self.names.ends, "<i8").tobytes())
        digest.update(np.ascontiguousarray(self.names.text).data)
        if self.labels is not None:
            digest.update(np.asarray(self.labels, "<i8").tobytes())
        return digest.hexdigest()


def open_folder(root: Path, labels: Labels) -> tuple[FolderSource, FolderSource | None]:
    """The images to train on and, where train/ has a sibling for it, those to validate on."""
    name = short_name(root.resolve().name)
    top = [os.fsdecode(entry.name) for entry in _entries(os.fsencode(root)) if _is_folder(entry)]
    if "train" not in top:
        found = _found(root)
        numbers, classes = _labels(root, found, labels == "folders", None)
        return FolderSource(root, Names.of(found), numbers, classes, name), None
    beside = next((one for one in _VALIDATION if one in top), None)
    if beside is None:
        _refuse_class_called_train(root, top)
    found = _found(root / "train")
    nested = labels == "folders" or any(b"/" in one for one in found)
    numbers, classes = _labels(root / "train", found, nested and labels != "none", None)
    train = FolderSource(root / "train", Names.of(found), numbers, classes, name)
    found = sorted(_walk(root / beside)) if beside else []
    if not beside or not found:
        return train, None
    # Validation images without class folders can still be looked at, but not scored.
    nested = train.labels is not None and any(b"/" in one for one in found)
    numbers, _ = _labels(root / beside, found, nested, classes)
    return train, FolderSource(root / beside, Names.of(found), numbers, classes, name)


def _found(root: Path) -> list[bytes]:
    """Relative names of all images below `root`, sorted; at least one."""
    if found := sorted(_walk(root)):
        return found
    kinds = ", ".join(EXTENSIONS)
    raise UserError(f"found no images below {show(root)}: looked for files that end in {kinds}")


def _walk(root: Path) -> Iterator[bytes]:
    """Relative names of the images below `root`, in no order, with / on every system.

    Links are followed, as `find -L` does; one that leads back to a folder above it is left out.
    Links that lead nowhere are listed, so that they are reported when they are read.
    """
    start = os.fsencode(root)
    waiting = [(start, b"", frozenset([_identity(start)]))]
    while waiting:
        folder, prefix, above = waiting.pop()
        for entry in _entries(folder):
            if _is_folder(entry):
                identity = _identity(entry.path)
                if identity not in above:
                    waiting.append((entry.path, prefix + entry.name + b"/", above | {identity}))
            elif _is_image(entry):
                yield prefix + entry.name


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """What a folder holds, without hidden things."""
    try:
        with os.scandir(folder) as entries:
            # lost+found: on every mounted ext4 disk, and readable by root only.
            return [e for e in entries if e.name[:1] != b"." and e.name != b"lost+found"]
    except OSError as error:
        where, why = show(os.fsdecode(folder)), error.strerror
        raise UserError(f"cannot list {where} ({why}): make it readable or move it away") from error


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads to itself


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    _, dot, suffix = entry.name.rpartition(b".")
    if not dot or suffix.lower() not in _SUFFIXES:
        return False
    try:
        # Neither pipes nor sockets, which would block when read.
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _labels(
    root: Path, found: list[bytes], wanted: bool, known: tuple[str, ...] | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """The class of each image, its first folder below `root`, as a number; and the classes.

    `known` are the classes that training has, if these images are for validation.
    """
    if not wanted:
        return None, ()
    for one in found:
        if b"/" not in one:
            where = f"{show(os.fsdecode(one))} lies directly in {show(root)}"
            remedy = "move it into a folder of its class, or set data.labels=none"
            raise UserError(f"{where}, so it has no class: {remedy}")
    folders = [one.partition(b"/")[0] for one in found]
    raw = sorted(set(folders))
    classes = tuple(printable(os.fsdecode(one)) for one in raw) if known is None else known
    positions = {name: position for position, name in enumerate(classes)}
    numbers = {one: positions.get(printable(os.fsdecode(one)), -1) for one in raw}
    for one, number in numbers.items():
        if number < 0:
            where = f"{show(root)} has a class {show(os.fsdecode(one))} that train/ lacks"
            raise UserError(f"{where}: remove or rename that folder, or set data.labels=none")
    return np.fromiter((numbers[one] for one in folders), np.int64, len(folders)), classes


def _refuse_class_called_train(root: Path, folders: list[str]) -> None:
    """A folder called train among other classes looks like a split; guessing would lose images."""
    for other in sorted(folders):
        if other != "train" and next(_walk(root / other), None) is not None:
            unclear = f"{show(root)} holds images in train/ and in {show(other)}/"
            remedy = f"give {show(root / 'train')} to train on it alone, or rename it if it is one"
            raise UserError(f"{unclear}, so train/ may be a split or a class: {remedy}")
