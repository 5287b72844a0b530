"""The way from a text that names images to the images."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal

from mocokit import places
from mocokit.data.arrays import ArraySource, open_arrays
from mocokit.data.folder import FolderSource, NoImages, open_folder
from mocokit.data.index import Index, load_index, save_index
from mocokit.data.listing import ENDINGS as LISTS, open_listing
from mocokit.data.names import short_name, show
from mocokit.data.pack import is_pack
from mocokit.data.packed import PackedSource, open_pack
from mocokit.data.protocol import Source, Splits
from mocokit.data.several import RenumberedSource, SeveralSource, renumbered
from mocokit.data.shards import ShardSource, is_tar, open_shards, open_shards_below
from mocokit.errors import UserError

__all__ = [
    "ArraySource",
    "FolderSource",
    "Index",
    "PackedSource",
    "RenumberedSource",
    "SeveralSource",
    "ShardSource",
    "Source",
    "Splits",
    "load_index",
    "open_data",
    "renumbered",
    "save_index",
]

Labels = Literal["auto", "folders", "none"]


def open_data(path: str | Path | None, labels: Labels = "auto") -> Splits:
    """The images at a place, or at several; None is the embedded demo set.

    A place is a folder, archives, a list, arrays, a pack, or the name of a known set.
    """
    if path is None:
        return _open_demo(labels)
    found = places.split(str(path))
    if not found:
        raise UserError(f"there are no images at {show(path)}: the pattern matches no file")
    opened = list(_open_each(found, labels))
    if len(opened) == 1:
        return opened[0]
    train = SeveralSource([one.train for one in opened])
    held = [one.validation for one in opened if one.validation is not None]
    if not held:
        return Splits(train, None)
    validation = SeveralSource(held)
    if train.labels is not None and validation.labels is not None:
        validation.relabel(train.classes)
    else:
        validation.labels, validation.classes = None, ()
    return Splits(train, validation)


def _open_each(found: list[str], labels: Labels) -> Iterator[Splits]:
    """Neighbouring archives are one source."""
    for tar, group in groupby(found, lambda place: is_tar(place) and not Path(place).is_dir()):
        if tar:
            yield Splits(*open_shards([_existing(place) for place in group], labels))
        else:
            yield from (_open_one(place, labels) for place in group)


def _open_one(text: str, labels: Labels) -> Splits:
    if places.is_elsewhere(text):
        return _open_elsewhere(text, labels)
    place = _existing(text)
    if place.is_dir():
        return _open_folder(place, labels)
    ending = place.suffix.lower()
    if ending in (".npz", ".npy"):
        return Splits(*open_arrays(place, short_name(place.stem), labels))
    if is_pack(place):
        return Splits(*open_pack(place, labels))
    if ending in LISTS:
        return Splits(open_listing(place, labels), None)
    if ending in (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar"):
        remedy = "unpack it, or make it a plain .tar"
        raise UserError(f"{show(place)} is compressed, so it cannot be read at random: {remedy}")
    remedy = "give a folder of images, .tar archives, a .txt that lists them, an .npz or an .npy"
    raise UserError(f"{show(place)} is a file of another kind: {remedy}")


def _open_folder(place: Path, labels: Labels) -> Splits:
    try:
        return Splits(*open_folder(place, labels))
    except NoImages:
        if shards := open_shards_below(place, labels):
            return Splits(*shards)
        raise


def _existing(text: str) -> Path:
    place = Path(text).expanduser()
    try:
        place.stat()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"there are no images at {show(place)} ({why}): check data.path") from error
    return place


def _open_elsewhere(text: str, labels: Labels) -> Splits:
    raise UserError(f"{text} is not there yet")


def _open_demo(labels: Labels) -> Splits:
    from mocokit.data.patterns import demo

    if labels == "folders":
        remedy = "set auto or none, or give a folder of images"
        raise UserError(f"data.labels=folders needs a folder, not the embedded demo set: {remedy}")
    return Splits(*demo(labelled=labels != "none"))
