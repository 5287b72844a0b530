"""Archives: what is found in them, where, and what whoever made them cannot do."""

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
from mocokit.data.sources.shards import ShardSource
from mocokit.errors import UserError


def image(level: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (level, 0, 0)).save(file, kind)
    return file.getvalue()


def shard(path: Path, members: dict[str, Any], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                (member.type,), member.linkname = content, "/etc/passwd"
                archive.addfile(member)
    return path


def levels(source: Any) -> list[int]:
    return [int(source.read(number)[0, 0, 0]) for number in range(len(source))]


def names(source: Any) -> list[str]:
    return [source.describe(number) for number in range(len(source))]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_of_webdataset(tmp_path, form):
    for number in range(3):
        base = 10 * number
        members = {
            f"{base + 1:04}.cls": b"7\n",
            f"{base + 1:04}.png": image(base + 1),
            f"{base + 2:04}.jpg": image(base + 2),
            f"{base + 2:04}.mask.png": image(99),
            f"{base + 2:04}.json": b"{}",
            f"{base + 2:04}.cls": b"0",
        }
        shard(tmp_path / f"set-{number:03}.tar", members, form)
    source, validation = open_data(tmp_path / "set-{000..002}.tar")
    assert isinstance(source, ShardSource) and validation is None and source.name == "set"
    assert levels(source) == [1, 2, 11, 12, 21, 22]
    assert source.labels.tolist() == [7, 0] * 3 and source.classes == tuple("01234567")
    assert names(source)[3] == "set-001.tar/0012.jpg" and source.notes == ()
    assert open_data(tmp_path).train.fingerprint == source.fingerprint
    assert open_data(tmp_path / "set-{000..002}.tar", "none").train.labels is None


@pytest.mark.parametrize("inside", ["", "./", "v1.0/", "./a.b/c.d/", "set.tar/", "x/"])
def test_dots_of_a_folder_are_no_dots_of_a_name(tmp_path, inside):
    """`7.jpg` beside `7.mask.png` is the image; where all names have more parts, all are."""
    members = {
        "1.jpg": image(1, "JPEG"), "1.mask.png": image(99), "2.mask.png": image(98),
        "2.png": image(2), "2.cls": b"5", "3.left.png": image(3), "3.right.png": image(4),
    }  # fmt: skip
    path = shard(tmp_path / "a.tar", {f"{inside}{name}": one for name, one in members.items()})
    source = open_data(path).train
    stems = [name.rpartition("/")[2] for name in names(source)]
    assert stems == ["1.jpg", "2.png", "3.left.png", "3.right.png"]
    assert [source.read(n)[0, 0, 0] // 2 for n in range(4)] == [0, 1, 1, 2]


def test_long_and_strange_names(tmp_path):
    long = "d/" * 80 + "x" * 150 + ".png"
    found = open_data(shard(tmp_path / "a.tar", {long: image(1), "ü\n.png": image(2)})).train
    assert names(found) == [f"a.tar/{long}", "a.tar/ü\\n.png"] and levels(found) == [1, 2]


def test_classes_by_name_and_missing_ones(tmp_path):
    members = {"1.png": image(1), "1.cls": b"dog", "2.png": image(2), "2.cls": b"cat"}
    source = open_data(shard(tmp_path / "a.tar", members)).train
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0]
    source = open_data(shard(tmp_path / "b.tar", members | {"3.png": image(3)})).train
    assert source.labels is None and "no .cls" in source.notes[0]


def test_only_train_is_trained_on(tmp_path):
    train = {"1.png": image(1), "1.cls": b"0", "2.png": image(2), "2.cls": b"3"}
    held = {"5.png": image(5), "5.cls": b"1"}
    shard(tmp_path / "a/set-train-0.tar", train)
    shard(tmp_path / "a/set-test-0.tar", {"9.png": image(9), "9.cls": b"1"})
    shard(tmp_path / "a/set-val-0.tar", held)
    shard(tmp_path / "b/train/0.tar", train)
    shard(tmp_path / "b/val/0.tar", held)
    for place in (tmp_path / "a", tmp_path / "a/*.tar", tmp_path / "b"):
        source, validation = open_data(place)
        assert levels(source) == [1, 2] and levels(validation) == [5]
        assert source.labels.tolist() == [0, 3] and validation.labels.tolist() == [1]
        assert source.classes == validation.classes == tuple("0123")
    inside = {f"set/{k}": v for k, v in {
        "train/cat/1.png": image(1), "train/ant/2.png": image(2), "val/cat/3.png": image(3),
        "test/cat/4.png": image(4),
    }.items()}  # fmt: skip
    source, validation = open_data(shard(tmp_path / "c.tar", inside))
    assert levels(source) == [1, 2] and levels(validation) == [3]
    assert source.classes == ("ant", "cat") and source.labels.tolist() == [1, 0]
    assert validation.labels.tolist() == [1]
    assert open_data(tmp_path / "c.tar", "none").train.labels is None


def test_folders_in_an_archive_are_classes_when_asked(tmp_path):
    path = shard(tmp_path / "a.tar", {"./b/1.png": image(1), "./a/2.png": image(2)})
    assert open_data(path).train.labels is None
    source = open_data(path, "folders").train
    assert source.classes == ("a", "b") and source.labels.tolist() == [1, 0]


def test_nothing_in_an_archive_reaches_outside_it(tmp_path):
    members = {
        "/etc/1.png": image(1),
        "../../2.png": image(2),
        "link.png": (tarfile.SYMTYPE,),
        "hard.png": (tarfile.LNKTYPE,),
        "device.png": (tarfile.CHRTYPE,),
        "pipe.png": (tarfile.FIFOTYPE,),
        "._3.png": image(3),
    }
    path = shard(tmp_path / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    source = open_data(path).train
    assert levels(source) == [1, 2]
    assert "4 members are links, devices" in source.notes[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_that_a_header_claims_are_not_believed(tmp_path):
    path = shard(tmp_path / "a.tar", {"1.png": image(1), "2.png": image(2)})
    member = tarfile.TarInfo("3.png")
    member.size = 2**40
    longest = tarfile.TarInfo("././@LongLink")
    longest.type, longest.size = tarfile.GNUTYPE_LONGNAME, 2**33
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 512
    for header in (member, longest):
        content = path.read_bytes()[:end] + header.tobuf(tarfile.GNU_FORMAT)
        claimed = tmp_path / "b.tar"
        claimed.write_bytes(content)
        os.truncate(claimed, 2**34)  # as long as it claims, without room on the disk
        os.utime(claimed, ns=(1, header.size))
        found = open_data(claimed).train
        assert levels(found) == [1, 2] and len(found.notes) == 1


def test_damaged_archives(tmp_path):
    good = {f"{n}.png": image(n) for n in range(1, 5)}
    content = shard(tmp_path / "a.tar", good).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[:2400])  # within the third member's header
    found = open_data(cut).train
    assert levels(found) == [1, 2] and "damaged after byte 2,048" in found.notes[0]
    cut.write_bytes(content[: 2048 + 520])
    os.utime(cut, ns=(1, 5))
    found = open_data(cut).train
    assert levels(found) == [1, 2] and "cut off" in found.notes[0]
    for name, bad, said in [
        ("junk.tar", b"junk" * 300, "is no tar archive"),
        ("empty.tar", b"\0" * 10240, "found no images"),
        ("zipped.tar", b"\x1f\x8b" + b"x" * 600, "gunzip"),
        ("a.tar.gz", b"\x1f\x8b", "compressed"),
    ]:
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(UserError, match=said) as caught:
            open_data(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_archives_that_change_under_a_run_give_bad_images(tmp_path):
    path = shard(tmp_path / "a.tar", {"1.png": image(1), "2.png": image(2)})
    source = open_data(path).train
    os.truncate(path, 1600)
    assert source.read(0)[0, 0, 0] == 1
    with pytest.raises(BadImage, match="ends before"):
        source.read(1)
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(0)


def test_a_missing_archive_of_a_pattern_is_named(tmp_path):
    shard(tmp_path / "a-0.tar", {"1.png": image(1)})
    with pytest.raises(UserError, match=r"a-1\.tar"):
        open_data(tmp_path / "a-{0..1}.tar")


def test_the_index_of_archives(tmp_path):
    source = open_data(shard(tmp_path / "a.tar", {"1.png": image(1), "2.png": image(2)})).train
    save_index(source.index(), tmp_path / "images.idx")
    index = load_index(tmp_path / "images.idx")
    assert index.kind == "shards" and index.fingerprint == source.fingerprint
    assert list(index.names.every()) == [b"a.tar/1.png", b"a.tar/2.png"]


def test_members_are_read_as_tarfile_reads_them(shared_data, tmp_path):
    """Real photos, against the standard library's own reading."""
    folder = shared_data / "caltech_a/val"
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(folder, "photos")
    source = open_data(tmp_path / "photos.tar").train
    assert len(source) == 557
    with tarfile.open(tmp_path / "photos.tar") as archive:
        for number in range(0, 557, 50):
            member = archive.extractfile(source.describe(number).removeprefix("photos.tar/"))
            assert source.content(number) == member.read()
    plain = open_data(folder).train
    position = names(plain).index(source.describe(100).removeprefix("photos.tar/photos/"))
    np.testing.assert_array_equal(source.read(100), plain.read(position))


@pytest.mark.parametrize(
    ("train", "held"),
    [("Train", "Test"), ("set/train2017", "set/val2017"), ("training/train", "training/val")],
)
@pytest.mark.parametrize("inside", [True, False])
def test_splits_as_others_spell_and_place_them(tmp_path, train, held, inside):
    """As folders within an archive, or as folders of archives."""
    ours, theirs = {"cat/1.png": image(1), "ant/2.png": image(2)}, {"cat/3.png": image(3)}
    if inside:
        members = {f"{train}/{name}": content for name, content in ours.items()}
        members |= {f"{held}/{name}": content for name, content in theirs.items()}
        shard(tmp_path / "a.tar", members)
    else:
        shard(tmp_path / train / "0.tar", ours)
        shard(tmp_path / held / "0.tar", theirs)
    source, validation = open_data(tmp_path)
    assert sorted(levels(source)) == [1, 2] and validation is not None
    assert levels(validation) == [3]
