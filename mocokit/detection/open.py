"""Training and test images from VOCdevkit, a folder of the same layout, or COCO's json."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mocokit.data import depth
from mocokit.data.decode import read_file
from mocokit.detection.coco import read_coco
from mocokit.detection.dataset import (
    LISTS,
    Advance,
    BoxDataset,
    Problems,
    RawSample,
    Style,
    build,
    class_names,
    identities,
    read_voc,
)
from mocokit.errors import UserError
from mocokit.files import given

Counting = Callable[[str, int], AbstractContextManager[Advance]]
SPLITS = {
    "07+12": ((("VOC2007", "trainval"), ("VOC2012", "trainval")), (("VOC2007", "test"),)),
    "07": ((("VOC2007", "trainval"),), (("VOC2007", "test"),)),
}


class DetectionData(NamedTuple):
    """Training and test images, and how they were split, in words."""

    train: BoxDataset
    test: BoxDataset
    split: str
    devkit: bool  # VOC 2007 and 2012, or folders with these names


def open_boxes(
    data: str | Path, split: str, classes: tuple[str, ...], counting: Counting
) -> DetectionData:
    """Read a data set. Without `classes`, all classes of the training images are used.

    Raises UserError if the folder has neither layout.
    """
    root = given(data)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; use {' or '.join(SPLITS)}")
    if not root.is_dir():
        raise UserError(
            f"{root} is not a folder; give VOCdevkit/, a folder of its layout, or COCO's"
        )
    readers, words, devkit, total = _sides(root, split)
    train_problems, test_problems = Problems(), Problems()
    with counting("annotations read:", total) if total else nullcontext(_silent) as advance:
        train = readers[0](train_problems, advance)
        test = readers[1](test_problems, advance)
    names = classes or class_names(train)
    if not names:
        raise UserError(f"{root} has no annotated object to train on{_first(train_problems)}")
    style: Style = "coco" if words.endswith(".json") else "voc"
    paths = [raw.path for raw in (*train, *test)]
    found = depth.measure(lambda number: read_file(paths[number]), len(paths))
    sides = []
    for side, raws, problems in (("train", train, train_problems), ("test", test, test_problems)):
        named = f"{root.resolve().name} {side}", raws, names, style, problems
        sides.append(build(*named, train=side == "train", top=found.top))
    sides[0] = replace(sides[0], notes=(*found.notes, *sides[0].notes))
    return DetectionData(sides[0], sides[1], words, devkit)


def _silent(count: int) -> None: ...


def _first(problems: Problems) -> str:
    return f"; the first problem: {problems.found[0]}" if problems.found else ""


Side = Callable[[Problems, Advance], list[RawSample]]


def _sides(root: Path, split: str) -> tuple[tuple[Side, Side], str, bool, int]:
    """How to read both, the split in words, whether it is VOCdevkit, and the number of images."""
    if not (root / "VOC2007").is_dir() and (root / "VOCdevkit").is_dir():
        root = root / "VOCdevkit"
    if (root / "VOC2007").is_dir():
        lists = [[(root / folder, name) for folder, name in side] for side in SPLITS[split]]
        return _voc(*lists), f"trainval{split} -> test2007", True, _count(lists)
    if (root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir():
        names = [_list(root, side) for side in ("train", "test")]
        lists = [[(root, name)] for name in names]
        return _voc(*lists), f"{names[0]} -> {names[1]}", False, _count(lists)
    files = [_json(root, words) for words in (("train",), ("val", "test"))]
    if files[0] is None or files[1] is None:
        raise UserError(
            f"{root} holds neither VOC2007/, nor Annotations/ with ImageSets/Main/, nor COCO's "
            "annotations/*train*.json and *val*.json"
        )
    sides = tuple(_coco(root, path) for path in files if path is not None)
    return (sides[0], sides[1]), f"{files[0].name} -> {files[1].name}", False, 0


def _count(lists: list[list[tuple[Path, str]]]) -> int:
    return sum(len(identities(*one)) for side in lists for one in side)


def _voc(train: list[tuple[Path, str]], test: list[tuple[Path, str]]) -> tuple[Side, Side]:
    return (
        lambda problems, advance: read_voc(train, problems, advance),
        lambda problems, advance: read_voc(test, problems, advance),
    )


def _list(root: Path, side: str) -> str:
    for name in LISTS[side]:
        if (root / "ImageSets" / "Main" / f"{name}.txt").is_file():
            return name
    raise UserError(
        f"{root}/ImageSets/Main lists no {side} images: it has neither "
        f"{' nor '.join(f'{name}.txt' for name in LISTS[side])}"
    )


def _json(root: Path, words: tuple[str, ...]) -> Path | None:
    """The only file of boxes with one of these words in its name."""
    for place in (root / "annotations", root):
        for word in words:
            found = sorted(place.glob(f"*{word}*.json"))
            boxes = [path for path in found if path.name.startswith("instances")] or found
            if len(boxes) > 1:
                raise UserError(f"{place} has several *{word}*.json; keep only one of them there")
            if boxes:
                return boxes[0]
    return None


def _coco(root: Path, path: Path) -> Side:
    return lambda problems, advance: read_coco(root, path, problems)
