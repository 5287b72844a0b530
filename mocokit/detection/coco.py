"""COCO's json of images, boxes and categories: an untrusted file, which may contradict itself.

What is stated twice and not alike is left out on every side: nobody can tell which is meant. A
text is not a number, and an id is itself: "1" is another than 1.
"""

import json
import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from mocokit.detection.annotations import Annotated, BadAnnotation, is_name, stated_size
from mocokit.detection.dataset import Problems, RawSample, inside, is_file
from mocokit.errors import UserError
from mocokit.files import printable, read_regular, reason_of, show

Entry = dict[str, Any]
_MOST = 10_000_000  # images or boxes


def read_coco(root: Path, path: Path, problems: Problems) -> list[RawSample]:
    """The images of a COCO json: images, annotations (bbox: left, top, width, height), categories.

    Images may be in a folder named like the file (train2017), in images/, beside the json, or in
    root. What cannot be used is added to `problems`. Raises UserError if the file has another form.
    """
    images, boxes, categories = _content(path)
    names = _names(path, categories, problems)
    found = _images(root, path, images, problems)
    lost: Counter[Hashable] = Counter()
    for label, one in _once(boxes, "an annotation", problems):
        try:
            image, annotated = _box(one, names)
            if image not in found:
                raise BadAnnotation(f"{_shown(image)} is the id of no image")
        except BadAnnotation as error:
            problems.add(label, str(error))
            continue
        sample = found[image]
        if sample is None:
            lost[image] += 1
        else:
            sample.objects.append(annotated)
    for image, count in lost.items():
        problems.add(f"image {_shown(image)}", f"its {count:,} boxes are left out with the image")
    return [sample for sample in found.values() if sample is not None]


def _content(path: Path) -> tuple[list[Any], list[Any], list[Any]]:
    try:
        content = json.loads(read_regular(path), object_pairs_hook=_unlike)
        parts = [content[part] for part in ("images", "annotations", "categories")]
        if any(type(part) is not list for part in parts):
            raise TypeError("its images, annotations and categories are not all lists")
        if max(map(len, parts)) > _MOST:
            raise ValueError(f"it has more than {_MOST:,} entries of a kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else printable(reason_of(error))
        what = f"{show(path)} is not COCO's json of images and boxes ({why})"
        raise UserError(f"{what}: export it again") from None
    return parts[0], parts[1], parts[2]


def _unlike(pairs: list[tuple[str, Any]]) -> Entry:
    """An object of json; one that states a field twice, and not alike, contradicts itself."""
    found = dict(pairs)
    if len(found) < len(pairs) and any(found[name] != value for name, value in pairs):
        twice = next(name for name, value in pairs if found[name] != value)
        raise ValueError(f"an entry states {printable(twice[:60])} twice, and not alike")
    return found


def _names(path: Path, categories: list[Any], problems: Problems) -> dict[Hashable, str]:
    """The name of each category that has one, by its id."""
    names: dict[Hashable, str] = {}
    for number, one in enumerate(categories):
        label = f"category {number}"
        try:
            identity, name = _id(_field(one, "id")), one.get("name")
            if isinstance(name, int) and not isinstance(name, bool):
                name = str(name)
            if not isinstance(name, str) or not is_name(printable(name.strip())):
                raise BadAnnotation(f"category {_shown(identity)} has no name")
            name = printable(name.strip())
        except BadAnnotation as error:
            problems.add(label, str(error))
            continue
        if names.setdefault(identity, name) != name:
            both = f"{names[identity]} and {name}"
            raise UserError(
                f"{show(path)}: {both} are both category {_shown(identity)}, so nobody can tell "
                "whose boxes are whose: give each its own id"
            )
    alike = [name for name, count in Counter(names.values()).items() if count > 1]
    for name in alike:
        problems.add(name, "several categories have this name: taken for one")
    return names


def _images(
    root: Path, path: Path, images: list[Any], problems: Problems
) -> dict[Hashable, RawSample | None]:
    """Each image by its id; None: it is left out."""
    stem = path.stem.removeprefix("instances_")
    places = [root / stem, root / "images" / stem, root / "images", path.parent, root]
    found: dict[Hashable, RawSample | None] = {}
    for identity in _repeated(images):
        found[identity] = None
    files: dict[str, list[Hashable]] = {}
    for label, one in _once(images, "an image", problems):
        try:
            identity, name = _id(_field(one, "id")), one.get("file_name")
            found[identity] = None
            if not isinstance(name, str) or not name:
                raise BadAnnotation(f"image {_shown(identity)} has no file name")
            label = name
            there = next((at for place in places if is_file(at := inside(place, name))), None)
            if there is None:
                raise BadAnnotation("there is no image of that name")
        except BadAnnotation as error:
            problems.add(label, str(error))
            continue
        size = stated_size(_side(one.get("width")), _side(one.get("height")))
        found[identity] = RawSample(printable(name), there, [], size)
        files.setdefault(os.path.normpath(there), []).append(identity)
    for file, several in files.items():
        if len(several) > 1:
            ids = ", ".join(map(_shown, several[:3]))
            problems.add(os.path.basename(file), f"images {ids} have the same file")
            found.update(dict.fromkeys(several))
    return found


def _box(one: Entry, names: dict[Hashable, str]) -> tuple[Hashable, Annotated]:
    """The id of its image, and the box."""
    image, category = _id(_field(one, "image_id")), _id(_field(one, "category_id"))
    if category not in names:
        raise BadAnnotation(f"{_shown(category)} is the id of no category with a name")
    values, crowd = one.get("bbox"), one.get("iscrowd", 0)
    if not isinstance(values, list) or len(values) != 4 or not all(map(_is_number, values)):
        raise BadAnnotation(f"{names[category]} has no box of four numbers")
    if isinstance(crowd, str | list | dict) or crowd not in (0, 1, None):
        raise BadAnnotation(f"{names[category]} has an iscrowd that is neither 0 nor 1")
    left, top, width, height = map(float, values)
    box = left, top, left + width, top + height
    return image, Annotated(names[category], box, crowd == 1)


def _once(entries: list[Any], what: str, problems: Problems) -> list[tuple[str, Entry]]:
    """The entries, each with a label, without those that share an id; of equal ones, the first."""
    repeated, seen, kept = _repeated(entries), set(), []
    for number, one in enumerate(entries):
        label = f"{what.split()[-1]} {number}"
        if not isinstance(one, dict):
            problems.add(label, f"{what} is {_shown(one)}, without id and fields")
            continue
        identity = _id_or_none(one)
        if identity in repeated:
            problems.add(label, f"another has the id {_shown(identity)} too, and is not alike")
        elif identity is not None and identity in seen:
            problems.add(label, f"it is there twice, with the id {_shown(identity)}: counted once")
        else:
            seen.add(identity)
            kept.append((label, one))
    return kept


def _repeated(entries: list[Any]) -> set[Hashable]:
    """Ids that several entries have which are not equal."""
    first: dict[Hashable, Entry] = {}
    repeated: set[Hashable] = set()
    for one in entries:
        identity = _id_or_none(one) if isinstance(one, dict) else None
        if identity is not None and first.setdefault(identity, one) != one:
            repeated.add(identity)
    return repeated


def _id_or_none(one: Entry) -> Hashable:
    try:
        return _id(one.get("id"))
    except BadAnnotation:
        return None


def _field(one: Any, name: str) -> Any:
    if not isinstance(one, dict) or name not in one:
        raise BadAnnotation(f"it lacks {name}")
    return one[name]


def _id(value: Any) -> Hashable:
    """An id that can be compared. A whole float is an integer; True is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        found: Hashable = value
        return found
    raise BadAnnotation(f"{_shown(value)} is no id")


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 2**53 and bool(np.isfinite(value))


def _side(value: Any) -> float | None:
    """A width or height; as text too, since it is only compared."""
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        return None


def _shown(value: Any) -> str:
    return printable(repr(value)[:60])
