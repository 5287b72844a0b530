"""Images without a class among others that have one: trained on, never scored, no class of ''."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mocokit import evaluate_knn
from mocokit.data.index import load_index, save_index
from mocokit.data.open import open_data
from mocokit.data.source import UNLABELLED
from mocokit.data.sources.pack import write_pack
from mocokit.errors import UserError
from mocokit.health.knn_monitor import KnnMonitor
from mocokit.protocols.labelled import labelled_split
from mocokit.run.command import asked
from mocokit.weights.encoder import view_spec

CLASSES = ["", "b", "a", "  ", "b", "a", "", "b"]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in")
    lines, draw = [], np.random.default_rng(0)
    for number in range(80):
        pixels = draw.integers(0, 60, (20, 20, 3), np.uint8)
        name = CLASSES[number % 8]
        pixels[..., 1] += {"a": 150, "b": 0}.get(name, 70)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        lines.append(f"{number:02d}.png\t{name}\n")
    (root / "list.txt").write_text("".join(lines))
    (root / "none.txt").write_text("".join(f"{n:02d}.png\t\n" for n in range(5)))
    return root / "list.txt"


def test_an_empty_label_is_none(listed: Path, tmp_path: Path) -> None:
    source = open_data(listed).train
    assert source.labels is not None and source.classes == ("a", "b") and len(source) == 80
    wanted = [{"a": 0, "b": 1}.get(name.strip(), UNLABELLED) for name in CLASSES]
    assert source.labels.tolist() == wanted * 10
    assert source.notes[0].startswith("30 of 80 images have nothing behind the tab")
    nothing = open_data(listed.with_name("none.txt")).train
    assert nothing.labels is None and nothing.classes == ()
    save_index(source.index(), tmp_path / "images.idx")
    assert load_index(tmp_path / "images.idx").labels.tolist() == wanted * 10  # type: ignore[union-attr]
    write_pack(open_data(listed), tmp_path / "x.pack", 64, False, 1, lambda count: None)
    packed = open_data(tmp_path / "x.pack").train
    assert packed.labels is not None and packed.labels.tolist() == wanted * 10
    other = listed.with_name("other.txt")
    other.write_text("00.png\tA\n01.png\t\n02.png\tz\n")
    both = open_data(f"{other}::{listed}").train
    assert both.classes == ("A", "a", "b", "z") and both.labels is not None
    assert both.labels.tolist()[:6] == [0, -1, 3, -1, 2, 1]


def test_test_images_without_any_class_are_not_the_test(listed: Path) -> None:
    train = open_data(listed).train
    validation = open_data(listed.with_name("list.txt")).train
    validation.labels = np.full(len(validation), UNLABELLED)
    for loo in (True, False):
        split = labelled_split(train, validation, seed=0, leave_one_out=loo)
        assert split.test is train and len(split.test_numbers) and split.leave_one_out == loo


@pytest.mark.parametrize(
    "blank", ["", " ", "\u00a0", "\u200b", "\ufeff", "\u3000", " \u2009\u200d "]
)
def test_a_label_that_nobody_sees_is_none(listed: Path, blank: str) -> None:
    text = f"00.png\ta\n01.png\t{blank}\n02.png\tcaf\u00e9\n"
    for encoding in ("utf-8", "utf-8-sig"):
        other = listed.with_name("blank.txt")
        other.write_text(text, encoding=encoding)
        source = open_data(other).train
        assert source.classes == ("a", "caf\u00e9") and source.labels is not None
        assert source.labels.tolist() == [0, UNLABELLED, 1]
    other.write_bytes(b"00.png\ta\n01.png\t\xe9\n")  # in another encoding: seen, but not known
    assert open_data(other).train.labels.tolist() == [0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("second, refused", [("a", False), ("b", True), ("", True)])
def test_a_file_that_is_listed_with_two_classes(listed: Path, second: str, refused: bool) -> None:
    other = listed.with_name("twice.txt")
    other.write_text(f"00.png\ta\n01.png\tb\n00.png\t{second}\n")
    if not refused:
        assert len(open_data(other).train) == 3
        return
    with pytest.raises(UserError, match=f"00.png in the list .* two classes, a and {second}"):
        open_data(other)
    assert len(open_data(other, "none").train) == 3


@pytest.mark.parametrize("alone", [True, False])
def test_no_split_has_an_image_without_a_class(listed: Path, alone: bool) -> None:
    source = open_data(listed).train
    split = labelled_split(source, None, seed=0, leave_one_out=alone)
    numbers = np.union1d(split.train_numbers, split.test_numbers)
    assert (split.train_labels >= 0).all() and (split.test_labels >= 0).all()
    assert len(numbers) == 50 and split.classes == ("a", "b")
    held = labelled_split(source, open_data(listed).train, seed=0)
    assert len(held.test_numbers) == 50 and "50 training images, 50 test" in held.description


def test_the_monitor_asks_none_of_them(listed: Path) -> None:
    source = open_data(listed).train
    spec = view_spec(asked("mocov2", str(listed), {"views.size": 16})[0])
    options: dict[str, Any] = {"k": 3, "temperature": 0.1, "seed": 0}
    for held in (None, open_data(listed).train):
        monitor = KnnMonitor(source, held, spec, torch.device("cpu"), bank=100, **options)
        for numbers in (monitor.bank_numbers, monitor.query_numbers):
            assert len(numbers) and (source.labels[numbers] >= 0).all()  # type: ignore[index]


def test_the_vote_leaves_them_out(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(listed.parent)  # where the report of what is no run goes
    shared: dict[str, Any] = {"device": "cpu", "size": 32, "baseline": False, "cache": False}
    result = evaluate_knn("random:resnet18", listed, k=(3,), **shared)
    assert result.classes == ("a", "b") and result.results[0].scores.count == 50


def test_a_text_without_letters_in_a_table_is_no_class(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    content = Image.new("RGB", (3, 3))
    content.save(tmp_path / "x.png")
    image = (tmp_path / "x.png").read_bytes()
    for empty in ("", "  ", None):
        table = pyarrow.table({"image": [image] * 3, "label": ["a", empty, "b"]})
        parquet.write_table(table, tmp_path / "x.parquet")
        source = open_data(tmp_path / "x.parquet").train
        assert source.labels is None and source.classes == ()
        assert "gives no class for 1 of 3 rows" in source.notes[0]
