"""The way from a text that names images to the images."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal

from mocokit.data import depth, locations
from mocokit.data.names import short_name
from mocokit.data.source import Splits
from mocokit.data.sources.arrays import open_arrays
from mocokit.data.sources.folder import NoImages, open_folder
from mocokit.data.sources.listing import ENDINGS as LISTS, open_listing
from mocokit.data.sources.named import open_named
from mocokit.data.sources.pack import is_pack
from mocokit.data.sources.packed import open_pack
from mocokit.data.sources.parquet import Counting, open_hub, open_parquet, open_parquet_below
from mocokit.data.sources.several import SeveralSource, unlabelled
from mocokit.data.sources.shards import open_shards, open_shards_below
from mocokit.errors import UserError
from mocokit.files import printable, reason_of, show

Labels = Literal["auto", "folders", "none"]


def open_data(
    path: str | Path | None,
    labels: Labels = "auto",
    root: str | Path | None = None,
    counting: Counting | None = None,
) -> Splits:
    """The images at a place, or at several; None is the embedded demo set.

    A place is a folder, archives, a list, arrays, a pack, parquet files, or the name of a known
    set, which lies below `root` or is downloaded there. `counting(done, total)` is shown what takes
    long. All images of more than 8 bits are read on one scale.
    """
    if path is None:
        return _open_demo(labels)
    splits = _open(path, labels, root, counting)
    depth.settle(splits)
    return splits


def _open(
    path: str | Path, labels: Labels, root: str | Path | None, counting: Counting | None
) -> Splits:
    found = locations.split(str(path))
    if not found:
        raise UserError(f"there are no images at {show(path)}: the pattern matches no file")
    opened = list(_open_each(found, labels, root, counting))
    if len(opened) == 1:
        return opened[0]
    train = SeveralSource([one.train for one in opened])
    held = [one.validation for one in opened if one.validation is not None]
    if not held:
        return Splits(train, None)
    validation = SeveralSource(held)
    train.notes += tuple(f"to validate on: {note}" for note in unlabelled(held))
    if train.labels is not None and validation.labels is not None:
        validation.relabel(train.classes)
    else:
        validation.labels, validation.classes = None, ()
    return Splits(train, validation)


def _open_each(
    found: list[str], labels: Labels, root: str | Path | None, counting: Counting | None
) -> Iterator[Splits]:
    """Neighbouring archives are one source, and so are neighbouring parquet files."""
    for kind, group in groupby(found, _kind):
        if kind == "elsewhere":
            for text in group:
                if text.startswith(locations.HUB):
                    yield open_hub(text, labels, counting)
                else:
                    yield open_named(text, labels, root)
            continue
        here = [_existing(text) for text in group]
        if kind == "tar":
            yield Splits(*open_shards(here, labels))
        elif kind == "parquet":
            yield open_parquet(here, labels, counting)
        elif kind == "folder":
            yield from (_open_folder(place, labels, counting) for place in here)
        else:
            yield from (_open_file(place, labels) for place in here)


def _kind(text: str) -> str:
    if locations.is_elsewhere(text):
        return "elsewhere"
    place = Path(text).expanduser()
    if place.is_dir():
        return "folder"
    return next((kind for kind in ("tar", "parquet") if place.suffix.lower() == f".{kind}"), "file")


def _open_file(place: Path, labels: Labels) -> Splits:
    if not place.is_file():
        raise UserError(f"{show(place)} is a pipe or a device: give a folder or a file of images")
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


def _open_folder(place: Path, labels: Labels, counting: Counting | None) -> Splits:
    try:
        return Splits(*open_folder(place, labels))
    except NoImages:
        if shards := open_shards_below(place, labels):
            return Splits(*shards)
        if tables := open_parquet_below(place, labels, counting):
            return tables
        raise


def _existing(text: str) -> Path:
    place = Path(text).expanduser()
    try:
        place.stat()
    except (OSError, ValueError) as error:
        why = printable(reason_of(error))
        raise UserError(
            f"there are no images at {show(place)} ({why}): {locations.remedy(text)}"
        ) from error
    return place


def _open_demo(labels: Labels) -> Splits:
    from mocokit.data.sources.patterns import demo

    if labels == "folders":
        remedy = "set auto or none, or give a folder of images"
        raise UserError(f"data.labels=folders needs a folder, not the embedded demo set: {remedy}")
    return Splits(*demo(labelled=labels != "none"))
