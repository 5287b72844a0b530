"""Images in tar archives, read at random by their offsets; nothing is ever unpacked.

WebDataset's layout: the members of a sample follow one another and share their name up to the first
dot of its last part (`012.jpg`, `012.cls`). Plain archives of image files are read alike.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mocokit.data.cache import Listing, Part, Watch, listed
from mocokit.data.decode import BadImage
from mocokit.data.index import Index, stamp_of
from mocokit.data.names import Names, short_name
from mocokit.data.npz import Arrays
from mocokit.data.source import Encoded
from mocokit.data.sources.folder import VALIDATION, Labels, digest_names, find_splits, folder_labels
from mocokit.data.sources.tars import Member, members_of, splits_inside
from mocokit.data.walk import Endings, walk
from mocokit.errors import UserError
from mocokit.files import printable, show

TARS: Endings = frozenset([b"tar"])
_SPLIT = re.compile(r"(?:^|[^a-z])(train|val|valid|validation|test)(?:[^a-z]|$)", re.IGNORECASE)


class ShardSource(Encoded):
    """Members of archives, in the order of the archives and of the members in each.

    places: (n, 3) int64, the archive's number, and the member's offset and length in it
    """

    def __init__(
        self,
        archives: Names,
        names: Names,
        places: NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        classes: tuple[str, ...],
        name: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.archives, self.names, self.places = archives, names, places
        self.labels, self.classes, self.name = labels, classes, name
        self.notes = notes
        self.fingerprint = digest_names(b"mocokit shards 1", names, labels)

    def __len__(self) -> int:
        return len(self.names)

    def content(self, index: int) -> bytes:
        """The member as it is; raises BadImage."""
        archive, offset, length = self.places[index].tolist()
        try:
            with open(self.archives[archive], "rb", buffering=0) as file:
                file.seek(offset)
                found: bytes = file.read(length)
        except OSError as error:
            raise BadImage(f"its archive cannot be read: {error.strerror}") from error
        if len(found) < length:
            raise BadImage("its archive ends before it does")
        return found

    def describe(self, index: int) -> str:
        return self.names.shown(index)

    def stamp(self) -> str:
        digest = hashlib.blake2b(np.ascontiguousarray(self.places).data, digest_size=16)
        known = self.scaled(self.fingerprint) + digest.hexdigest()
        return stamp_of(known, self.archives.every())

    def index(self) -> Index:
        known = ("shards", self.name, len(self), self.fingerprint)
        extra = _extra(self.archives, self.places)
        return Index(*known, self.classes, self.names, self.labels, extra, self.top)

    @classmethod
    def of_index(cls, index: Index, notes: tuple[str, ...] = ()) -> "ShardSource":
        """The same members, without a look into the archives."""
        assert index.names is not None
        archives = Names(index.extra["archives"], index.extra["archive_ends"])
        places = index.extra["places"]
        return cls(archives, index.names, places, index.labels, index.classes, index.name, notes)


def open_shards(paths: Sequence[Path], labels: Labels) -> tuple[ShardSource, ShardSource | None]:
    """The images of archives to train on, and those to validate on.

    Where the names of some say train, the others are not trained on.
    """
    places = [path.resolve() for path in paths]
    key = "shards 2 " + " ".join([labels, *map(str, places)])
    train, held = split_by_words(places, [split_word(path.name) for path in places])
    return _sources(listed(key, lambda watch: _scan(train, held, labels, watch)))


def split_word(name: str) -> str:
    """train, val, test, ... where a file's name says so, as in `set-train-0001.tar`; or nothing."""
    match = _SPLIT.search(name)
    return match[1].lower() if match else ""


def split_by_words(paths: Sequence[Path], words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Those to train on, and those to validate on: all and none where no word says train."""
    if "train" not in words:
        return list(paths), []
    beside = next((word for word in VALIDATION if word in words), None)
    by_word = list(zip(paths, words, strict=True))
    train, held = ([path for path, word in by_word if word == one] for one in ("train", beside))
    return train, held


def open_shards_below(root: Path, labels: Labels) -> tuple[ShardSource, ShardSource | None] | None:
    """The same for all archives below a folder, which may have train/ and val/; None: no images."""
    watch = Watch()
    train, beside = find_splits(root, TARS, watch)
    first, second = (
        [folder.resolve() / os.fsdecode(one) for one in sorted(walk(folder, TARS, watch))]
        if folder
        else []
        for folder in (train, beside)
    )
    if not first:
        return None
    if train == root:
        found = open_shards(first, labels)
    else:
        key = "shards 2 " + " ".join([labels, *map(str, first), "::", *map(str, second)])
        found = _sources(listed(key, lambda watch: _scan(first, second, labels, watch)))
    found[0].notes += watch.notes
    return found


def _sources(found: Listing) -> tuple[ShardSource, ShardSource | None]:
    held = ShardSource.of_index(found.validation.known) if found.validation else None
    return ShardSource.of_index(found.train.known, found.notes), held


def _scan(train: list[Path], held: list[Path], labels: Labels, watch: Watch) -> Listing:
    notes: list[str] = []
    trained, tested = (members_of(paths, watch, notes) for paths in (train, held))
    name = short_name(re.sub(r"[-_.]*\d*$", "", train[0].stem) or train[0].parent.name)
    if not trained:
        first = show(train[0])
        raise UserError(f"found no images in {len(train)} archives, the first being {first}")
    divided = None if held else splits_inside(trained)
    if divided:
        (trained, tested), held = divided, train
    # As in a folder with train/: the folders below it are classes.
    nested = divided is not None and any(b"/" in one.inner for one in trained)
    stated = any(one.label for one in trained)
    classed = labels == "folders" or (labels == "auto" and nested and not stated)

    def numbered(
        members: list[Member], archive: Path, known: tuple[str, ...] | None
    ) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
        if classed:
            return folder_labels(archive, [one.inner for one in members], True, known)
        return _labels(members, trained + tested, labels == "auto", notes)

    numbers, classes = numbered(trained, train[0], None)
    part = _part(train, trained, name, numbers, classes)
    if not tested:
        return Listing(part, None, tuple(notes))
    if numbers is not None:
        numbers, classes = numbered(tested, held[0], classes)
    return Listing(part, _part(held, tested, name, numbers, classes), tuple(notes))


def _labels(
    members: list[Member], everything: list[Member], wanted: bool, notes: list[str]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Classes by the .cls of members: numbers as they are, other texts in alphabetical order."""
    given = [one.label for one in members]
    if not wanted or not any(given):
        return None, ()
    if not all(given):
        notes.append("some images in the archives have no .cls beside them: labels are left out")
        return None, ()
    texts = sorted({one.label for one in everything if one.label})
    if all(text.isascii() and text.isdigit() and len(text) < 7 for text in texts):
        classes = tuple(map(str, range(max(map(int, texts)) + 1)))
        return np.fromiter((int(text or 0) for text in given), np.int64, len(given)), classes
    numbers = {text: number for number, text in enumerate(texts)}
    found = np.fromiter((numbers[text or ""] for text in given), np.int64, len(given))
    return found, tuple(map(printable, texts))


def _part(
    paths: list[Path],
    members: list[Member],
    name: str,
    labels: NDArray[np.int64] | None,
    classes: tuple[str, ...],
) -> Part:
    archives = Names.of([os.fsencode(path) for path in paths])
    # Archives are told apart by their names, not their folders, so that a copy is the same data.
    full = [os.fsencode(paths[one.archive].name) + b"/" + one.name for one in members]
    places = np.array([(one.archive, one.offset, one.length) for one in members], np.int64)
    known = ("shards", name, len(members), "", classes, Names.of(full), labels)
    return Part("", Index(*known, _extra(archives, places)))


def _extra(archives: Names, places: NDArray[np.int64]) -> Arrays:
    return {"archives": archives.text, "archive_ends": archives.ends, "places": places}
