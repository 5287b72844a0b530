"""Image files: a folder found in one walk, or a list; numbered by name or line, read one by one."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mocokit.data.cache import Listing, Part, Watch, listed
from mocokit.data.decode import read_file
from mocokit.data.index import Index, stamp_of
from mocokit.data.names import Names, short_name
from mocokit.data.source import Encoded, extended
from mocokit.data.walk import Closed, Endings, entries, has_ending, is_folder, walk
from mocokit.errors import UserError
from mocokit.files import printable, show

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
IMAGES: Endings = frozenset(extension.encode() for extension in EXTENSIONS)
VALIDATION = ("val", "valid", "validation", "test")  # the first that exists is taken
# As others spell them: Train, training, train2017; the held-out ones in VALIDATION's order.
_TRAIN = re.compile(r"train(ing)?([-_]?\d{4})?", re.IGNORECASE)
_HELD_OUT = tuple(
    re.compile(pattern + r"([-_]?\d{4})?", re.IGNORECASE)
    for pattern in ("val", "valid", "validation", "test(ing)?")
)
_FEW = 16  # folders that are looked into for a train/ further down

Labels = Literal["auto", "folders", "none"]


class NoImages(UserError):
    """A folder without image files; it may hold archives of them."""


class FolderSource(Encoded):
    """Image files below `root`, in the order of `names`; of names in no order, that of bytes.

    The fingerprint covers names and labels, not `root` or times of change: those differ between
    copies of the same folder, on which a run must be able to go on.
    """

    notes: tuple[str, ...] = ()

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
        self.fingerprint = digest_names(b"mocokit folder 1", names, labels)

    def __len__(self) -> int:
        return len(self.names)

    def content(self, index: int) -> bytes:
        """The file as it is; raises BadImage."""
        return read_file(self.root / self.names[index])

    def describe(self, index: int) -> str:
        return self.names.shown(index)

    def stamp(self) -> str:
        root = os.fsencode(self.root)
        files = (os.path.join(root, name) for name in self.names.every())
        return stamp_of(self.scaled(self.fingerprint), files)

    def index(self) -> Index:
        known = ("folder", self.name, len(self), self.fingerprint)
        return Index(*known, self.classes, self.names, self.labels, top=self.top)

    @classmethod
    def of_index(cls, root: str | Path, index: Index) -> "FolderSource":
        """The images below `root` by the numbers of an index, without a walk."""
        if index.names is None:
            raise UserError(f"the index of {index.name} names no files: give the images themselves")
        source = cls(root, index.names, index.labels, index.classes, index.name)
        source.top = index.top
        return source


def digest_names(kind: bytes, names: Names, labels: NDArray[np.int64] | None) -> str:
    """A fingerprint of what images are called and of their classes."""
    digest = hashlib.blake2b(kind, digest_size=16)
    digest.update(np.asarray(names.ends, "<i8").tobytes())
    digest.update(np.ascontiguousarray(names.text).data)
    if labels is not None:
        digest.update(np.asarray(labels, "<i8").tobytes())
    return digest.hexdigest()


def open_folder(root: Path, labels: Labels) -> tuple[FolderSource, FolderSource | None]:
    """The images to train on and, where train/ has a sibling for it, those to validate on."""
    place = root.resolve()
    key = f"folder 2 {labels} {place}"
    found = listed(key, lambda watch: _scan(place, short_name(place.name), labels, watch))
    train, beside = found.train, found.validation
    validation = FolderSource.of_index(beside.root, beside.known) if beside else None
    source = FolderSource.of_index(train.root, train.known)
    notes = _splits_perhaps(source.names) if train.root == str(place) else ()
    if labels == "auto" and source.labels is None and not notes:
        notes = _classes_perhaps(source.names)
    source.notes = (*found.notes, *notes)
    return source, validation


def _splits_perhaps(names: Names) -> tuple[str, ...]:
    """What to tell of folders that look like splits, but are trained on with all others."""
    folders = {part for name in names.every() for part in name.split(b"/", 2)[:-1]}
    every = sorted(printable(os.fsdecode(one)) for one in folders)
    found = [one for one in every if any(kind.fullmatch(one) for kind in (_TRAIN, *_HELD_OUT))]
    if not found:
        return ()
    shown = ", ".join(f"{one}/" for one in found[:4])
    text = f"all {len(names):,} images are trained on, though some lie in {shown}: to train on some"
    return (f"{text} alone, give their folder",)


def _classes_perhaps(names: Names) -> tuple[str, ...]:
    """What to tell of folders that look like classes, but are not taken for them unasked."""
    tops = {name.partition(b"/")[0] if b"/" in name else b"" for name in names.every()}
    if b"" in tops or not 2 <= len(tops) <= len(names) // 2:
        return ()
    text = f"no labels: if its {len(tops):,} folders are classes, --set data.labels=folders says so"
    return (text,)


def _scan(root: Path, name: str, labels: Labels, watch: Watch) -> Listing:
    train, beside = find_splits(root, IMAGES, watch)
    found = _found(train, watch)
    # Folders below train/ are classes; elsewhere they may be anything.
    wanted = labels == "folders" or (
        labels == "auto" and train != root and any(b"/" in one for one in found)
    )
    numbers, classes = folder_labels(train, found, wanted, None)
    trained = Part(str(train), _index(name, found, numbers, classes))
    held = sorted(walk(beside, IMAGES, watch)) if beside else []
    if not beside or not held:
        return Listing(trained, None, watch.notes)
    # Validation images without class folders can still be looked at, but not scored.
    wanted = numbers is not None and any(b"/" in one for one in held)
    numbers, classes = folder_labels(beside, held, wanted, classes)
    tested = Part(str(beside), _index(name, held, numbers, classes))
    return Listing(trained, tested, watch.notes)


def find_splits(root: Path, endings: Endings, watch: Watch) -> tuple[Path, Path | None]:
    """The folder to train on, and one to validate on: `root` itself if it has no train/.

    They may lie in one folder below it (data/train, images/train), if all else is empty.
    """
    here = entries(os.fsencode(root), watch)
    top = sorted(os.fsdecode(entry.name) for entry in here if is_folder(entry))
    train, beside = split_names(top)

    def others() -> Iterator[str]:
        """Folders with images, beside the two."""
        for one in top:
            with suppress(Closed):
                if one not in (train, beside) and next(
                    walk(root / one, endings, watch, root), None
                ):
                    yield one

    if train == "train" and beside is None and (other := next(others(), None)):
        # A folder called train among classes looks like a split; guessing would lose images.
        unclear = f"{show(root)} holds images in train/ and in {show(other)}/"
        remedy = f"give {show(root / 'train')} to train on it alone, or rename it if it is one"
        raise UserError(f"{unclear}, so train/ may be a split or a class: {remedy}")
    if train and (train == "train" or beside):
        return root / train, root / beside if beside else None
    if len(top) <= _FEW and not any(has_ending(entry.name, endings) for entry in here):
        for one in top:
            with suppress(Closed):
                below = entries(os.fsencode(root / one), watch)
                train, beside = split_names(os.fsdecode(e.name) for e in below if is_folder(e))
                if train and beside and not any(other != one for other in others()):
                    return root / one / train, root / one / beside
    return root, None


def split_names(folders: Iterable[str]) -> tuple[str | None, str | None]:
    """Which of these folders is the one to train on, and which beside it to validate on."""
    names = sorted(folders, reverse=True)  # small letters first
    trains = [one for one in names if _TRAIN.fullmatch(one)]
    if "train" not in trains and len(trains) != 1:
        return None, None
    held = (one for pattern in _HELD_OUT for one in names if pattern.fullmatch(one))
    return "train" if "train" in trains else trains[0], next(held, None)


def _index(
    name: str, found: list[bytes], labels: NDArray[np.int64] | None, classes: tuple[str, ...]
) -> Index:
    names = Names.of(found)
    return Index("folder", name, len(found), "", classes, names, labels)


def _found(root: Path, watch: Watch) -> list[bytes]:
    """Relative names of all images below `root`, sorted; at least one."""
    if found := sorted(walk(root, IMAGES, watch)):
        return found
    kinds = ", ".join(EXTENSIONS)
    looked = f"found no images below {show(root)}: looked for files that end in {kinds}"
    raise NoImages("; ".join([looked, *watch.notes]))


def folder_labels(
    root: Path, found: list[bytes], wanted: bool, known: tuple[str, ...] | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """The class of each image, its first folder below `root`, as a number; and the classes.

    `known` are the classes that training has, if these images are for validation; others are
    numbered after them.
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
    named = tuple(printable(os.fsdecode(one)) for one in raw)
    classes = named if known is None else extended(known, named)
    numbers = {one: classes.index(name) for one, name in zip(raw, named, strict=True)}
    return np.fromiter((numbers[one] for one in folders), np.int64, len(folders)), classes
