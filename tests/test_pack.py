"""Packs: the same images in one file, broken off and gone on with, damaged and told."""

import io
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mocokit.data.decode import BadImage
from mocokit.data.loader import Loader
from mocokit.data.open import open_data
from mocokit.data.source import Splits
from mocokit.data.sources import pack
from mocokit.data.sources.pack import HEAD, TRAILER, write_pack
from mocokit.data.sources.packed import PackedSource, lacking
from mocokit.data.sources.several import RenumberedSource
from mocokit.errors import UserError
from mocokit.run.command import asked
from mocokit.views.params import canvas_bound
from mocokit.weights.encoder import view_spec

BOUND = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many kinds in train/ and val/; two that are large, one that cannot be read."""
    root, draw = tmp_path_factory.mktemp("in"), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (height, width) in enumerate([(30, 50), (60, 45), (90, 130), (200, 81), (41, 41)]):
        for split in ("train/a", "train/b", "val/b"):
            (root / split).mkdir(parents=True, exist_ok=True)
            coarse = draw.integers(0, 256, (5, 5, 3), np.uint8)
            image = Image.fromarray(coarse).resize((width, height))
            image.save(root / split / f"{number}.jpg", exif=exif if number % 2 else Image.Exif())
            image.convert("P").save(root / split / f"{number}.png")
    (root / "train/a/bad.jpg").write_bytes(b"junk")
    return root


def packed(folder: Path, target: Path, raw: bool = False, bound: int | None = BOUND) -> Splits:
    write_pack(open_data(folder), target, bound, raw, 2, lambda count: None)
    return open_data(target)


def records(path: Path) -> bytes:
    """All but the index, which has the time of its writing in it."""
    content = path.read_bytes()
    return content[: TRAILER.unpack(content[-TRAILER.size :])[0]]


def test_images_come_back_under_their_numbers(folder: Path, tmp_path: Path) -> None:
    for original, found in zip(open_data(folder), packed(folder, tmp_path / "x.pack"), strict=True):
        assert original is not None and isinstance(found, PackedSource)
        assert original.labels is not None and found.labels is not None
        assert found.labels.tolist() == original.labels.tolist()
        assert found.classes == original.classes and found.name == original.name
        kept = shrunk = 0
        for number in range(len(original)):
            assert found.describe(number) == original.describe(number)
            if "bad" in original.describe(number):
                with pytest.raises(BadImage, match="not an image"):
                    found.read(number, BOUND)
                continue
            expected, pixels = original.read(number, BOUND), found.read(number, BOUND)
            if expected.shape == original.read(number).shape:
                np.testing.assert_array_equal(pixels, expected)
                assert found.content(number) == original.content(number)
                kept += 1
            else:
                assert pixels.shape == expected.shape
                assert np.abs(pixels.astype(int) - expected).mean() < 4
                shrunk += 1
        assert kept > 5 and shrunk > 3
    assert not (tmp_path / "x.pack.part").exists()


def test_bare_pixels_are_exact_even_where_they_were_shrunk(folder: Path, tmp_path: Path) -> None:
    original, found = open_data(folder).train, packed(folder, tmp_path / "x.pack", raw=True).train
    packed(folder, tmp_path / "files.pack")
    raw, files = ((tmp_path / f"{name}.pack").stat().st_size for name in ("x", "files"))
    assert raw > 2 * files  # it takes the most room
    for number in range(len(original)):
        if "bad" not in original.describe(number):
            expected = original.read(number, BOUND)
            np.testing.assert_array_equal(found.read(number, BOUND), expected)
            assert found.content(number) is None
            assert found.read(number, 10).shape[0] <= expected.shape[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_the_same_batches(folder: Path, tmp_path: Path, workers: int) -> None:
    """With equal numbers and canvases, views are equal too: they follow from nothing else."""
    options: Any = {"seed": 3, "batch_size": 4, "epochs": 2, "last": "keep", "bound": BOUND}
    sources = open_data(folder).train, packed(folder, tmp_path / "x.pack", raw=True).train
    plain, pack = (list(Loader(source, workers=workers, **options)) for source in sources)
    assert len(plain) == len(pack) == 12
    for (_, one), (_, two) in zip(plain, pack, strict=True):
        assert torch.equal(one.pixels, two.pixels) and one.bad == two.bad
        assert one.index.tolist() == two.index.tolist()


def test_arrays_are_packed_as_pixels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(9))
    found = packed(tmp_path / "x.npz", tmp_path / "x.pack").train
    np.testing.assert_array_equal(np.stack([found.read(n) for n in range(9)]), images)
    assert found.describe(3) == "image 3 of x"


def test_an_attempt_that_was_broken_off_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "whole.pack")
    content = (tmp_path / "whole.pack").read_bytes()
    for cut in (len(content) - 1, len(content) // 2, len(content) // 3, 30, 3, 0):
        (tmp_path / "x.pack.part").write_bytes(content[:cut])
        counts: list[int] = []
        write_pack(open_data(folder), tmp_path / "x.pack", BOUND, False, 1, counts.append)
        assert records(tmp_path / "x.pack") == records(tmp_path / "whole.pack")
        assert sum(counts) == 31 and (counts[0] > 0) == (cut > 1000)


def test_what_was_damaged_or_of_other_data_is_not_gone_on_with(
    folder: Path, tmp_path: Path
) -> None:
    packed(folder, tmp_path / "whole.pack")
    content = bytearray((tmp_path / "whole.pack").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.pack.part").write_bytes(bytes(content))
    found = packed(folder, tmp_path / "x.pack").train
    assert records(tmp_path / "x.pack") == records(tmp_path / "whole.pack")
    assert isinstance(found, PackedSource) and found.bound == BOUND


LINKS = ("link", "dangling", "fifo", "device", "folder")


@pytest.mark.parametrize("there", ["other bound", "raw", "other images", "text", "binary", *LINKS])
@pytest.mark.parametrize("name", ["x.pack.part", "x.pack"])
def test_nothing_that_is_there_is_emptied(
    folder: Path, tmp_path: Path, there: str, name: str
) -> None:
    """Ten hours of work under the name of FILE.part, a device, or what a link leads to."""
    import mocokit.pack

    place, other = tmp_path / name, tmp_path / "other"
    other.write_bytes(b"my only copy")
    if there in ("other bound", "raw", "other images"):
        images = folder / "train/a" if there == "other images" else folder
        bound = 20 if there == "other bound" else BOUND
        packed(images, tmp_path / "whole.pack", there == "raw", bound)
        place.write_bytes((tmp_path / "whole.pack").read_bytes()[:-100])
    elif there == "link":
        place.symlink_to(other)
    elif there == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    elif there == "fifo":
        os.mkfifo(place)
    elif there == "device":
        place.symlink_to("/dev/null")
    elif there == "folder":
        place.mkdir()
    else:
        place.write_bytes(b"10 hours of work\n" if there == "text" else bytes(range(256)))
    before, content = os.lstat(place), place.read_bytes() if place.is_file() else b""
    with pytest.raises(UserError) as caught:
        mocokit.pack.pack(folder, tmp_path / "x.pack", settings={"views.size": 16})
    assert name in str(caught.value) and len(str(caught.value)) < 300
    after = os.lstat(place)
    assert (after.st_ino, after.st_size, after.st_mode) == (
        before.st_ino, before.st_size, before.st_mode
    )  # fmt: skip
    assert (place.read_bytes() if place.is_file() else b"") == content
    assert other.read_bytes() == b"my only copy" and not (tmp_path / "nowhere").exists()


def test_files_that_changed_since_are_told(folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder, tmp_path / "in"))
    packed(folder, tmp_path / "old.pack")
    content = (tmp_path / "old.pack").read_bytes()
    (tmp_path / "x.pack.part").write_bytes(content[: len(content) // 2])
    first = open_data(folder).train
    changed = next(n for n in range(len(first)) if "bad" not in first.describe(n))
    path = folder / "train" / first.describe(changed)
    Image.new("RGB", (40, 40), "red").save(path)
    counts: list[int] = []
    with pytest.raises(UserError, match="other images or settings: move it away"):
        write_pack(open_data(folder), tmp_path / "x.pack", BOUND, False, 1, counts.append)
    (tmp_path / "x.pack.part").unlink()
    write_pack(open_data(folder), tmp_path / "x.pack", BOUND, False, 1, counts.append)
    assert counts[0] == 0
    found = open_data(tmp_path / "x.pack").train
    np.testing.assert_array_equal(found.read(changed), open_data(folder).train.read(changed))


def test_damage_is_a_bad_image_or_a_sentence(folder: Path, tmp_path: Path) -> None:
    source = packed(folder, tmp_path / "x.pack").train
    assert isinstance(source, PackedSource)
    content = (tmp_path / "x.pack").read_bytes()
    for place in (0, 4, 8, 13, HEAD.size - 1, HEAD.size + 40):  # mark, head, checksum, content
        damaged = bytearray(content)
        damaged[int(source.offsets[2]) + place] ^= 1
        (tmp_path / "y.pack").write_bytes(damaged)
        found = open_data(tmp_path / "y.pack").train
        assert found.read(1).shape == source.read(1).shape
        with pytest.raises(BadImage, match="damaged"):
            found.read(2)
    for cut in (
        content[:-1],
        content[:100],
        content[:-60] + bytes(60),
        content[:-200] + content[-199:],
    ):
        (tmp_path / "y.pack").write_bytes(cut)
        with pytest.raises(UserError, match=r"y\.pack .*run the same mocokit pack again"):
            open_data(tmp_path / "y.pack")


def test_fingerprints_follow_data_bound_and_form(folder: Path, tmp_path: Path) -> None:
    prints = {
        packed(folder, tmp_path / "a.pack").train.fingerprint,
        packed(folder, tmp_path / "b.pack", raw=True).train.fingerprint,
        packed(folder, tmp_path / "c.pack", bound=20).train.fingerprint,
        open_data(folder).train.fingerprint,
    }
    again = packed(folder, tmp_path / "d.pack").train
    assert len(prints) == 4 and again.fingerprint in prints


def test_a_pack_tells_whoever_wants_larger_canvases(folder: Path, tmp_path: Path) -> None:
    source = packed(folder, tmp_path / "x.pack").train
    whole = packed(folder, tmp_path / "y.pack", bound=None).train
    assert isinstance(source, PackedSource) and isinstance(whole, PackedSource)
    assert source.lacks(BOUND) == source.lacks(BOUND - 1) == whole.lacks(None) == ""
    assert "packed for canvases of 40 pixels, and these views can use 579:" in source.lacks(579)
    assert "can use whole images" in source.lacks(None)
    both = open_data(f"{tmp_path / 'x.pack'}::{tmp_path / 'y.pack'}::{folder}").train
    for seen in (both, RenumberedSource(both, both.index(), np.arange(len(both)))):
        assert lacking(seen, BOUND) == [] and lacking(seen, 579) == [source.lacks(579)]


@pytest.mark.parametrize("raw", [False, True])
def test_at_any_smaller_bound_canvases_have_the_size_of_the_originals(
    folder: Path, tmp_path: Path, raw: bool
) -> None:
    """Where packing shrank nothing, boxes and with them views are those of the originals."""
    original = open_data(folder).train
    found = packed(folder, tmp_path / "x.pack", raw=raw, bound=200).train
    for bound in (5, 13, 40, 41, 100):
        for number in range(len(original)):
            if "bad" not in original.describe(number):
                expected = original.read(number, bound)
                assert found.read(number, bound).shape == expected.shape


@pytest.mark.parametrize(
    ("raw", "bound", "settled"),
    [(False, None, False), (False, BOUND, True), (True, None, True), (True, BOUND, True)],
)
def test_what_was_shrunk_keeps_its_scale(
    folder: Path, tmp_path: Path, raw: bool, bound: int | None, settled: bool
) -> None:
    for source in packed(folder, tmp_path / "x.pack", raw, bound):
        assert isinstance(source, PackedSource) and source.settled == settled


@pytest.mark.parametrize(
    ("recipe", "area", "bound"),
    [
        ("mocov2", (0.2, 1.0), 42), ("mocov2", (0.2, 0.3), 42), ("mocov2", (0.8, 1.0), 21),
        ("mocov2_cifar10", None, 131),
    ],
)  # fmt: skip
def test_the_smallest_crop_says_how_far_images_are_shrunk(
    folder: Path, tmp_path: Path, recipe: str, area: tuple[float, float] | None, bound: int
) -> None:
    """The side of a view over the root of the smallest area times the narrowest ratio."""
    import mocokit.pack

    settings = {"views.size": 16, "views.crop_area": area} if area else {}
    mocokit.pack.pack(folder, tmp_path / "x.pack", recipe, settings=settings)
    found = open_data(tmp_path / "x.pack").train
    assert isinstance(found, PackedSource) and found.bound == bound
    for number in range(len(found)):
        if "bad" not in found.describe(number):
            original = open_data(folder).train.read(number)
            assert min(found.read(number).shape[:2]) >= min(bound, *original.shape[:2])


def test_labels_of_a_pack(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "x.pack")
    train = open_data(tmp_path / "x.pack", "none").train
    assert train.labels is None and train.classes == ()
    with pytest.raises(UserError, match="set it when packing"):
        open_data(tmp_path / "x.pack", "folders")


def test_only_one_process_writes_a_pack(folder: Path, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "x.pack.part", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            packed(folder, tmp_path / "x.pack")


SLOWLY = """
import sys, time
import mocokit.data.sources.pack as pack
from mocokit.cli import main

record, pack._CHUNK = pack._record, 2
pack._record = lambda *image, **how: (time.sleep(0.2), record(*image, **how))[1]
main()
"""


def test_ctrl_c_says_that_the_same_command_goes_on(folder: Path, tmp_path: Path) -> None:
    target, part = tmp_path / "x.pack", tmp_path / "x.pack.part"
    command = [sys.executable, "-c", SLOWLY, "pack", str(folder), str(target)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 3000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and not target.exists()
    assert said.splitlines()[-1] == "mocokit: stopped; the same command goes on where it ended"
    counts: list[int] = []
    bound = canvas_bound(view_spec(asked("mocov2", str(folder), {})[0]))
    write_pack(open_data(folder), target, bound, False, 1, counts.append)
    assert 0 < counts[0] < 31 == sum(counts)


def test_a_stopped_command_leaves_what_it_packed(
    folder: Path, tmp_path: Path, mocokit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """130 is a shell's code for Ctrl-C; 75 would tell a batch system to start it again."""
    target, record = tmp_path / "x.pack", pack._record
    done: list[bytes] = []

    def stopped(*image: Any, **how: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(b"")
        return record(*image, **how)

    monkeypatch.setattr(pack, "_CHUNK", 2)
    monkeypatch.setattr(pack, "_record", stopped)
    words = ("pack", folder, target, "--set", "views.size=16")
    code, out, said = mocokit(*words)
    assert (code, out) == (130, "")
    assert said.splitlines()[-1] == "mocokit: stopped; the same command goes on where it ended"
    assert not target.exists() and (tmp_path / "x.pack.part").stat().st_size > 0
    monkeypatch.setattr(pack, "_record", record)
    assert mocokit(*words)[0] == 0
    assert len(open_data(target).train) == 21 and os.listdir(tmp_path) == ["x.pack"]


def test_a_full_disk_is_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*make room"):
        packed(folder, tmp_path / "x.pack")
    monkeypatch.undo()
    assert len(packed(folder, tmp_path / "x.pack").train) == 21


def test_workers_get_no_copy_of_the_file(folder: Path, tmp_path: Path) -> None:
    source = packed(folder, tmp_path / "x.pack", raw=True).train
    source.read(0)
    assert len(pickle.dumps(source)) < 5000 < (tmp_path / "x.pack").stat().st_size
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(0), source.read(0))


def test_files_are_copied_as_they_are_without_a_bound(folder: Path, tmp_path: Path) -> None:
    original, found = open_data(folder).train, packed(folder, tmp_path / "x", bound=None).train
    for number in range(len(original)):
        assert found.content(number) == original.content(number)


def test_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import mocokit.pack

    target = tmp_path / "my x.pack"
    settings = {"views.size": 16}
    assert mocokit.pack.pack(folder, target, settings=settings) == target
    said = capsys.readouterr().err
    assert said.rstrip().endswith(f"mocokit pretrain mocov2 {shlex.quote(str(target))}")
    assert "31 images" in said and "1 cannot be read" in said and "were shrunk" in said
    with pytest.raises(UserError, match="is there already"):
        mocokit.pack.pack(folder, target)
    with pytest.raises(UserError, match="there is no folder"):
        mocokit.pack.pack(folder, tmp_path / "gone/x.pack")
    assert Image.open(io.BytesIO(open_data(target).train.content(0) or b"")).format == "JPEG"
    (tmp_path / "x.txt").write_text(f"{folder}/train/a/0.jpg\tdog\n{folder}/train/a/1.jpg\t\n")
    wide = settings | {"monitor.resize": 2000}  # a score may need more than the crops
    mocokit.pack.pack(tmp_path / "x.txt", tmp_path / "y.pack", settings=wide)
    assert isinstance(seen := open_data(tmp_path / "y.pack").train, PackedSource)
    assert seen.bound == 2000
    assert "note: 1 of 2 images have nothing behind the tab" in capsys.readouterr().err
