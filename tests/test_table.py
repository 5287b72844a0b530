"""Cached features: computed once, resumed to the bit, and known by all that decides them."""

import dataclasses
import os
import signal
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from mocokit import recipes
from mocokit.data import decode
from mocokit.data.open import open_data
from mocokit.data.sources.arrays import ArraySource
from mocokit.engine.stop import Stopped, StopSignals
from mocokit.errors import MocokitError, UserError
from mocokit.files import locked
from mocokit.nets.backbones import build_backbone
from mocokit.pack import pack
from mocokit.protocols import features as features_, table as table_, table_file
from mocokit.protocols.table import CENTRE, Transform, features_of, key_of, prune
from mocokit.protocols.table_file import TableFile, header
from mocokit.weights.encoder import view_spec
from mocokit.weights.subject import FrozenModel, weights_hash


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    patch_batches(monkeypatch)


def patch_batches(patch):
    for module in (table_, table_file, features_):
        patch.setattr(module, "BATCH", 16)


def spec():
    return view_spec(recipes.demo())


def source(count=70, seed=0):
    images = np.random.default_rng(seed).integers(0, 255, (count, 32, 32, 3), np.uint8)
    return ArraySource(images, np.arange(count) % 3, "toy")


def subject(seed=0):
    torch.manual_seed(seed)
    return FrozenModel("toy", build_backbone("resnet_tiny").eval(), 64, spec(), "resnet_tiny")


def counting(judged):
    """Images that go through the network."""
    seen = []
    judged.network.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    return seen


def test_features_are_the_networks_and_computed_once(tmp_path):
    judged, images = subject(), source()
    seen = counting(judged)
    first = features_of(judged, images, folder=tmp_path)
    assert sum(seen) == 70
    second = features_of(judged, images, folder=tmp_path)
    assert sum(seen) == 70 and isinstance(second.rows, np.memmap)
    apart = features_of(judged, images)
    np.testing.assert_array_equal(first.rows, apart.rows)
    np.testing.assert_array_equal(second.rows, apart.rows)
    pixels = torch.from_numpy(images.images[:5]).permute(0, 3, 1, 2) / 255
    by_hand = judged.network((pixels - 0.5) / 0.25).detach()
    np.testing.assert_allclose(first.take(np.arange(5)).numpy(), by_hand.numpy(), atol=1e-5)
    assert not list(tmp_path.glob("*.partial"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_what_a_kill_left_is_gone_on_with(tmp_path, monkeypatch, kept):
    judged, images = subject(), source()
    whole = features_of(judged, images).rows
    plain, written = TableFile.write, []

    def killed(self, block, rows):
        if len(written) == kept:
            raise Killed
        written.append(block)
        plain(self, block, rows)

    monkeypatch.setattr(TableFile, "write", killed)
    with pytest.raises(Killed):
        features_of(judged, images, folder=tmp_path)
    monkeypatch.setattr(TableFile, "write", plain)
    seen, notes = counting(judged), []
    resumed = features_of(judged, images, folder=tmp_path, log=notes.append)
    np.testing.assert_array_equal(resumed.rows, whole)
    assert sum(seen) == 70 - kept * 16 and notes == []


def test_a_stopped_table_says_what_is_kept(tmp_path):
    def stop(done, total):
        if done >= 32:
            os.kill(os.getpid(), signal.SIGTERM)

    judged, images = subject(), source()
    with (
        StopSignals() as signals,
        signals.interruptible(),
        pytest.raises(Stopped, match="features of toy: 32 of 70 images are kept"),
    ):
        features_of(judged, images, folder=tmp_path, progress=stop)
    seen = counting(judged)
    features_of(judged, images, folder=tmp_path)
    assert sum(seen) == 70 - 32


HEAD, ROWS = len(header((70, 64))), 70 * 64 * 4
PARTS = {"header": (0, HEAD), "rows": (HEAD, HEAD + ROWS), "sums": (HEAD + ROWS, HEAD + ROWS + 40)}


@settings(max_examples=60)
@given(st.sampled_from(sorted(PARTS)), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_every_damaged_byte_is_found_and_costs_its_batch(damaged_folder, part, at, change):
    """And is told; what is made anew is the same to the bit."""
    judged, images, folder, whole = damaged_folder
    (path,) = folder.glob("*.npy")
    first, last = PARTS[part]
    place = first + int(at * (last - first))
    content = bytearray(path.read_bytes())
    content[place] ^= change
    path.write_bytes(content)
    seen, notes = counting(judged), []
    again = features_of(judged, images, folder=folder, log=notes.append)
    np.testing.assert_array_equal(again.rows, whole)
    assert len(notes) == 1 and "damaged" in notes[0]
    block = {"rows": (place - HEAD) // 4096, "sums": (place - HEAD - ROWS) // 8}.get(part)
    assert sum(seen) == (70 if block is None else 6 if block == 4 else 16)


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch_batches(patch)
        judged, images = subject(), source()
        whole = features_of(judged, images, folder=folder).rows.copy()
    return judged, images, folder, whole


@pytest.mark.parametrize(
    "how", ["empty", "cut", "longer", "text", "shape", "type", "other", "link"]
)
def test_what_is_no_table_is_made_anew(tmp_path, how):
    """Another shape or type in the header, too, and another table under this name."""
    judged, images = subject(), source()
    whole = features_of(judged, images, folder=tmp_path).rows.copy()
    (path,) = tmp_path.glob("*.npy")
    content = path.read_bytes()
    if how == "other":
        other = features_of(judged, source(seed=1), folder=tmp_path)
        content = next(one for one in tmp_path.glob("*.npy") if one != path).read_bytes()
        assert not np.array_equal(other.rows, whole)
    elif how == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    if how != "link":
        changed = {
            "empty": b"",
            "cut": content[:500],
            "longer": content + b"x",
            "text": b"no table",
            "shape": header((64, 70)) + content[HEAD:],
            "type": content.replace(b"<f4", b"<i4"),
            "other": content,
        }[how]
        path.write_bytes(changed)
    notes = []
    again = features_of(judged, images, folder=tmp_path, log=notes.append)
    np.testing.assert_array_equal(again.rows, whole)
    assert len(notes) == 1 and "damaged" in notes[0] and "again" in notes[0]
    seen = counting(judged)
    features_of(judged, images, folder=tmp_path, log=notes.append)
    assert len(notes) == 1 and seen == []
    if how == "link":
        assert not path.is_symlink() and (tmp_path / "elsewhere").read_bytes() == content


def test_a_table_is_brought_to_the_disk_once_it_is_whole(tmp_path, monkeypatch):
    synced, plain = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(number), plain(number)))
    for _ in range(2):
        features_of(subject(), source(), folder=tmp_path)
        assert len(synced) == 1


def test_a_batch_counts_only_in_its_own_place(tmp_path):
    """Two whole batches that changed places, each with its checksum."""
    judged, images = subject(), source()
    whole = np.array(features_of(judged, images, folder=tmp_path).rows)
    (path,) = tmp_path.glob("*.npy")
    content, size = path.read_bytes(), 16 * 64 * 4
    for at, length in ((HEAD, size), (HEAD + ROWS, 8)):
        first, second = content[at : at + length], content[at + length : at + 2 * length]
        content = content[:at] + second + first + content[at + 2 * length :]
    path.write_bytes(content)
    np.testing.assert_array_equal(features_of(judged, images, folder=tmp_path).rows, whole)


@pytest.mark.parametrize("why", [PermissionError, TimeoutError, FileNotFoundError, OSError])
def test_what_could_not_be_read_for_a_while_is_tried_again(tmp_path, monkeypatch, why):
    """Rights, a disk that was away; a file that is broken stays unread, at the cost of a try."""
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "03.png").write_bytes(b"nothing")
    images, judged, plain = open_data(tmp_path).train, subject(), decode.read_regular
    whole = features_of(judged, images).rows
    away = {f"{number:02d}.png" for number in (1, 2, *range(16, 32))}

    def read(path, *rest):
        if os.path.basename(os.fsdecode(path)) in away:
            raise why(5, "the disk is away")
        return plain(path, *rest)

    monkeypatch.setattr(decode, "read_regular", read)
    found = features_of(judged, images, folder=tmp_path / "cache")
    assert len(found.good) == 40 - 1 - 18
    away -= {"02.png"}
    found = features_of(judged, images, folder=tmp_path / "cache")
    assert len(found.good) == 40 - 1 - 17
    away.clear()
    seen = counting(judged)
    found = features_of(judged, images, folder=tmp_path / "cache")
    np.testing.assert_array_equal(found.rows, whole)
    assert sum(seen) == 15 + 16 and np.isnan(found.rows[3]).all()
    seen.clear()
    features_of(judged, images, folder=tmp_path / "cache")
    assert seen == []


def test_use_refreshes_the_age_of_a_table(tmp_path):
    judged, images = subject(), source()
    features_of(judged, images, folder=tmp_path)
    (path,) = tmp_path.glob("*.npy")
    os.utime(path, (1, 1))
    features_of(judged, images, folder=tmp_path)
    assert path.stat().st_mtime > 10**9


def test_two_processes_compute_a_table_once(tmp_path):
    """The second waits for the lock, and then finds the table."""
    judged, images, seen = subject(), source(), []

    def second():
        other = subject()
        seen.append(counting(other))
        begun.set()
        features_of(other, images, folder=tmp_path)

    begun, thread = threading.Event(), threading.Thread(target=second)

    def progress(done, total):
        if not thread.ident:
            thread.start()
            begun.wait(60)
            time.sleep(0.3)

    features_of(judged, images, folder=tmp_path, progress=progress)
    thread.join(60)
    assert seen == [[]]


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(self, place, content):
        raise OSError(28, "No space left on device")

    def mapped(*_, **__):  # of a disk in memory, the system kills who looks at what has no room
        pytest.fail("a table was mapped before it was written")

    monkeypatch.setattr(TableFile, "_put", full)
    monkeypatch.setattr(np, "memmap", mapped)
    with pytest.raises(MocokitError, match=r"No space left on device\); it needs.*MOCOKIT_CACHE"):
        features_of(subject(), source(), folder=tmp_path)


def test_the_key_holds_all_that_decides_the_numbers():
    judged, images = subject(), source()
    keys = [key_of(judged, images), key_of(subject(1), images), key_of(judged, source(seed=1))]
    keys += [key_of(judged, source(count=60)), key_of(judged, images, Transform(1))]
    keys += [key_of(judged, images, Transform(2))]
    for change in (
        {"spec": dataclasses.replace(spec(), size=24, resize=24)},
        {"spec": dataclasses.replace(spec(), resize=40)},
        {"spec": dataclasses.replace(spec(), interpolation="bicubic")},
        {"spec": dataclasses.replace(spec(), std=(0.3, 0.3, 0.3))},
        {"precision": "bfloat16"},
        {"layer": "head"},
        {"architecture": "another"},
    ):
        keys.append(key_of(dataclasses.replace(judged, **change), images))
    assert len(set(keys)) == len(keys)
    renamed = dataclasses.replace(judged, name="other")
    assert key_of(renamed, images) == keys[0] == key_of(subject(), source())


def test_a_buffer_is_part_of_the_weights():
    network = subject().network
    before = weights_hash(network)
    network.bn1.running_mean[3] += 1e-6
    assert weights_hash(network) != before


def test_random_crops_are_another_table(tmp_path):
    judged, images = subject(), source()
    centre = features_of(judged, images, CENTRE, folder=tmp_path).rows
    crops = features_of(judged, images, Transform(5), folder=tmp_path).rows
    assert not np.allclose(centre, crops)
    np.testing.assert_array_equal(crops, features_of(judged, images, Transform(5)).rows)


def test_unreadable_images_are_rows_of_nan(tmp_path):
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
    for number in (0, 5, *range(16, 32), 39):  # a whole batch is among them
        (tmp_path / f"{number:02d}.png").write_bytes(b"nothing")
    images, judged = open_data(tmp_path).train, subject()
    found = features_of(judged, images, folder=tmp_path / "cache")
    missing = [0, 5, *range(16, 32), 39]
    assert found.good.tolist() == [n for n in range(40) if n not in missing]
    assert np.isnan(found.rows[missing]).all()
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of the 40 images"):
        features_of(judged, open_data(tmp_path).train)


def test_a_folder_that_cannot_be_written_names_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MocokitError, match="MOCOKIT_CACHE"):
        features_of(subject(), source(), folder=tmp_path / "file" / "cache")


def test_the_oldest_tables_go_first(tmp_path):
    import os

    for number in range(4):
        path = tmp_path / f"{number}.npy"
        path.write_bytes(bytes(2**20))
        os.utime(path, (number, number))
    (tmp_path / "old.partial").write_bytes(bytes(2**20))  # of 0.1
    os.utime(tmp_path / "old.partial", (0, 0))
    with locked(tmp_path / "1.lock"):  # what another process is using stays
        prune(tmp_path, tmp_path / "0.npy", limit_gib=2.5 / 1024)
    there = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert there == {"0.npy", "1.npy", "3.npy"}


def photo(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), (level, level, level)).save(path)


def test_other_pixels_under_the_same_names_are_other_features(tmp_path):
    """train/a/1.bmp and val/a/1.bmp: their fingerprints agree, and even sizes and times may."""
    for side, level in (("train", 0), ("val", 200), ("train", 9)):
        for name in ("a/1.bmp", "b/1.bmp"):
            photo(tmp_path / "in" / side / name, level)
            os.utime(tmp_path / "in" / side / name, ns=(10**18, 10**18))
    train, validation = open_data(tmp_path / "in")
    assert train.fingerprint == validation.fingerprint
    judged = subject()
    tables = [
        features_of(judged, one, folder=tmp_path / "cache").rows.copy()
        for one in (train, validation)
    ]
    assert not np.array_equal(*tables)
    before = key_of(judged, train)
    assert key_of(judged, open_data(tmp_path / "in").train) == before
    photo(tmp_path / "in/train/b/1.bmp", 77)
    assert key_of(judged, train) != before


def test_stamps_tell_the_sides_of_archives_and_packs_apart(tmp_path):
    for side, level in (("train", 0), ("val", 200)):
        for name in ("a/1.png", "b/1.png"):
            photo(tmp_path / "in" / side / name, level)
        with tarfile.open(tmp_path / f"{side}.tar", "w") as file:
            file.add(tmp_path / "in" / side, arcname=".")
    pack(tmp_path / "in", tmp_path / "x.pack", "demo")
    first, second = open_data(f"{tmp_path}/{{train,val}}.tar")
    assert first.stamp() != second.stamp()
    packed, held = open_data(tmp_path / "x.pack")
    assert packed.fingerprint == held.fingerprint and packed.stamp() != held.stamp()
    both = open_data(f"{tmp_path}/train.tar::{tmp_path}/x.pack").train
    assert first.stamp() in both.stamp() and packed.stamp() in both.stamp()
