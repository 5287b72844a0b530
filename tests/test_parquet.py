"""Parquet files as Hugging Face keeps data sets."""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocokit.data.decode import BadImage
from mocokit.data.open import open_data
from mocokit.data.sources import parquet
from mocokit.data.sources.packed import PackedSource
from mocokit.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
tables = pytest.importorskip("pyarrow.parquet")


def image(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, levels: Any, labels: Any = None, features: Any = None, image_=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": None if n is None else image(n), "path": "x.png"} for n in levels]
    columns = {"id": list(range(len(cells))), "picture": image_ or cells}
    if labels is not None:
        columns["kind"] = labels
    table = pyarrow.table(columns)
    if features is not None:
        told = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": told})
    tables.write_table(table, path, row_group_size=3)
    return path


FEATURES = {
    "picture": {"_type": "Image"},
    "kind": {"_type": "ClassLabel", "names": ["ant", "bee"]},
}


def levels(source: Any) -> list[int]:
    return [int(source.read(number)[0, 0, 0]) for number in range(len(source))]


def test_splits_and_labels_of_hugging_face(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "in/data"
    write(data / "train-00000-of-00002.parquet", range(1, 6), [0, 1, 0, 1, 1], FEATURES)
    write(data / "train-00001-of-00002.parquet", range(6, 8), [0, 0], FEATURES)
    write(data / "test-00000-of-00001.parquet", [9], [1], FEATURES)
    train, validation = open_data(tmp_path / "in")
    assert isinstance(train, PackedSource) and validation is not None
    assert levels(train) == [1, 2, 3, 4, 5, 6, 7] and levels(validation) == [9]
    assert train.classes == ("ant", "bee") == validation.classes and train.labels is not None
    assert train.labels.tolist() == [0, 1, 0, 1, 1, 0, 0] and train.describe(3) == "row 3"
    assert train.content(4) == image(5)
    (pack,) = (tmp_path / "cache/packs").glob("*.pack")
    before = pack.stat().st_mtime_ns
    assert open_data(tmp_path / "in").train.fingerprint == train.fingerprint
    assert pack.stat().st_mtime_ns == before  # copied once
    assert open_data(tmp_path / "in", "none").train.labels is None
    pattern = open_data(data / "train-0000{0..1}-of-00002.parquet")
    assert levels(pattern.train) == levels(train) and pattern.validation is None


def test_without_a_word_of_hugging_face_types_decide(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [3, 4])
    assert levels(open_data(path).train) == [3, 4] and open_data(path).train.labels is None
    plain = write(tmp_path / "b.parquet", [1, 2], image_=[image(1), image(2)])
    assert levels(open_data(plain).train) == [1, 2]
    missing = open_data(write(tmp_path / "c.parquet", [7, None])).train
    with pytest.raises(BadImage, match="no bytes"):
        missing.read(1)


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"junk" * 10)
    with pytest.raises(UserError, match="is no parquet file"):
        open_data(tmp_path / "a.parquet")
    tables.write_table(pyarrow.table({"text": ["a"], "n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"no column of images \(it has: text, n\)"):
        open_data(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"data\.labels=folders"):
        open_data(write(tmp_path / "c.parquet", [1]), "folders")


def test_what_is_missing_says_how_to_install_it(tmp_path: Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "a.parquet", [1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'mocokit\[hub\]'"):
        open_data(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Any) -> Path:
    """Revisions of sets in place of the hub's, as huggingface_hub would download them."""

    def snapshot_download(repo: str, revision: str, repo_type: str, allow_patterns: str) -> str:
        assert (repo_type, allow_patterns) == ("dataset", "*.parquet")
        folder = tmp_path / "hub" / repo / revision
        if not folder.parent.exists() and not folder.parent.parent.exists():
            raise ConnectionError("no network\nat all")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return tmp_path / "hub"


def test_sets_of_the_hub(hub: Path) -> None:
    write(hub / "me/set/main/data/train-0.parquet", [1, 2], [0, 1], FEATURES)
    train = open_data("hub:me/set").train
    assert levels(train) == [1, 2] and train.name == "set" and train.classes == ("ant", "bee")
    write(hub / "me/old/refs/convert/parquet/default/train/0000.parquet", [5])
    write(hub / "me/old/refs/convert/parquet/default/test/0000.parquet", [6])
    train, validation = open_data("hub:me/old")
    assert levels(train) == [5] and levels(validation) == [6]
    write(hub / "me/two/v1/big/train/0.parquet", [7])
    write(hub / "me/two/v1/small/train/0.parquet", [8])
    assert levels(open_data("hub:me/two/small@v1").train) == [8]
    with pytest.raises(UserError, match="one of big, small"):
        open_data("hub:me/two@v1")
    write(hub / "me/flat/main/0.parquet", [9])
    with pytest.raises(
        UserError, match="hub:me/flat/big: that set has no configurations; leave big"
    ):
        open_data("hub:me/flat/big")


def test_without_a_network(hub: Path) -> None:
    with pytest.raises(UserError, match="nor can it be downloaded .*no network at all"):
        open_data("hub:you/set")


def test_rows_are_read_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", range(8))
    source = parquet.ParquetSource([path, path], "x", False)
    assert [int(source.read(n)[0, 0, 0]) for n in (15, 0, 8, 3, 7)] == [7, 0, 0, 3, 7]
    assert len(source) == 16 and np.asarray(source._ends).tolist() == [3, 6, 8, 11, 14, 16]


@pytest.mark.parametrize(
    ("given", "classes", "numbers"),
    [
        ([2, 0, 1], ("0", "1", "2"), [2, 0, 1]),
        ([2.0, 0.0, 1.0], ("0", "1", "2"), [2, 0, 1]),
        (["owl", "ant", "bee"], ("ant", "bee", "owl"), [2, 0, 1]),
        (pyarrow.array(["owl", "ant", "owl"]).dictionary_encode(), ("ant", "owl"), [1, 0, 1]),
        ([True, False, True], ("0", "1"), [1, 0, 1]),
    ],
)
def test_classes_of_any_type(tmp_path: Path, given: Any, classes: Any, numbers: Any) -> None:
    path = tmp_path / "a.parquet"
    tables.write_table(pyarrow.table({"image": [image(n) for n in range(3)], "label": given}), path)
    train = open_data(path).train
    assert train.labels is not None and train.labels.tolist() == numbers
    assert train.classes == classes and train.notes == ()
    assert open_data(path, "none").train.labels is None


def test_a_class_without_a_name_has_its_number(tmp_path: Path) -> None:
    features = {"kind": {"_type": "ClassLabel", "names": ["ant", None, " "]}}
    path = write(tmp_path / "a.parquet", [1, 2, 3], [0, 1, 2], features)
    assert open_data(path).train.classes == ("ant", "1", "2")


@pytest.mark.parametrize(
    ("given", "names", "classes"),
    [
        ([0, 1, 2], ["ant", "bee", "owl"], ("ant", "bee", "owl")),
        ([0, 1, 0], ["ant", "bee", "owl"], ("ant", "bee", "owl")),  # a class that no row has
        ([2, 2, 2], ["ant", "bee", "owl"], ("ant", "bee", "owl")),
        ([0, 1, 2], ["ant", "bee"], ("0", "1", "2")),
        ([0, 3, 1], ["ant"], ("0", "1", "2", "3")),
        ([1, 1, 1], ["ant"], ("0", "1")),
        ([0, 1, 2], [], ("0", "1", "2")),
        ([0, 1, 2], None, ("0", "1", "2")),
        ([0, 1, 2], "ant", ("0", "1", "2")),
    ],
)
def test_names_are_taken_where_every_class_has_one(
    tmp_path: Path, given: Any, names: Any, classes: Any
) -> None:
    features = {"kind": {"_type": "ClassLabel", "names": names}}
    train = open_data(write(tmp_path / "a.parquet", [1, 2, 3], given, features)).train
    assert train.labels is not None and train.labels.tolist() == given
    assert train.classes == classes and max(given) < len(train.classes)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([1, None, 0], "gives no class for 1 of 3 rows"),
        (["a", None, None], "gives no class for 2 of 3 rows"),
        ([-1, -1, -1], "gives no class for 3 of 3 rows"),  # as in hidden test splits
        ([-2, 0, 1], "holds numbers below 0 or with a fraction"),
        ([0.5, 0, 1], "holds numbers below 0 or with a fraction"),
        ([[0, 1], [2], []], "holds list<.*>, which names no class"),
    ],
)
def test_labels_that_are_left_out_are_told(tmp_path: Path, given: Any, why: str) -> None:
    path = tmp_path / "set" / "a.parquet"
    path.parent.mkdir()
    tables.write_table(pyarrow.table({"image": [image(n) for n in range(3)], "label": given}), path)
    for _ in range(2):  # also once it is copied
        train = open_data(path).train
        assert train.labels is None and train.classes == ()
        (note,) = train.notes
        assert re.fullmatch(rf"set: the column label {why}: labels are left out", note)
    assert open_data(path, "none").train.notes == ()


def test_texts_to_validate_on_have_the_numbers_of_training(tmp_path: Path) -> None:
    for name, given in (("train", ["owl", "bee", "bee"]), ("test", ["owl", "ant", "bee"])):
        cells = {"image": [image(n) for n in range(3)], "label": given}
        tables.write_table(pyarrow.table(cells), tmp_path / f"{name}.parquet")
    train, validation = open_data(tmp_path)
    assert train.classes == ("bee", "owl") and train.labels is not None
    assert train.labels.tolist() == [1, 0, 0]
    assert validation is not None and validation.labels is not None
    assert validation.classes == ("bee", "owl", "ant")
    assert validation.labels.tolist() == [1, 2, 0]


def test_damage_and_a_cache_that_cannot_be_written_are_told_apart(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path = write(tmp_path / "a.parquet", range(8))
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read \(.+\): download it again"):
        open_data(path)
    whole = write(tmp_path / "b.parquet", range(8))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be copied to .*Not a directory.*MOCOKIT_CACHE"):
        open_data(whole)
    monkeypatch.setenv("MOCOKIT_CACHE", "/dev/full")
    with pytest.raises(UserError, match=r"cannot be copied to .*MOCOKIT_CACHE"):
        open_data(whole)


def test_files_of_two_sets_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1], [0], FEATURES)
    write(tmp_path / "b.parquet", [1])
    with pytest.raises(UserError, match=r"b\.parquet has other columns .* than .*a\.parquet"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("columns", "features"),
    [
        ({"labels": [[0], [1, 2], []]}, {"labels": [{"dtype": "int64", "_type": "Value"}]}),
        ({"label": [0, 1, 2]}, [1]),
        ({"label": [0, 1, 2]}, "text"),
        ({"label": [b"a", b"b", b"c"]}, {}),
    ],
)
def test_strange_columns_and_words_about_them(tmp_path: Path, columns: Any, features: Any) -> None:
    table = pyarrow.table(columns | {"image": [image(n) for n in range(3)]})
    told = json.dumps({"info": {"features": features}})
    tables.write_table(table.replace_schema_metadata({"huggingface": told}), tmp_path / "a.parquet")
    assert levels(open_data(tmp_path / "a.parquet").train) == [0, 1, 2]


@pytest.mark.parametrize("given", [[[0], ["a"]], [["a"], [0]], [[float("inf")], [0.0]]])
def test_labels_of_two_kinds_are_left_out_and_told(tmp_path: Path, given: Any) -> None:
    for name, label in zip("ab", given, strict=True):
        columns = {"image": [image(1)], "label": label}
        tables.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    train = open_data(tmp_path).train
    assert train.labels is None and "labels are left out" in train.notes[0]


@pytest.mark.parametrize("label", ["int64", "string"])
def test_no_rows(tmp_path: Path, label: str) -> None:
    columns = {"image": pyarrow.array([], "binary"), "label": pyarrow.array([], label)}
    tables.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds no rows to train on"):
        open_data(tmp_path)


def test_a_changed_file_and_a_damaged_copy_are_copied_again(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    noise = [bytes(np.random.default_rng(n).bytes(2**16)) for n in range(3)]
    for labels in ([0, 1, 2], [2, 1, 0]):
        table = pyarrow.table({"label": labels, "image": noise})
        tables.write_table(table, path, compression="none", use_dictionary=False)
        os.utime(path, (labels[0], labels[0]))
        train = open_data(path).train
        assert train.labels is not None and train.labels.tolist() == labels
    for pack in (tmp_path / "cache" / "packs").glob("*.pack"):
        pack.write_bytes(pack.read_bytes()[:-100])
    train = open_data(path).train
    assert train.content(2) == noise[2] and "was damaged" in train.notes[-1]


def test_a_damaged_record_of_a_copy_is_not_kept_for_good(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    noise = [bytes(np.random.default_rng(n).bytes(2**16)) for n in range(3)]
    tables.write_table(pyarrow.table({"image": noise}), path)
    open_data(path)
    (pack,) = (tmp_path / "cache" / "packs").glob("*.pack")
    content = bytearray(pack.read_bytes())
    content[content.index(noise[1]) + 99] ^= 1
    pack.write_bytes(content)
    train = open_data(path).train
    with pytest.raises(BadImage, match="copies it anew"):
        train.content(1)
    again = open_data(path).train
    assert [again.content(n) for n in range(3)] == noise and "was damaged" in again.notes[-1]
    assert open_data(path).train.notes == ()


@pytest.mark.parametrize(
    "layout",
    [
        ["train/a/0.parquet", "train/b/c/1.parquet", "test/a/0.parquet"],
        ["train.parquet/part-0.parquet", "train.parquet/part-1.parquet", "test.parquet/0.parquet"],
        ["sub/train/0.parquet", "sub/train/1.PARQUET", "sub/test/0.parquet"],
        ["data/train-0.parquet", "data/x/train-1.parquet", "data/validation-0.parquet"],
        ["test/train/0.parquet", "test/train/1.parquet", "train/test/0.parquet"],
        ["test/train/a/0.parquet", "test/val/train/b/1.parquet", "train/a/val/b/0.parquet"],
        ["test/train-0.parquet", "test/x/train-1.parquet", "train/test-0.parquet"],
    ],
)
def test_splits_by_folders_at_any_depth(tmp_path: Path, layout: list[str]) -> None:
    for number, name in enumerate(layout):
        write(tmp_path / "in" / name, [10 * number])
    train, validation = open_data(tmp_path / "in")
    assert levels(train) == [0, 10] and levels(validation) == [20]
    inner = tmp_path / "in" / Path(layout[0]).parts[0]
    assert {0, 10} <= set(levels(open_data(inner).train))


def test_a_copy_that_nobody_uses_is_deleted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "cache"))
    packs = tmp_path / "cache" / "packs"
    first, second, third = (write(tmp_path / f"{n}/{n}.parquet", [n]) for n in range(3))
    for path in (first, second):
        open_data(path)
    old = list(packs.glob("*.pack"))
    assert len(old) == 2
    for pack in old:
        os.utime(pack, (1, 1))
    assert levels(open_data(first).train) == [0]  # used once more
    assert levels(open_data(third).train) == [2]
    kept = sorted(pack.name[0] for pack in packs.glob("*.pack"))
    assert kept == ["0", "2"]
