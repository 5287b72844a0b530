"""Several sources as one, lists, and a source by the numbers of an earlier index."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocokit.data.decode import BadImage
from mocokit.data.index import load_index, save_index
from mocokit.data.open import open_data
from mocokit.data.sources.pack import write_pack
from mocokit.data.sources.several import RenumberedSource, renumbered
from mocokit.errors import UserError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        level = int("".join(filter(str.isdigit, path.stem)) or 0)
        Image.new("RGB", (6, 4), (level, 0, 0)).save(path, "PNG")
    return root


def levels(source: Any) -> list[int]:
    return [int(source.read(number)[0, 0, 0]) for number in range(len(source))]


def arrays(path: Path, first: int, labels: list[int]) -> Path:
    images = np.arange(first, first + len(labels), dtype=np.uint8)
    images = np.broadcast_to(images[:, None, None], (len(labels), 4, 6))
    np.savez(path, train_images=images, train_labels=labels)
    return path


# Several


def test_images_follow_one_another_and_classes_meet_by_name(tmp_path: Path) -> None:
    make(tmp_path / "a", "train/dog/1.png", "train/cat/2.png", "val/dog/3.png")
    make(tmp_path / "b", "train/cat/4.png", "train/ant/5.png", "val/ant/6.png")
    train, validation = open_data(f"{tmp_path / 'a'}::{tmp_path / 'b'}")
    assert levels(train) == [2, 1, 5, 4] and train.name == "a-b"
    assert train.classes == ("ant", "cat", "dog") and train.labels is not None
    assert train.labels.tolist() == [1, 2, 0, 1]
    assert validation is not None and validation.labels is not None
    assert levels(validation) == [3, 6] and validation.labels.tolist() == [2, 0]
    assert validation.classes == train.classes and train.describe(3) == "b: cat/4.png"
    assert train.content(0) == (tmp_path / "a/train/cat/2.png").read_bytes()


@pytest.mark.parametrize(
    ("names", "classes", "more"),
    [
        ("a/train/dog/1 a/train/cat/2 a/val/dog/3 b/train/ant/4", "ant cat dog", ""),
        ("a/train/dog/1 a/val/dog/2 b/train/ant/3 b/val/cat/4", "ant dog", "cat"),
        ("a/train/dog/1 b/train/cat/2 b/val/ant/3 b/val/cat/4", "cat dog", "ant"),
        ("a/train/dog/1 a/val/bee/2 b/train/cat/3 b/val/ant/4", "cat dog", "ant bee"),
        ("a/train/10/1 a/val/10/2 b/train/9/3 b/train/11/4", "9 10 11", ""),
        ("a/train/10/1 a/val/2/2 b/train/9/3 b/val/9/4", "9 10", "2"),
    ],
)
def test_what_is_validated_on_has_the_numbers_of_training(
    tmp_path: Path, names: str, classes: str, more: str
) -> None:
    """Where a part has no images to validate on too, or has classes that nobody trains on."""
    make(tmp_path, *(f"{name}.png" for name in names.split()))
    own = {int(name.split("/")[3]): name.split("/")[2] for name in names.split()}
    train, validation = open_data(f"{tmp_path / 'a'}::{tmp_path / 'b'}")
    assert validation is not None and train.classes == tuple(classes.split())
    assert validation.classes == (*train.classes, *more.split())
    for source in (train, validation):
        assert source.labels is not None
        called = [source.classes[number] for number in source.labels]
        assert called == [own[level] for level in levels(source)]


def test_one_part_without_labels_leaves_none(tmp_path: Path) -> None:
    make(tmp_path / "a", "train/dog/1.png", "val/dog/2.png")
    make(tmp_path / "b", "3.png")
    train, validation = open_data(f"{tmp_path / 'a'}::{tmp_path / 'b'}")
    assert train.labels is None and validation is not None and validation.labels is None
    assert train.notes == ("b has no labels: those of the other parts are left out",)
    make(tmp_path / "c", "train/dog/4.png", "val/5.png")
    both = open_data(f"{tmp_path / 'a'}::{tmp_path / 'c'}")
    told = "to validate on: c has no labels: those of the other parts are left out"
    assert both.train.labels is not None and both.train.notes == (told,)
    three = open_data(f"{tmp_path / 'a'}::{tmp_path / 'b'}::{tmp_path / 'b'}").train
    assert three.notes == ("b and 1 more have no labels: those of the other parts are left out",)
    assert open_data(f"{tmp_path / 'a'}::{tmp_path / 'b'}", "none").train.notes == ()


def test_numbered_classes_stay_in_the_order_of_numbers(tmp_path: Path) -> None:
    one, two = arrays(tmp_path / "a.npz", 1, [0, 10]), arrays(tmp_path / "b.npz", 5, [2, 1])
    train = open_data(f"{one}::{two}").train
    assert levels(train) == [1, 2, 5, 6] and train.labels is not None
    assert train.classes[:3] == ("0", "1", "2") and train.labels.tolist() == [0, 10, 2, 1]


def test_digits_that_are_no_numbers_are_texts(tmp_path: Path) -> None:
    make(tmp_path / "a", "train/1/1.png", "train/\u00b2/2.png")
    make(tmp_path / "b", "train/3/3.png")
    assert open_data(f"{tmp_path / 'a'}::{tmp_path / 'b'}").train.classes == ("1", "3", "\u00b2")


def test_fingerprints_follow_the_parts_and_their_order(tmp_path: Path) -> None:
    one, two = arrays(tmp_path / "a.npz", 1, [0, 1]), arrays(tmp_path / "b.npz", 5, [0, 1])
    prints = {open_data(text).train.fingerprint for text in (f"{one}::{two}", f"{two}::{one}")}
    assert len(prints) == 2 and open_data(f"{one}::{two}").train.fingerprint in prints


def test_other_images_under_the_same_numbers_have_another_stamp(tmp_path: Path) -> None:
    """Features are kept by it: a source opened again has its own, and no other source has it."""
    make(tmp_path / "a", "2.png", "4.png", "6.png", "8.png")
    make(tmp_path / "b", "2.png", "5.png")
    for name, lines in (("up", "2 4 6 8"), ("down", "8 6 4 2"), ("fewer", "2 4")):
        text = "".join(f"a/{number}.png\n" for number in lines.split())
        (tmp_path / f"{name}.txt").write_text(text)
    places = ["a", "b", "a::b", "b::a", "a::a", "b::up.txt", "up.txt", "down.txt", "fewer.txt"]

    def opened(place: str) -> Any:
        return open_data("::".join(str(tmp_path / part) for part in place.split("::"))).train

    before = opened("a").index()
    (tmp_path / "a/4.png").unlink()
    make(tmp_path / "a", "1.png")
    between = opened("a").index()
    make(tmp_path / "a", "3.png")
    sources: dict[str, Any] = {place: opened(place) for place in places}
    for index in (before, between):
        found = renumbered(sources["a"], index)
        assert found is not None and isinstance(found[0], RenumberedSource)
        sources[f"by the numbers of {index.fingerprint}"] = found[0]
    stamps = {name: source.stamp() for name, source in sources.items()}
    assert len(set(stamps.values())) == len(places) + 2
    assert {place: opened(place).stamp() for place in places}.items() <= stamps.items()
    for index in (before, between):  # the same numbers, and of its images another
        old = stamps[f"by the numbers of {index.fingerprint}"]
        again = renumbered(opened("a"), index)
        assert again is not None and again[0].stamp() == old
    Image.new("RGB", (9, 9)).save(tmp_path / "a/2.png")
    for index in (before, between):
        again = renumbered(opened("a"), index)
        assert again is not None
        assert again[0].stamp() not in stamps.values()


# Lists


def test_a_list_keeps_its_order_and_takes_any_path(tmp_path: Path) -> None:
    make(tmp_path / "in", "1.png", "d/2.png")
    make(tmp_path / "elsewhere", "3.png")
    text = f"d/2.png\r\n{tmp_path}/elsewhere/3.png\n\n1.png\ngone.png\n"
    (tmp_path / "in/list.txt").write_text(text)
    source, validation = open_data(tmp_path / "in/list.txt")
    assert validation is None and len(source) == 4 and source.labels is None
    assert [int(source.read(n)[0, 0, 0]) for n in range(3)] == [2, 3, 1]
    with pytest.raises(BadImage, match="No such file"):
        source.read(3)


def test_classes_stand_behind_a_tab(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "2.png", "3.png")
    path = tmp_path / "list.tsv"
    path.write_text("1.png\t10\n2.png\t9\n3.png\t10\n")
    source = open_data(path).train
    assert source.classes == ("9", "10") and source.labels is not None
    assert source.labels.tolist() == [1, 0, 1]
    assert open_data(path, "none").train.labels is None
    path.write_text("1.png\tdog\n2.png\n")
    with pytest.raises(UserError, match=r"2\.png .* has no class"):
        open_data(path)


def test_spaces_around_a_class_are_no_part_of_it(tmp_path: Path) -> None:
    make(tmp_path, *(f"{number}.png" for number in range(1, 7)))
    classes = ["cat", "cat ", " cat", "\tcat", "big  dog ", "cat\t\r"]
    lines = (f"{number}.png\t{one}\n" for number, one in enumerate(classes, 1))
    (tmp_path / "x.txt").write_text("".join(lines), newline="")
    source = open_data(tmp_path / "x.txt").train
    assert source.classes == ("big  dog", "cat") and source.labels is not None
    assert source.labels.tolist() == [1, 1, 1, 1, 0, 1]


def test_a_list_as_people_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(make(tmp_path / "home", "3.png")))
    make(tmp_path, "1.png", "2.png", "#4.png", " 5.png")
    lines = ["# my photos", "1.png", "  2.png  ", "~/3.png", "#4.png", " 5.png", "#"]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    assert levels(open_data(tmp_path / "x.txt").train) == [1, 2, 3, 4, 5]
    (tmp_path / "z.txt").write_text("\ufeff1.png\n2.png\n", encoding="utf-8")  # as Windows does
    assert levels(open_data(tmp_path / "z.txt").train) == [1, 2]
    (tmp_path / "y.txt").write_text("# class behind a tab\n1.png\tdog\n 2.png \tcat\n")
    train = open_data(tmp_path / "y.txt").train
    assert train.labels is not None and train.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"# none yet\n", "empty"),
        (b"\n \n", "empty"),
        (b"a\0b", "no text"),
        (b"Once upon a time\nthere was a fox.\n", "none is called 'Once upon a time'"),
    ],
)
def test_what_is_no_list(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_data(tmp_path / "x.txt")


# By the numbers of an index


def index_of(source: Any, path: Path) -> Any:
    save_index(source.index(), path / "images.idx")
    return load_index(path / "images.idx")


def test_an_unchanged_source_is_itself(tmp_path: Path) -> None:
    source = open_data(make(tmp_path / "in", "1.png", "2.png")).train
    assert renumbered(source, index_of(source, tmp_path)) == (source, "")


def test_what_is_gone_is_bad_and_what_is_new_is_not_seen(tmp_path: Path) -> None:
    make(tmp_path / "in", "b/1.png", "b/3.png", "c/4.png", "c/5.png")
    index = index_of(open_data(tmp_path / "in", "folders").train, tmp_path)
    (tmp_path / "in/b/3.png").unlink()
    make(tmp_path / "in", "a/0.png", "b/2.png")
    found = renumbered(open_data(tmp_path / "in", "folders").train, index)
    assert found is not None and isinstance(found[0], RenumberedSource)
    source, text = found
    assert text == "1 of the run's images are gone, and count as bad and 2 new ones are ignored"
    assert len(source) == 4 and [int(source.read(n)[0, 0, 0]) for n in (0, 2, 3)] == [1, 4, 5]
    with pytest.raises(BadImage, match="no longer"):
        source.read(1)
    with pytest.raises(BadImage, match="no longer"):
        source.content(1)
    assert source.describe(1) == "b/3.png" and source.fingerprint == index.fingerprint
    assert source.labels is not None and source.labels.tolist() == [0, 0, 1, 1]
    assert source.classes == ("b", "c") and source.index().fingerprint == index.fingerprint


def test_half_of_the_images_are_enough(tmp_path: Path) -> None:
    index = index_of(open_data(make(tmp_path, "1.png", "2.png", "3.png", "4.png")).train, tmp_path)
    for name, same in (("1.png", True), ("2.png", True), ("3.png", False)):
        (tmp_path / name).unlink()
        assert (renumbered(open_data(tmp_path).train, index) is not None) == same


def test_other_data_is_refused(tmp_path: Path) -> None:
    index = index_of(open_data(make(tmp_path / "in", "1.png", "2.png", "3.png")).train, tmp_path)
    other = open_data(make(tmp_path / "other", "3.png", "4.png", "5.png")).train
    assert renumbered(other, index) is None
    assert renumbered(open_data(arrays(tmp_path / "a.npz", 0, [0, 1, 2])).train, index) is None


def test_the_same_names_in_another_kind_of_place_are_other_data(tmp_path: Path) -> None:
    """A pack's pixels were shrunk, and only a change of images makes a run go on."""
    root = make(tmp_path / "in", "1.png", "2.png", "3.png")
    write_pack(open_data(root), tmp_path / "in.pack", 4, False, 1, lambda count: None)
    kinds = [open_data(root).train, open_data(tmp_path / "in.pack").train]
    make(root, "4.png")
    write_pack(open_data(root), tmp_path / "more.pack", 4, False, 1, lambda count: None)
    later = [open_data(root).train, open_data(tmp_path / "more.pack").train]
    for before, known in enumerate(kinds):
        index = index_of(known, tmp_path)
        for now, source in enumerate(later):
            assert list(source.index().names.every())[:3] == list(index.names.every())
            assert (renumbered(source, index) is not None) == (before == now)


def test_parts_may_come_and_go(tmp_path: Path) -> None:
    make(tmp_path / "a", "1.png", "2.png")
    both = open_data(f"{make(tmp_path / 'b', '1.png', '3.png')}::{tmp_path / 'a'}").train
    index = index_of(both, tmp_path)
    os.unlink(tmp_path / "b/1.png")
    found = renumbered(open_data(f"{tmp_path / 'b'}::{tmp_path / 'a'}").train, index)
    assert found is not None
    assert [int(found[0].read(n)[0, 0, 0]) for n in (1, 2, 3)] == [3, 1, 2]
    with pytest.raises(BadImage):
        found[0].read(0)


def test_equal_names_of_several_sources_stay_apart(tmp_path: Path) -> None:
    """x/photos and y/photos, each with 1.png: one that is gone or new in one is so there alone."""
    for folder, first in (("x", 10), ("y", 20)):
        for number in range(4):
            path = make(tmp_path / folder / "photos", f"{number}.png") / f"{number}.png"
            Image.new("RGB", (6, 4), (first + number, 0, 0)).save(path, "PNG")
    place = f"{tmp_path / 'x/photos'}::{tmp_path / 'y/photos'}"
    before = open_data(place).train.index()
    make(tmp_path / "y/photos", "00.png", "9.png")
    (tmp_path / "x/photos/2.png").unlink()
    found = renumbered(open_data(place).train, before)
    assert found is not None
    source, text = found
    assert text == "1 of the run's images are gone, and count as bad and 2 new ones are ignored"
    with pytest.raises(BadImage, match="no longer"):
        source.read(2)
    rest = [10, 11, 13, 20, 21, 22, 23]
    assert [int(source.read(n)[0, 0, 0]) for n in (0, 1, 3, 4, 5, 6, 7)] == rest


def test_equal_names_of_archives_are_never_mistaken(tmp_path: Path) -> None:
    """Archives are known by their own names: p0/a.tar and p1/a.tar hold the same names."""
    for folder, first in (("p0", 10), ("p1", 20)):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "a.tar", "w") as archive:
            for number in range(3):
                _add(archive, f"{number}.png", first + number)
    before = open_data(tmp_path).train
    index = before.index()
    (tmp_path / "p2").mkdir()
    with tarfile.open(tmp_path / "p2/b.tar", "w") as archive:
        _add(archive, "0.png", 30)
    found = renumbered(open_data(tmp_path).train, index)
    assert found is not None and levels(found[0]) == [10, 11, 12, 20, 21, 22]
    with tarfile.open(tmp_path / "p0/a.tar", "w") as archive:
        for number in range(1, 3):
            _add(archive, f"{number}.png", 10 + number)
    found = renumbered(open_data(tmp_path).train, index)
    assert found is not None
    for number in (0, 3):  # of two, one is gone: which, nobody can tell
        with pytest.raises(BadImage, match="no longer"):
            found[0].read(number)
    assert [int(found[0].read(n)[0, 0, 0]) for n in (1, 2, 4, 5)] == [11, 12, 21, 22]


def _add(archive: tarfile.TarFile, name: str, level: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (level, 0, 0)).save(file, "PNG")
    head = tarfile.TarInfo(name)
    head.size = file.tell()
    archive.addfile(head, io.BytesIO(file.getvalue()))
