"""Listings in the cache: used while they stand, and never when they do not."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocokit.data import cache, walk
from mocokit.data.index import read_arrays, write_arrays
from mocokit.data.open import open_data

LONG_AGO = 10**18


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images in folders that were changed long ago; and a cache of its own."""
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "in"
    for name in ("train/a/1.png", "train/b/2.png", "val/b/3.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / name)
    settle(root)
    return root


def settle(root: Path) -> None:
    for place, _, _ in os.walk(root):
        os.utime(place, ns=(LONG_AGO, LONG_AGO))


def names(root: Path) -> list[str]:
    source = open_data(root).train
    return [source.describe(number) for number in range(len(source))]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The folders that are listed."""
    seen: list[bytes] = []
    scan = os.scandir
    monkeypatch.setattr(walk.os, "scandir", lambda path: (seen.append(path), scan(path))[1])
    return seen


def test_the_second_time_nothing_is_walked(folder: Path, walks: list[bytes]) -> None:
    first = open_data(folder)
    assert len(walks) >= 6 and len(list((folder.parent / "cache/listings").iterdir())) == 1
    walks.clear()
    again = open_data(folder)
    assert walks == []
    for one, two in zip(first, again, strict=True):
        assert one is not None and two is not None and one.labels is not None
        assert one.fingerprint == two.fingerprint and one.classes == two.classes
        assert one.labels.tolist() == two.labels.tolist() and one.name == two.name  # type: ignore[union-attr]
        assert one.read(0).shape == two.read(0).shape and one.describe(0) == two.describe(0)


def test_labels_asked_for_differently_are_another_listing(folder: Path) -> None:
    assert open_data(folder).train.labels is not None
    assert open_data(folder, "none").train.labels is None
    assert open_data(folder / "train").train.labels is None


@pytest.mark.parametrize("change", ["new", "gone", "new folder", "renamed", "same time"])
def test_any_change_is_seen(folder: Path, change: str) -> None:
    before = names(folder)
    if change == "gone":
        (folder / "train/a/1.png").unlink()
    elif change == "new folder":
        (folder / "train/c").mkdir()
        Image.new("RGB", (2, 2)).save(folder / "train/c/4.png")
    elif change == "renamed":
        (folder / "train/a/1.png").rename(folder / "train/a/0.png")
    else:
        Image.new("RGB", (2, 2)).save(folder / "train/a/4.png")
    if change == "same time":  # a clock that stands still: the number of entries tells
        os.utime(folder / "train/a", ns=(LONG_AGO, LONG_AGO))
    assert names(folder) != before


def test_a_folder_changed_just_now_is_not_trusted_yet(folder: Path) -> None:
    now = time.time_ns()
    os.utime(folder / "val", ns=(now, now))
    open_data(folder)
    assert not (folder.parent / "cache/listings").exists()


def test_a_damaged_or_foreign_entry_is_made_again(folder: Path) -> None:
    expected = names(folder)
    (entry,) = (folder.parent / "cache/listings").iterdir()
    content = entry.read_bytes()
    for damaged in (b"", b"junk", content[:-100], content[:200]):
        entry.write_bytes(damaged)
        assert names(folder) == expected and entry.read_bytes()[:4] == content[:4]
    (folder / "train/a/1.png").unlink()
    assert cache._recall(entry, "another key") is None


def test_a_cache_that_cannot_be_written_costs_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "file").touch()
    monkeypatch.setenv("MOCOKIT_CACHE", str(folder.parent / "file"))
    assert len(names(folder)) == 2


def test_two_at_once(folder: Path) -> None:
    """Readers and writers of one entry never see half of it."""
    expected, failures = names(folder), []
    (entry,) = (folder.parent / "cache/listings").iterdir()

    def often() -> None:
        for _ in range(30):
            entry.unlink(missing_ok=True)
            if names(folder) != expected:
                failures.append(1)

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names(folder) == expected  # whoever deleted last, an entry is written again
    assert [p.suffix for p in entry.parent.iterdir()] == [".npz"]


def test_two_threads_write_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in the middle of writing at the same moment: one wins, none fails."""
    meeting, plain = threading.Barrier(2, timeout=20), np.savez

    def save(file: Any, **arrays: Any) -> None:
        meeting.wait()
        plain(file, **arrays)
        meeting.wait()

    monkeypatch.setattr(np, "savez", save)
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            write_arrays(tmp_path / "x.npz", {"one": np.full(1000, number)}, compressed=False)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(set(read_arrays(tmp_path / "x.npz")["one"].tolist())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_unused_entries_are_forgotten(folder: Path) -> None:
    old = folder.parent / "cache/listings/old.npz"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (1, 1))
    open_data(folder)
    assert not old.exists() and len(list(old.parent.iterdir())) == 1


def test_without_a_home_images_are_listed_each_time(folder: Path, homeless: None) -> None:
    """As in containers whose user is a bare number: it costs time, not the run."""
    assert len(open_data(folder).train) == len(open_data(folder).train) > 0
