"""mocokit check: every image is read, and what is wrong is named."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

import mocokit.check
from mocokit.data.examine import Examined, examine
from mocokit.data.open import open_data
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.pack import write_pack
from mocokit.engine.record import Console


def photo(path: Path, seed: int, kind: str = "JPEG", size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, kind)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Duplicates within and across the splits, kinds, and files that are no images."""
    root = tmp_path / "in"
    for number in range(12):
        photo(root / f"train/{'ab'[number % 2]}/{number:02}.jpg", number)
    photo(root / "train/b/big.png", 99, "PNG", (70, 40))
    for name in ("train/a/x.jpg", "train/b/y.jpg", "val/a/same.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "train/b/03.jpg", root / name)
    photo(root / "val/b/other.jpg", 50)
    content = (root / "train/a/00.jpg").read_bytes()
    (root / "train/a/cut.jpg").write_bytes(content[: len(content) // 2])
    (root / "train/b/empty.png").write_bytes(b"")
    return root


def test_what_is_found(folder: Path) -> None:
    counts: list[int] = []
    source = open_data(folder).train
    found = examine(source, 32, 2, counts.append)
    assert sum(counts) == len(source) == 17
    assert found.kinds == {"JPEG": 14, "PNG": 1}
    assert (found.heights.max(), found.widths.max(), len(found.heights)) == (70, 40, 15)
    names = [[source.describe(n) for n in group] for group in found.twins()]
    assert names == [["a/x.jpg", "b/03.jpg", "b/y.jpg"]]
    assert [line.partition(":")[0] for line in found.bad] == ["a/cut.jpg", "b/empty.png"]
    assert "truncated" in found.bad[0].lower() and "empty" in found.bad[1]


def test_equal_pixels_in_arrays_are_twins(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    images[4] = images[1]
    np.save(tmp_path / "x.npy", images)
    found = examine(open_data(tmp_path / "x.npy").train, 32, 1, lambda count: None)
    assert [group.tolist() for group in found.twins()] == [[1, 4]] and not found.bad


UNREAD = bytes(16)
# Contents that differ at one end alone, as a text or a number would not tell.
DIGESTS = [UNREAD, bytes(15) + b"\1", b"\1" + bytes(15), b"\2" + bytes(15), b"\xff" * 16]
CONTENTS = st.lists(st.sampled_from(DIGESTS), max_size=40)


@given(CONTENTS, CONTENTS)
def test_twins_are_those_of_equal_content_in_the_order_of_the_set(
    own: list[bytes], others: list[bytes]
) -> None:
    first, second = (
        Examined(
            Counter(), np.array([], np.int64), np.array([], np.int64), [],
            np.frombuffer(b"".join(some), np.uint8).reshape(-1, 16),
        )
        for some in (own, others)
    )  # fmt: skip
    places: dict[bytes, list[int]] = {}  # by their first
    for number, content in enumerate(own):
        places.setdefault(content, []).append(number)
    groups = [some for content, some in places.items() if content != UNREAD and some[1:]]
    assert [group.tolist() for group in first.twins()] == groups
    shared = [n for n, content in enumerate(own) if content != UNREAD and content in others]
    assert [group.tolist() for group in first.twins(second)] == ([shared] if shared else [])


def said(folder: Path, capsys: pytest.CaptureFixture[str], **options: bool) -> str:
    settings = {"views.size": 16}
    sheet = folder.parent / "views.png"
    mocokit.check.check("mocov2", folder, sheet, settings, **options)  # type: ignore[arg-type]
    assert sheet.is_file()
    return capsys.readouterr().err


def test_what_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(folder, capsys)
    for part in (
        "train: 17 images, 2 classes of 8 to 9 (a, b)",
        "formats: 14 JPEG, 1 PNG",
        "20 to 70 pixels high, 30 to 40 wide, short side 20 in the middle",
        "duplicates: 2 images have the content of another",
        "a/x.jpg = b/03.jpg = b/y.jpg",
        "cannot be read: a/cut.jpg",
        "cannot be read: b/empty.png: the file is empty",
        "unreadable: 2",
        "validation: 2 images",
        "1 validation images are among the training images too: a/same.jpg",
        "17 images are too few",
    ):
        assert part in text, part


def test_a_pack_is_told_what_it_lacks_for_these_views(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bound, told in ((16, True), (4000, False)):
        pack = tmp_path / f"{bound}.pack"
        write_pack(open_data(folder), pack, bound, False, 1, lambda count: None)
        text = " ".join(said(pack, capsys, quick=True).split())
        assert ("note: in was packed for canvases of 16 pixels, and these views" in text) == told
        assert "packed for canvases" not in text or "whole images" not in text


def test_images_without_a_class_are_in_none(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "list.txt"
    lines = [f"train/a/{number:02}.jpg\t{'x' if number else ''}" for number in range(0, 12, 2)]
    path.write_text("\n".join([*lines, "train/b/01.jpg\ty", "train/b/03.jpg\t"]))
    assert "train: 8 images, 2 classes of 1 to 5 (y, x)" in said(path, capsys, quick=True)


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        ([0, 0, 1, 2], "3 classes of 1 to 2 (b, a)"),
        ([0, 0, 1, 1], "3 classes of 0 to 2 (c, a)"),
        ([0, 0, -1, 2], "3 classes of 0 to 2 (b, a)"),
        ([1, 2, 2, 2], "3 classes of 0 to 3 (a, c)"),
        ([-1, -1, -1, -1], "3 classes of 0 to 0"),
        ([0, 1, 2], "3 classes of 1 to 1"),
    ],
)
def test_every_class_counts_also_one_without_images(
    labels: list[int], counts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.zeros((len(labels), 4, 4, 3), np.uint8)
    source = ArraySource(pixels, np.array(labels), "toy", ("a", "b", "c"))
    mocokit.check._tell_counts(Console(), "train", source)
    told = f"train: {len(labels)} images, {counts}"
    assert " ".join(capsys.readouterr().err.split()) == told


def test_the_sheet_has_the_images_and_the_seed_that_were_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []

    def sheet(specs: Any, canvases: Any, numbers: Any, seed: int, *rest: Any, **named: Any) -> None:
        seen.append((len(canvases), len(numbers), seed))

    monkeypatch.setattr(mocokit.check, "contact_sheet", sheet)
    changes = {"views.size": 16, "seed": 5}
    mocokit.check.check("mocov2", folder, tmp_path / "x.png", changes, images=3, quick=True)
    assert seen == [(3, 3, 5)]


def test_a_quick_look(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(folder, capsys, quick=True)
    assert "looked at" in text and "duplicates" not in text and "b/empty.png" in text


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_quick_look_reads_200_of_a_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    other = {"train": "test", "test": "train"}[name]
    pixels = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), np.uint8)
    arrays = {f"{name}_images": pixels, f"{other}_images": pixels[:70]}
    arrays |= {f"{name}_labels": np.arange(300) % 2, f"{other}_labels": np.arange(70) % 2}
    np.savez(tmp_path / "x.npz", **arrays)
    text = said(tmp_path / "x.npz", capsys, quick=True)
    assert "200 looked at" in text and "70 looked at" in text
