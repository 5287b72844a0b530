"""Annotations that contradict themselves: each kind is named, counted and left out, or refused."""

import copy
import json
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from shapes import write_voc, xml

from mocokit.detection.annotations import read_xml
from mocokit.detection.dataset import BoxDataset
from mocokit.detection.open import DetectionData, open_boxes
from mocokit.errors import UserError

WIDE, TALL, IMAGES, EACH = 60, 40, 5, 3


def opened(root: Path) -> DetectionData:
    return open_boxes(root, "07+12", (), lambda text, total: nullcontext(lambda count: None))


def sound() -> dict[str, Any]:
    """A side of COCO's json: 5 images with 3 boxes each, of two classes."""
    boxes = [
        {"id": n, "image_id": 100 + n // EACH, "category_id": 1 + n % 2, "iscrowd": 0,
         "bbox": [2.0 + n, 3.0, 20.0, 10.0 + n]}
        for n in range(IMAGES * EACH)
    ]  # fmt: skip
    images = [
        {"id": 100 + n, "file_name": f"{n}.png", "width": WIDE, "height": TALL}
        for n in range(IMAGES)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": boxes, "categories": categories}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("coco")
    for side in ("train", "val"):
        (place / side).mkdir()
        for number in range(IMAGES):
            Image.new("RGB", (WIDE, TALL)).save(place / side / f"{number}.png")
    (place / "annotations").mkdir()
    return place


def write(root: Path, train: Any, val: Any) -> None:
    for side, content in (("train", train), ("val", val)):
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "annotations" / f"instances_{side}.json").write_text(text)


def used(side: BoxDataset) -> set[tuple[str, int, tuple[float, ...]]]:
    return {
        (os.path.basename(sample.path), int(label), tuple(box))
        for sample in side.samples
        for box, label in zip(sample.boxes.tolist(), sample.labels, strict=True)
    }


def truth(content: dict[str, Any], boxes: set[int]) -> set[tuple[str, int, tuple[float, ...]]]:
    """These boxes of `sound`, by hand."""
    found = set()
    for n in boxes:
        left, top, width, height = content["annotations"][n]["bbox"]
        box = left, top, left + width, top + height
        found.add((f"{n // EACH}.png", n % 2, box))
    return found


Change = tuple[dict[str, Any], set[int], str]


def box_with(content: dict[str, Any], n: int, **fields: Any) -> Change:
    content["annotations"][n].update(fields)
    return content, {n}, ""


NAN, INF = float("nan"), float("inf")
# What is written into one box (or, of images, into one image), and the words that are said.
BOXES: list[tuple[str, dict[str, Any]]] = [
    ("no image", {"image_id": 7}),
    ("no image", {"image_id": "100"}),
    ("no id", {"image_id": None}),
    ("no id", {"image_id": [100]}),
    ("no id", {"image_id": True}),
    ("no category", {"category_id": 3}),
    ("no category", {"category_id": "1"}),
    ("no id", {"category_id": None}),
    ("no id", {"category_id": 1.5}),
    ("four numbers", {"bbox": ["1", "2", "3", "4"]}),
    ("four numbers", {"bbox": [1, 2, 3]}),
    ("four numbers", {"bbox": [1, 2, 3, 4, 5]}),
    ("four numbers", {"bbox": None}),
    ("four numbers", {"bbox": {"x": 1}}),
    ("four numbers", {"bbox": [1, 2, NAN, 4]}),
    ("four numbers", {"bbox": [1, 2, INF, 4]}),
    ("four numbers", {"bbox": [1, 2, 3, True]}),
    ("four numbers", {"bbox": [1, 2, 10**400, 4]}),
    ("four numbers", {"bbox": [1, 2, 1e300, 4]}),
    ("without area", {"bbox": [1, 2, 0, 4]}),
    ("without area", {"bbox": [1, 2, 3, -4]}),
    ("outside", {"bbox": [500, 2, 3, 4]}),
    ("outside", {"bbox": [-30, 2, 3, 4]}),
    ("shares of the image", {"bbox": [0.1, 0.2, 0.5, 0.25]}),
    ("shares of the image", {"bbox": [0, 0, 1, 1]}),
    ("iscrowd", {"iscrowd": 2}),
    ("iscrowd", {"iscrowd": "1"}),
    ("iscrowd", {"iscrowd": [0]}),
    ("iscrowd", {"iscrowd": NAN}),
]
PICTURES: list[tuple[str, dict[str, Any]]] = [
    ("no image of that name", {"file_name": "gone.png"}),
    ("no file name", {"file_name": None}),
    ("no file name", {"file_name": 7}),
    ("no image of that name", {"file_name": "x" * 10**6}),
    ("no image of that name", {"file_name": "\ud800"}),
    ("leads out", {"file_name": "../secret.png"}),
    ("leads out", {"file_name": "/etc/passwd"}),
    ("are annotated", {"width": TALL, "height": WIDE}),
    ("are annotated", {"width": str(2 * WIDE), "height": str(2 * TALL)}),
    ("no id", {"id": None}),
    ("no id", {"id": [1]}),
]


@pytest.mark.parametrize("field", ["bbox", "image_id", "category_id", "id", "images"])
def test_a_field_that_is_stated_twice(root: Path, field: str) -> None:
    """A reader of json keeps the last one, and nobody is told."""
    text = json.dumps(sound())
    value = json.dumps(sound()["images"] if field == "images" else sound()["annotations"][0][field])
    for again, alike in ((value, True), ("[]", False)):
        twice = text.replace(f'"{field}": ', f'"{field}": {again}, "{field}": ', 1)
        if field == "id":  # the first is an image's
            twice = text.replace('{"id": 0,', f'{{"id": {again}, "id": 0,', 1)
        assert twice != text
        write(root, twice, sound())
        if alike:
            assert used(opened(root).train) == truth(sound(), set(range(15)))
        else:
            with pytest.raises(UserError, match=f"an entry states {field} twice, and not alike"):
                opened(root)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_said_is_left_out_and_nothing_else(root: Path, data: st.DataObject) -> None:
    content = sound()
    words: set[str] = set()
    pictures = data.draw(st.sets(st.integers(0, IMAGES - 1), max_size=2), "images")
    boxes = data.draw(st.sets(st.integers(0, IMAGES * EACH - 1), max_size=6), "boxes")
    for part, numbers, kinds in (("annotations", boxes, BOXES), ("images", pictures, PICTURES)):
        for n in numbers:
            word, fields = data.draw(st.sampled_from(kinds))
            content[part][n] |= fields
            if part == "images" or n // EACH not in pictures:
                words.add(word)
    lost = boxes | {n for n in range(IMAGES * EACH) if n // EACH in pictures}
    kept = set(range(IMAGES * EACH)) - lost
    for side, other in (("train", "val"), ("val", "train")):
        write(root, **{side: content, other: sound()})
        if not kept:
            with pytest.raises(UserError, match="left out"):
                opened(root)
            continue
        found = getattr(opened(root), {"train": "train", "val": "test"}[side])
        assert used(found) == truth(sound(), kept)
        said = "\n".join(found.problems)
        for word in words:
            assert word in said, (word, said)
        # Every box that is not used is counted: by its own line, or by its image's.
        counts = [re.search(r"its ([\d,]+) boxes", one) for one in found.problems]
        assert sum(int(one[1]) if one else 1 for one in counts) >= len(lost), said
        assert all(len(one) < 450 and one.isprintable() for one in found.problems)


@pytest.mark.parametrize(
    "places",
    [
        [("images", "id")],
        [("annotations", "id")],
        [("annotations", "image_id")],
        [("annotations", "category_id")],
        [("categories", "id")],
        [("images", "id"), ("annotations", "image_id")],
        [("categories", "id"), ("annotations", "category_id")],
    ],
)
def test_a_whole_float_is_the_integer(root: Path, places: list[tuple[str, str]]) -> None:
    """As pandas writes ids where a column has a gap."""
    content = sound()
    for part, field in places:
        for one in content[part]:
            one[field] = float(one[field])
    write(root, content, sound())
    found = opened(root).train
    assert used(found) == truth(sound(), set(range(IMAGES * EACH))) and not found.problems


@pytest.mark.parametrize("what", ["images", "annotations"])
@pytest.mark.parametrize("alike", [True, False])
def test_an_id_that_is_there_twice(root: Path, what: str, alike: bool) -> None:
    """What is equal counts once. What is not is left out altogether, with all that lean on it."""
    content = sound()
    again = copy.deepcopy(content[what][0])
    if not alike:
        again |= {"file_name": "3.png"} if what == "images" else {"bbox": [1, 1, 9, 9]}
    content[what].append(again)
    write(root, content, content)
    data = opened(root)
    gone = set() if alike else set(range(EACH)) if what == "images" else {0}
    for side in (data.train, data.test):
        assert used(side) == truth(content, set(range(IMAGES * EACH)) - gone)
        said = "\n".join(side.problems)
        assert ("counted once" if alike else "has the id") in said
        if gone and what == "images":
            assert f"its {EACH} boxes are left out" in said


def test_all_ids_twice_is_refused(root: Path) -> None:
    """Else an AP would be printed over images that no box is left in."""
    content = sound()
    for one in content["images"]:
        one["id"] = one["id"] // 2
    for one in content["annotations"]:
        one["image_id"] = one["image_id"] // 2
    content["images"].pop(), content["annotations"].pop()
    write(root, content, sound())
    with pytest.raises(UserError, match="no annotated object|no image with a usable"):
        opened(root)
    write(root, sound(), content)
    with pytest.raises(UserError, match=r"no image with a usable annotation; \d+ were left out"):
        opened(root)


def test_a_file_under_two_ids(root: Path) -> None:
    content = sound()
    content["images"].append({"id": 900, "file_name": "./0.png", "width": WIDE, "height": TALL})
    content["annotations"].append({"image_id": 900, "category_id": 1, "bbox": [1, 1, 9, 9]})
    write(root, content, content)
    data = opened(root)
    for side in (data.train, data.test):
        assert used(side) == truth(content, set(range(EACH, IMAGES * EACH)))
        said = "\n".join(side.problems)
        assert "0.png: images 100, 900 have the same file" in said
        assert "image 100: its 3 boxes" in said and "image 900: its 1 boxes" in said


@pytest.mark.parametrize("name", [None, "", "  ", [], {"a": 1}, True, "x" * 200, "\n"])
def test_a_category_without_a_name(root: Path, name: Any) -> None:
    """Its boxes are left out; `None` is no class called None."""
    content = sound()
    content["categories"][1]["name"] = name
    write(root, content, content)
    data = opened(root)
    for side in (data.train, data.test):
        assert side.classes == ("cat",)
        assert len(used(side)) == 8 and len(side.problems) == 7 + 1
        assert sum("no category with a name" in one for one in side.problems) == 7


def test_categories_that_share_an_id_or_a_name(root: Path) -> None:
    content = sound()
    content["categories"].append({"id": 1, "name": "cow"})
    write(root, content, sound())
    with pytest.raises(UserError, match="cat and cow are both category 1"):
        opened(root)
    content = sound()
    content["categories"][1]["name"] = "cat"
    write(root, content, content)
    data = opened(root)
    assert data.train.classes == ("cat",) and len(used(data.test)) == 15
    assert "several categories have this name" in data.train.problems[0]
    content = sound()
    content["categories"].append({"id": 1, "name": "cat"})  # equal: said by nobody
    write(root, content, content)
    assert used(opened(root).train) == truth(content, set(range(15)))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "7", "{}", "[" * 10**5,
        '{"images": 1, "annotations": 2, "categories": 3}',
        '{"images": {}, "annotations": [], "categories": []}', '{"images": ' + "9" * 5000 + "}",
        '{"images": null, "annotations": null, "categories": null}', "\x00", "{'a': 1}",
    ],
)  # fmt: skip
def test_another_form_is_one_sentence(root: Path, text: str) -> None:
    write(root, text, sound())
    with pytest.raises(UserError, match="is not COCO's json of images and boxes") as caught:
        opened(root)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_any_place_is_a_sentence_or_a_count(root: Path, data: st.DataObject) -> None:
    """Numbers are no ids of this file: another valid id would be another sound file."""
    content = sound()
    whole = st.integers(max_value=-1) | st.integers(min_value=1000)
    broken = st.floats().filter(lambda number: not number.is_integer())
    strange = st.recursive(
        st.none() | st.booleans() | whole | broken | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    )
    for _ in range(data.draw(st.integers(1, 4))):
        part = content[data.draw(st.sampled_from(sorted(content)))]
        at = data.draw(st.integers(0, len(part) - 1))
        if isinstance(part[at], dict) and part[at] and data.draw(st.booleans()):
            part[at][data.draw(st.sampled_from(sorted(part[at])))] = data.draw(strange)
        else:
            part[at] = data.draw(strange)
    write(root, content, sound())
    try:
        found = opened(root).train
    except UserError as error:
        assert str(error).isprintable()
        return
    # A category may have another name by now, and classes are in the order of names.
    boxes, expected = (
        {(file, box) for file, _, box in one} for one in (used(found), truth(sound(), {*range(15)}))
    )
    assert boxes == expected or found.problems


def test_boxes_that_reach_beyond_are_told(root: Path) -> None:
    content = sound()
    content["annotations"][0]["bbox"] = [30, 20, 55, 38]
    write(root, content, sound())
    (note,) = opened(root).train.notes
    assert note.startswith("1 boxes of") and note.endswith("more than a pixel")
    for one in content["annotations"]:
        one["bbox"] = [30, 20, 55, 38]  # right and bottom in place of width and height
    write(root, content, sound())
    (note,) = opened(root).train.notes
    assert note.startswith("15 boxes of") and "left, top, width, height" in note


def test_every_kind_is_among_the_first_that_are_named(root: Path) -> None:
    """The report names 20: a hundred of one kind do not hide the one of another."""
    content = sound()
    content["annotations"] += [{"image_id": 5, "category_id": 1, "bbox": [1, 1, 2, 2]}] * 100
    content["annotations"].append({"image_id": 100, "category_id": 1, "bbox": [900, 1, 2, 2]})
    write(root, content, sound())
    problems = opened(root).train.problems
    assert len(problems) == 101 and "outside" in "".join(problems[:2])


OBJECT = "<object><name>cat</name><bndbox>{}</bndbox>{}</object>"


def corners(*values: Any) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    return "".join(f"<{n}>{v}</{n}>" for n, v in zip(names, values, strict=True))


@pytest.mark.parametrize(
    "inside, said",
    [
        ("<size><width>80</width><height>40</height></size>", "80 x 40 pixels are annotated"),
        ("<size><width>40</width><height>60</height></size>", "but 60 x 40 is its image"),
        ("<size><width>0</width><height>0</height></size>", ""),
        ("<size><width>60</width><height>40</height></size>", ""),
        ("<size><width>60.0</width></size>", ""),
        ("<size><width>60</width><width>50</width></size>", "states its size twice, and not alike"),
        (OBJECT.format(corners("nan", 1, 2, 3), ""), "no box of four numbers"),
        (OBJECT.format(corners("inf", 1, 2, 3), ""), "no box of four numbers"),
        (OBJECT.format(corners(1, 1, "1_0", 3), ""), "no box of four numbers"),
        (OBJECT.format(corners(1, 1, "1" + "0" * 400, 3), ""), "without area"),
        (OBJECT.format(corners(0.1, 0.2, 0.8, 0.9), ""), "shares of the image"),
        (OBJECT.format(corners(3, 3, 9, 9) + "<xmin>4</xmin>", ""), "twice, and not alike"),
        (OBJECT.format(corners(3, 3, 9, 9), "<name>dog</name>"), "twice, and not alike"),
        (OBJECT.format(corners(3, 3, 9, 9), "<difficult>2</difficult>"), "neither difficult"),
        (OBJECT.format(corners(3, 3, 9, 9), "<difficult>1</difficult>"), ""),
        (OBJECT.format(corners(3, 3, 9, 9), "<name>cat</name>"), ""),
    ],
)
def test_what_a_file_of_voc_contradicts(inside: str, said: str, tmp_path: Path) -> None:
    good = xml([("cat", (11, 6, 30, 25))])
    picture = Image.new("RGB", (60, 40))
    changed = good.replace("</annotation>", inside + "</annotation>")
    assert changed != good
    pictures = {"a": (picture, good), "b": (picture, changed)}
    root = write_voc(tmp_path, {"trainval": "ab", "test": "ab"}, pictures)
    data = opened(root)
    for side in (data.train, data.test):
        problems = "\n".join(side.problems)
        assert said in problems and bool(problems) == bool(said)
        boxes = sum(len(sample.boxes) for sample in side.samples)
        lost = any(part in said for part in ("annotated", "its image", "its size"))
        assert boxes == (1 if lost else 2) + (not said and "<object>" in inside)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(
    "again, alike",
    [
        ("<name>cow</name>", False),
        ("<difficult>1</difficult>", False),
        ("<bndbox><xmin>12</xmin></bndbox>", False),
        ("<bndbox><ymin>7</ymin></bndbox>", False),
        ("<bndbox><xmax>31</xmax></bndbox>", False),
        ("<bndbox><ymax>26</ymax></bndbox>", False),
        ("<name>cat</name><difficult> 0 </difficult><bndbox><xmin>11</xmin></bndbox>", True),
        ("<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>", True),
    ],
)
def test_an_object_that_contradicts_itself_is_the_one_left_out(
    again: str, alike: bool, at: int, tmp_path: Path
) -> None:
    boxes: list[tuple[str, tuple[int, int, int, int]]] = [
        (name, (11, 6, 30, 25)) for name in ("ant", "bee", "owl")
    ]
    boxes[at] = "cat", boxes[at][1]
    parts = xml(boxes).split("</object>")
    parts[at] += again
    (tmp_path / "a.xml").write_text("</object>".join(parts))
    objects, reasons, _ = read_xml(tmp_path / "a.xml")
    kept = [name for name, _ in boxes if alike or name != "cat"]
    assert objects == [(name, (11, 6, 30, 25), False) for name in kept]
    said = [] if alike else [f"object {at + 1}: states the same twice, and not alike"]
    assert reasons == said


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "binary", "huge"])
@pytest.mark.parametrize("place", ["list", "xml", "image", "json"])
def test_no_pipe_or_device_is_waited_for(kind: str, place: str, tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    pictures = {n: (Image.new("RGB", (60, 40)), xml([("cat", (11, 6, 30, 25))])) for n in "ab"}
    root = write_voc(tmp_path / "v", {"trainval": "ab", "test": "ab"}, pictures)
    if place == "json":
        root = tmp_path / "c"
        (root / "annotations").mkdir(parents=True)
        write(root, sound(), sound())
    target = (
        root
        / {
            "list": "ImageSets/Main/trainval.txt",
            "xml": "Annotations/a.xml",
            "image": "JPEGImages/a.jpg",
            "json": "annotations/instances_train.json",
        }[place]
    )
    target.unlink()
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "device":
        target.symlink_to("/dev/zero")
    elif kind == "folder":
        target.mkdir()
    elif kind == "binary":
        target.write_bytes(np.random.default_rng(0).bytes(5000))
    else:
        with open(target, "wb") as file:
            file.truncate(2**41)  # sparse: no room is taken
    try:
        problems = opened(root).train.problems
    except UserError as error:
        assert str(error).isprintable() and place != "image"
    else:
        assert place in ("xml", "image") and len(problems) == 1
