"""Images with boxes: layouts, and annotations as strangers write them."""

import json
from contextlib import contextmanager

import pytest
from PIL import Image
from shapes import write_shapes, write_voc, xml

from mocokit.detection import annotations
from mocokit.detection.annotations import BadAnnotation, read_xml
from mocokit.detection.open import open_boxes
from mocokit.detection.protocol import plan_for
from mocokit.detection.views import ViewSampler
from mocokit.errors import UserError


@contextmanager
def counting(text, total):
    yield lambda count: None


def opened(root, split="07+12", classes=()):
    return open_boxes(root, split, classes, counting)


def grey(wide=60, tall=40):
    return Image.new("RGB", (wide, tall), (90, 90, 90))


GOOD = [("cat", (11, 6, 30, 25))]


def test_pixels_from_one_become_edges_from_zero(tmp_path):
    """As detectron2: (1, 1, W, H) is the whole image, so left and top lose one pixel."""
    whole = [("cat", (1, 1, 60, 40)), ("dog", (11, 6, 30, 25), True)]
    pictures = {"a": (grey(), xml(whole)), "b": (grey(), xml(GOOD))}
    data = opened(write_voc(tmp_path, {"trainval": ["a"], "test": ["b"]}, pictures))
    sample = data.train.samples[0]
    assert sample.boxes.tolist() == [[0, 0, 60, 40], [10, 5, 30, 25]]
    # Difficult boxes are trained on, as there.
    assert data.train.classes == ("cat", "dog") and sample.labels.tolist() == [0, 1]
    assert sample.difficult.tolist() == [False, True] and not data.train.problems
    assert data.test.classes == ("cat", "dog") and data.split == "trainval -> test"


def test_a_data_set_of_the_current_folder_has_its_name(tmp_path, monkeypatch):
    pictures = {"a": (grey(), xml(GOOD)), "b": (grey(), xml(GOOD))}
    root = write_voc(tmp_path / "shapes", {"trainval": ["a"], "test": ["b"]}, pictures)
    monkeypatch.chdir(root)
    for named in (".", root, root / "JPEGImages" / ".."):
        data = opened(named)
        assert (data.train.name, data.test.name) == (f"{root.name} train", f"{root.name} test")


def test_images_of_which_none_can_be_used(tmp_path):
    names = ["a", "b", "c"]
    pictures = {name: (grey(), xml(GOOD)) for name in [*names, "t"]}
    root = write_voc(tmp_path, {"trainval": names, "test": ["t"]}, pictures)
    samples = opened(root).train.samples
    for name in names:
        (root / f"JPEGImages/{name}.jpg").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"^3 images in a row cannot be used; the first .*/[abc] \("
    ):
        ViewSampler(samples, plan_for("07", 10, 3, None), 0).step(0)


def test_the_devkit_and_its_splits(tmp_path):
    for year, lists in {"VOC2007": ["trainval", "test"], "VOC2012": ["trainval"]}.items():
        names = {name: [f"{year[-2:]}{name}"] for name in lists}
        pictures = {n[0]: (grey(), xml(GOOD)) for n in names.values()}
        write_voc(tmp_path / "VOCdevkit" / year, names, pictures)
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        both, one = opened(root), opened(root, "07")
        assert [s.name for s in both.train.samples] == ["VOC2007/07trainval", "VOC2012/12trainval"]
        assert [s.name for s in one.train.samples] == ["VOC2007/07trainval"]
        assert [s.name for s in both.test.samples] == ["VOC2007/07test"] and both.devkit
        assert both.train.fingerprint != one.train.fingerprint
    with pytest.raises(UserError, match=r"unknown split '12'; use 07\+12 or 07"):
        opened(tmp_path, "12")
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt").unlink()
    with pytest.raises(UserError, match=r"VOC2012.*trainval.txt cannot be read"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a\nb\nc\n", "abc"),
        ("a\nb\na\na\nc\nb", "abc"),  # each once, where it is first named
        ("c\r\nb\r\n\r\na", "cba"),
        ("\ufeffa\n \n\t\n  b  \n", "ab"),
        ("a  1\nb -1\nc  0\na -1\n", "abc"),  # a list of one class, as VOC has them
    ],
)
def test_a_list_names_each_image_once(tmp_path, text, names):
    pictures = {name: (grey(), xml(GOOD)) for name in "abc"}
    root = write_voc(tmp_path, {"trainval": "abc", "test": "abc"}, pictures)
    for name in ("trainval", "test"):
        (root / f"ImageSets/Main/{name}.txt").write_text(text, encoding="utf-8", newline="")
    data = opened(root)
    for side in (data.train, data.test):
        assert [sample.path.stem for sample in side.samples] == list(names)
        assert side.problems == side.notes == ()


def test_broken_annotations_are_named_and_left_out(tmp_path):
    names = ["good", "flat", "out", "half", "noxml", "noimage", "cut", "suffix", "noname", "text"]
    boxes = {
        "flat": [("cat", (5, 5, 5, 20)), *GOOD],
        "out": [("cat", (200, 5, 230, 20)), *GOOD],
        "half": [("cat", (-5, 5, 100, 20))],
        "noname": [("", (5, 5, 20, 20)), *GOOD],
        "text": [("cat", ("x", 5, 20, 20)), *GOOD],
    }
    pictures = {name: (grey(), xml(boxes.get(name, GOOD))) for name in names}
    pictures["t"] = (grey(), xml([*GOOD, ("unicorn", (5, 5, 20, 20))]))
    root = write_voc(tmp_path, {"trainval": names, "test": ["t"]}, pictures)
    (root / "Annotations/noxml.xml").unlink()
    (root / "JPEGImages/noimage.jpg").unlink()
    (root / "JPEGImages/suffix.jpg").rename(root / "JPEGImages/suffix.JPG")
    text = (root / "Annotations/cut.xml").read_text()
    (root / "Annotations/cut.xml").write_text(text[:40])
    data = opened(root)
    kept = {sample.name.split("/")[1]: sample for sample in data.train.samples}
    assert set(kept) == {"good", "flat", "out", "half", "suffix", "noname", "text"}
    assert all(len(sample.boxes) == 1 for sample in kept.values())
    said = "\n".join(data.train.problems)
    assert len(data.train.problems) == 7
    for words in (
        "flat: object 1: cat has a box without area",
        "out: cat has a box outside of the image",
        "noxml: there is no such annotation",
        "noimage: there is no image of that name",
        "cut: ",
        "noname: object 1: has no name",
        "text: object 1: cat has no box of four numbers",
    ):
        assert words in said
    assert data.train.notes == (
        f"1 images of {root.name} train were found under another suffix",
        f"1 boxes of {root.name} train reach beyond their images by more than a pixel",
    )
    assert [p.split("/")[1] for p in data.test.problems] == ["t: unknown class unicorn"]


def test_a_class_list_may_be_given(tmp_path):
    pictures = {n: (grey(), xml([("cat", (5, 5, 20, 20)), ("dog", (5, 5, 20, 20))])) for n in "ab"}
    data = opened(write_voc(tmp_path, {"trainval": "a", "test": "b"}, pictures), classes=("dog",))
    assert data.train.classes == ("dog",) and len(data.train.samples[0].boxes) == 1
    assert "unknown class cat" in data.train.problems[0]


def test_images_without_boxes_are_tested_but_not_trained_on(tmp_path):
    pictures = {"a": (grey(), xml(GOOD)), "b": (grey(), xml([])), "c": (grey(), xml([]))}
    root = write_voc(tmp_path, {"trainval": ["a", "b"], "test": ["a", "c"]}, pictures)
    data = opened(root)
    assert len(data.train.samples) == 1 and len(data.test.samples) == 2
    assert "1 images" in data.train.notes[0] and "not trained on" in data.train.notes[0]


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;&b;">]>'
FILE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (xml([("&c;", (1, 1, 9, 9))], BOMB), "entities, refused"),
        (xml([("&b;", (1, 1, 9, 9))], FILE), "entities, refused"),
        ("<a>" * 40 + "</a>" * 40, "nested deeper"),
        (xml([("a", (1, 1, 9, 9))] * 11), "more than 10 objects"),
        ("<a><name>" + "x" * 4000 + "</name></a>", "larger than"),
        ("", "no element found"),
        ("\x00\x01", "not well-formed"),
        ("<?xml version='1.0' encoding='ebcdic-nonsense'?><a/>", "encoding"),
    ],
)
def test_hostile_xml_is_refused(tmp_path, monkeypatch, text, reason):
    monkeypatch.setattr(annotations, "MAX_BYTES", 3000)
    monkeypatch.setattr(annotations, "MAX_OBJECTS", 10)
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(BadAnnotation, match=reason):
        read_xml(path)


def test_parts_of_an_object_are_not_the_object(tmp_path):
    """VOC's people have parts with names and boxes of their own."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    text = xml([("person", (3, 4, 20, 30))]).replace("<bndbox>", part + "<bndbox>", 1)
    (tmp_path / "a.xml").write_text(text)
    objects, reasons, _ = read_xml(tmp_path / "a.xml")
    assert objects == [("person", (3, 4, 20, 30), False)] and not reasons


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_names_do_not_lead_out_of_the_folder(tmp_path, name):
    pictures = {"a": (grey(), xml(GOOD))}
    root = write_voc(tmp_path / "x", {"trainval": ["a"], "test": ["a", name]}, pictures)
    data = opened(root)
    assert len(data.test.samples) == 1
    assert "leads out of the folder, refused" in data.test.problems[0]


def coco(root, side, annotations, images=(("a.png", 1), ("b.png", 2))):
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    (root / side).mkdir(exist_ok=True)
    for name, _ in images:
        grey().save(root / side / name)
    content = {
        "images": [{"id": number, "file_name": name} for name, number in images],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": annotations,
    }
    (root / "annotations" / f"instances_{side}.json").write_text(json.dumps(content))


def box(image, category, values, crowd=0):
    return {"image_id": image, "category_id": category, "bbox": values, "iscrowd": crowd}


def test_coco_json(tmp_path):
    good = [box(1, 7, [5, 6, 10, 12]), box(1, 9, [0, 0, 60, 40], 1), box(2, 9, [1, 2, 3, 4])]
    broken = [*good, box(2, 8, [1, 2, 3, 4]), box(2, 7, [1, 2, 0, 4])]
    coco(tmp_path, "train2017", [*broken, {"x": "\x1b[31m"}, box([1], 7, [1, 2, 3, 4])])
    coco(tmp_path, "val2017", good)
    data = opened(tmp_path)
    assert data.train.style == "coco" and data.split.endswith("val2017.json")
    first, second = data.train.samples
    # No pixel is shifted, and a crowd is tested but not trained on.
    assert first.boxes.tolist() == [[5, 6, 15, 18]] and second.boxes.tolist() == [[1, 2, 4, 6]]
    assert data.test.samples[0].difficult.tolist() == [False, True]
    assert data.train.classes == ("cat", "dog") and len(data.train.problems) == 4
    assert all(one.isprintable() for one in data.train.problems)
    (tmp_path / "annotations/instances_val2017.json").write_text("[1]")
    with pytest.raises(UserError, match="is not COCO's json"):
        opened(tmp_path)


def test_a_folder_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="holds neither VOC2007"):
        opened(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        opened(tmp_path / "nothing")


def test_all_of_bccd_but_what_is_known_to_be_broken(shared_data):
    data = opened(shared_data / "bccd")
    assert data.train.classes == ("Platelets", "RBC", "WBC")
    assert len(data.train.samples) == 292 and len(data.test.samples) == 72
    broken = [*data.train.problems, *data.test.problems]
    assert all("has a box without area" in one for one in broken)
    assert {one.split(":")[0][-5:] for one in broken} == {"00338", "00343"}
    used = sum(len(sample.labels) for sample in (*data.train.samples, *data.test.samples))
    assert used + len(broken) == 4155 + 372 + 361


def test_voc_sample(shared_data):
    data = opened(shared_data / "voc_sample")
    assert data.devkit and len(data.train.samples) == 220 and len(data.test.samples) == 110
    assert len(data.train.classes) <= 15 and not data.train.problems


def test_generated_shapes(tmp_path):
    data = opened(write_shapes(tmp_path, 6, 3))
    assert data.train.classes == ("bar", "disc") and len(data.train.samples) == 6
