"""Cached features: computed once, resumed to the bit, and known by all that decides them."""

import dataclasses
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mocokit import recipes
from mocokit.data.open import open_data
from mocokit.data.sources.arrays import ArraySource
from mocokit.errors import MocokitError, UserError
from mocokit.nets.backbones import build_backbone
from mocokit.pack import pack
from mocokit.protocols import table as table_
from mocokit.protocols.table import CENTRE, Transform, features_of, key_of, prune
from mocokit.weights.encoder import view_spec
from mocokit.weights.subject import FrozenModel, weights_hash


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(table_, "BATCH", 16)
    monkeypatch.setattr("mocokit.protocols.features.BATCH", 16)


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


@pytest.mark.parametrize("written", [0, 1, 17, 40, 64, 69])
def test_what_a_kill_left_is_gone_on_with(tmp_path, monkeypatch, written):
    judged, images = subject(), source()
    whole = features_of(judged, images).rows
    path = tmp_path / f"{key_of(judged, images)}.partial"
    head = table_._header((70, 64))
    path.write_bytes(head + whole.tobytes()[: written * 256 + (100 if written else 0)])
    seen = counting(judged)
    resumed = features_of(judged, images, folder=tmp_path)
    np.testing.assert_array_equal(resumed.rows, whole)
    assert sum(seen) == 70 - written // 16 * 16


def test_an_interrupted_table_is_no_table(tmp_path):
    judged, images = subject(), source()

    def stop(done, total):
        if done >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features_of(judged, images, folder=tmp_path, progress=stop)
    assert not list(tmp_path.glob("*.npy")) and len(list(tmp_path.glob("*.partial"))) == 1
    seen = counting(judged)
    features_of(judged, images, folder=tmp_path)
    assert sum(seen) == 70 - 32


def test_foreign_leftovers_are_not_trusted(tmp_path):
    judged, images = subject(), source()
    path = tmp_path / f"{key_of(judged, images)}.partial"
    path.write_bytes(table_._header((70, 32)) + bytes(5000))
    rows = features_of(judged, images, folder=tmp_path).rows
    np.testing.assert_array_equal(rows, features_of(judged, images).rows)


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
    prune(tmp_path, tmp_path / "0.npy", limit_gib=2.5 / 1024)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["0.npy", "3.npy"]


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
