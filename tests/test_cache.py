"""Listings in the cache: used while they stand, and never when they do not."""

import io
import json
import os
import shutil
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocokit.data import cache, walk
from mocokit.data.index import read_arrays, write_arrays
from mocokit.data.open import open_data
from mocokit.data.sources import shards

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


def test_what_changed_as_it_was_listed_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the listing took: another change in that tick of the clock would be unseen."""
    known, now, scans = open_data(folder).train.index(), [LONG_AGO], []

    def scan(watch: cache.Watch) -> cache.Listing:
        scans.append(now[0])
        os.utime(folder, ns=(now[0], now[0]))
        watch.note(os.fsencode(folder), now[0], len(os.listdir(folder)))
        now[0] += 10**10
        return cache.Listing(cache.Part(str(folder), known))

    clock = SimpleNamespace(time_ns=lambda: now[0], time=time.time)
    monkeypatch.setattr(cache, "time", clock)
    for _ in range(2):
        cache.listed("key", scan)
    assert len(scans) == 2


def test_the_checksum_is_of_names_types_and_shapes_too() -> None:
    four = np.arange(4)
    alike = ({"a": four}, {"b": four}, {"a": four.view(np.uint64)}, {"a": four.reshape(2, 2)})
    assert len({cache._checksum(arrays) for arrays in alike}) == 4


def test_labels_asked_for_differently_are_another_listing(folder: Path) -> None:
    assert open_data(folder).train.labels is not None
    assert open_data(folder, "none").train.labels is None
    assert open_data(folder / "train").train.labels is None


def test_archives_asked_for_differently_are_another_listing(folder: Path) -> None:
    root = folder.parent / "tars"

    def archive(name: str) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as file:
            file.add(folder / "train/a/1.png", "1.png")
            label = tarfile.TarInfo("1.cls")
            label.size = 1
            file.addfile(label, io.BytesIO(b"3"))
        os.utime(path, ns=(LONG_AGO, LONG_AGO))

    archive("train/a.tar")
    archive("val/b.tar")
    assert open_data(root / "train/a.tar").train.labels is not None
    assert open_data(root / "train/a.tar", "none").train.labels is None
    for held in (1, 2):
        validation = open_data(root).validation
        assert validation is not None and len(validation) == held
        archive("val/c.tar")


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


def entry_of(folder: Path) -> Path:
    (entry,) = (folder.parent / "cache/listings").iterdir()
    return entry


def test_a_damaged_or_foreign_entry_is_made_again(folder: Path, walks: list[bytes]) -> None:
    expected = names(folder)
    entry = entry_of(folder)
    content = entry.read_bytes()
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    settle(other)
    names(other)
    (foreign,) = [one.read_bytes() for one in entry.parent.iterdir() if one != entry]
    for damaged in (b"", b"junk", content[:-100], content[:200], foreign):
        entry.write_bytes(damaged)
        walks.clear()
        source = open_data(folder).train
        assert [source.describe(n) for n in range(len(source))] == expected and walks
        assert "was damaged" in source.notes[-1] and str(entry) in source.notes[-1]
        walks.clear()
        assert open_data(folder).train.notes == () and not walks  # whole again, and no note
        assert entry.read_bytes()[:4] == content[:4]


def test_every_bit_of_an_entry_is_checked(folder: Path, walks: list[bytes]) -> None:
    """A flipped one gives the same listing: by the checksum, or because it is nowhere used."""
    expected = names(folder)
    entry = entry_of(folder)
    content = entry.read_bytes()
    again = 0
    for place in range(0, len(content), 29):
        entry.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        walks.clear()
        source = open_data(folder).train
        assert [source.describe(n) for n in range(len(source))] == expected
        assert bool(walks) == bool(source.notes)
        again += bool(walks)
    assert again > len(content) // 29 // 2


def test_a_changed_array_with_a_whole_zip_is_seen(folder: Path, walks: list[bytes]) -> None:
    """The zip's own checksums are of what was written last: ours is of all arrays together."""
    expected = names(folder)
    entry = entry_of(folder)
    whole = read_arrays(entry)
    for name, change in (
        ("0.names", lambda one: one ^ 1),
        ("0.labels", lambda one: one[::-1]),
        ("watched.marks", lambda one: one[:-1]),
        ("0.ends", lambda one: one * 2**40),
    ):
        write_arrays(entry, whole | {name: change(whole[name])}, compressed=False)
        source = open_data(folder).train
        assert [source.describe(n) for n in range(len(source))] == expected
        assert "its checksum differs" in source.notes[-1]


def test_entries_of_an_older_form_are_no_damage(folder: Path) -> None:
    expected = names(folder)
    entry = entry_of(folder)
    arrays = read_arrays(entry)
    head = json.loads(arrays["head"].tobytes()) | {"format": 1}
    del arrays["checksum"]
    old = arrays | {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
    write_arrays(entry, old, compressed=False)
    assert names(folder) == expected and open_data(folder).train.notes == ()


def test_notes_are_there_the_second_time_too(folder: Path, walks: list[bytes]) -> None:
    (folder / "train/again").symlink_to("a")
    settle(folder)
    first = open_data(folder).train.notes
    walks.clear()
    assert open_data(folder).train.notes == first and "train/again" in first[0] and not walks
    tar = folder.parent / "x.tar"
    with tarfile.open(tar, "w") as file:
        file.add(folder / "train/a/1.png", "1.png")
        link = tarfile.TarInfo("2.png")
        link.type = tarfile.SYMTYPE
        file.addfile(link)
    os.utime(tar, ns=(LONG_AGO, LONG_AGO))
    first = open_data(tar).train.notes
    assert "links" in first[0] and open_data(tar).train.notes == first


def test_an_archive_of_another_size_at_the_same_time_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = folder.parent / "x.tar"
    for count in (1, 2, 3):
        with tarfile.open(tar, "w") as file:
            for number in range(count):
                info = tarfile.TarInfo(f"{number}.png")
                info.size = 20_000  # more than the last block of an archive has room for
                file.addfile(info, io.BytesIO(bytes(20_000)))
        os.utime(tar, ns=(LONG_AGO, LONG_AGO))
        assert len(open_data(tar).train) == count
    monkeypatch.setattr(shards, "members_of", None)  # and one that is the same is not read again
    assert len(open_data(tar).train) == 3
    assert len(list((folder.parent / "cache/listings").iterdir())) == 1


def test_use_makes_an_entry_young_again(folder: Path) -> None:
    names(folder)
    entry = entry_of(folder)
    os.utime(entry, (1, 1))
    names(folder)
    assert entry.stat().st_mtime > time.time() - 100
    names(folder / "train")  # writes an entry, and forgets what nobody used
    assert entry.exists()


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
