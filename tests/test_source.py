"""Sources: what is found where, under which number, and what is said when it is not."""

import encodings.cp437  # noqa: F401  zipfile loads it late, when `nobody` may not read it
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocokit.data import walk
from mocokit.data.decode import BadImage
from mocokit.data.index import load_index, save_index
from mocokit.data.names import Names
from mocokit.data.open import open_data
from mocokit.data.source import Splits
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.folder import EXTENSIONS, FolderSource, split_names
from mocokit.data.sources.tars import Member, splits_inside
from mocokit.errors import UserError

unix = pytest.mark.skipif(not hasattr(os, "seteuid"), reason="changes its own rights")

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"


def make(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 0)).save(path, "PNG")
    return root


def names_of(source: Any) -> list[str]:
    return [source.describe(index) for index in range(len(source))]


def refusal(path: str | Path | None, labels: Any = "auto") -> str:
    """The sentence with which a path is refused: one line without a full stop inside."""
    with pytest.raises(UserError) as caught:
        open_data(path, labels)
    text = str(caught.value)
    assert "\n" not in text and ": " in text
    return text


# Folders


def test_images_are_found_nested_or_flat_in_the_order_of_bytes(tmp_path: Path) -> None:
    make(tmp_path, "b.png", "a/z.PNG", "a-b/x.Jpg", "Z.tif", "a/y/deep.webp", "notes.txt", "ä.gif")
    source, validation = open_data(tmp_path)
    expected = ["Z.tif", "a-b/x.Jpg", "a/y/deep.webp", "a/z.PNG", "b.png", "ä.gif"]
    assert names_of(source) == expected == sorted(expected, key=os.fsencode)
    assert validation is None and source.labels is None and source.classes == ()
    assert source.read(4).tolist() == np.full((4, 6, 3), (0, 0, 0)).tolist()
    assert source.read(3)[0, 0, 0] == 1 and len(source) == 6


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_counts_in_any_case(tmp_path: Path, extension: str) -> None:
    make(tmp_path, f"a.{extension}", f"b.{extension.upper()}", extension)
    assert names_of(open_data(tmp_path).train) == sorted(
        [f"a.{extension}", f"b.{extension.upper()}"]
    )


def test_hidden_things_and_lost_and_found_are_skipped(tmp_path: Path) -> None:
    make(tmp_path, "a.png", ".b.png", ".git/c.png", "d/.e/f.png", "d/._g.png", "lost+found/h.png")
    make(tmp_path, ".png")
    assert names_of(open_data(tmp_path).train) == ["a.png"]


def test_links_are_followed_and_loops_survived(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", "x.png", "sub/y.png")
    root = make(tmp_path / "root", "a/1.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "a/up").symlink_to(root)
    (root / "a/self").symlink_to("self")
    (elsewhere / "back").symlink_to(root)
    (root / "file.png").symlink_to(elsewhere / "x.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    source = open_data(root).train
    expected = ["a/1.png", "file.png", "gone.png", "linked/sub/y.png", "linked/x.png"]
    assert names_of(source) == expected
    with pytest.raises(BadImage, match="No such file"):
        source.read(2)


def test_two_links_to_each_other_end(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    source = open_data(tmp_path).train
    assert names_of(source) == ["a/1.png", "b/2.png"]
    assert "a/to_b, " in source.notes[0] and "b/to_a" in source.notes[0]


def test_a_folder_is_listed_once_whatever_links_to_it(tmp_path: Path) -> None:
    """22 levels of two links each are 4 million ways, and links to / lead everywhere."""
    root = make(tmp_path / "in", "a/1.png", "z/2.png", "lv21/x.png")
    elsewhere = make(tmp_path / "elsewhere", "3.png", "sub/4.png")
    for level in range(21):
        (root / f"lv{level}").mkdir()
        for side in "ab":
            (root / f"lv{level}/{side}").symlink_to(f"../lv{level + 1}")
    for name, target in {
        "m1": elsewhere,
        "m2": elsewhere,
        "m0sub": elsewhere / "sub",
        "b": root / "z",
        "top": "/",
        "proc": "/proc",
        "sys": "/sys",
        "dev": "/dev",
        "up": "..",
        "here": ".",
        "self": "self",
        "home": tmp_path,
    }.items():
        (root / name).symlink_to(target)
    source = open_data(root).train
    # By its own name where it has one below the root; else by the first of its links.
    expected = ["a/1.png", "lv21/x.png", "m0sub/4.png", "m1/3.png", "z/2.png"]
    assert names_of(source) == expected
    already, system = source.notes[:2]
    assert "listed already" in already and "and 45 more" in already
    assert "system's own" in system and f"{root}/proc" in system
    (root / "train").mkdir()
    (root / "a/1.png").rename(root / "train/1.png")
    with pytest.raises(UserError, match=r"images in train/ and in b/"):
        open_data(root)  # looks for others beside train/, not through the links to /


@pytest.mark.parametrize("backwards", [False, True])
def test_which_link_counts_follows_from_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    """Not from the order in which the disk lists them."""
    elsewhere, root, plain = make(tmp_path / "elsewhere", "1.png"), tmp_path / "in", walk.entries
    root.mkdir()
    for name in "cadb":
        (root / name).symlink_to(elsewhere)
    monkeypatch.setattr(
        walk,
        "entries",
        lambda *of: sorted(plain(*of), key=lambda entry: entry.name, reverse=backwards),
    )
    assert names_of(open_data(root).train) == ["a/1.png"]


def test_no_folder_of_the_system_is_looked_through_beside_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", "train/1.png")
    (tmp_path / "in/proc").symlink_to("/proc")
    monkeypatch.setattr(walk, "MOST_FOLDERS", 60)
    assert names_of(open_data(tmp_path / "in").train) == ["1.png"]


def test_too_many_folders_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{n}/{n}.png" for n in range(12)))
    for name, most in (("MOST_FOLDERS", 10), ("MOST_FILES", 10)):
        with monkeypatch.context() as patched:
            patched.setattr(walk, name, most)
            with pytest.raises(UserError, match="are more than .* a folder further down"):
                open_data(tmp_path)


def test_pipes_are_not_images(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert len(open_data(tmp_path).train) == 1


def test_strange_names_work_and_are_described_on_one_line(tmp_path: Path) -> None:
    strange = [b"new\nline.png", b"\xff\xfe.png", b"tab\there.png", "ü.png".encode()]
    plain = make(tmp_path, "plain.png") / "plain.png"
    for name in strange:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(plain.read_bytes())
    plain.unlink()
    source = open_data(tmp_path).train
    assert names_of(source) == ["new\\nline.png", "tab\\there.png", "ü.png", "\\udcff\\udcfe.png"]
    for index in range(4):
        assert source.read(index).shape == (4, 6, 3)
        source.describe(index).encode()
    save_index(source.index(), tmp_path / "images.idx")
    again = FolderSource.of_index(tmp_path, load_index(tmp_path / "images.idx"))
    assert [again.names[i] for i in range(4)] == [source.names[i] for i in range(4)]  # type: ignore[attr-defined]


def test_names_are_compact_and_exact() -> None:
    names = [f"{'x' * (i % 7)}é{i}".encode() for i in range(1000)] + [b""]
    packed = Names.of(names)
    assert len(packed) == 1001 and [os.fsencode(packed[i]) for i in range(1001)] == names
    assert packed[-2] == packed[999] and packed.text.nbytes == sum(map(len, names))
    with pytest.raises(IndexError):
        packed[1001]


def test_train_alone_is_trained_on_and_val_is_preferred(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.png", "train/cat/x/2.png", "train/ant/3.png", "extra/no.png")
    make(tmp_path, "test/cat/9.png", "val/cat/8.png")
    train, validation = open_data(tmp_path)
    assert names_of(train) == ["ant/3.png", "cat/1.png", "cat/x/2.png"]
    assert train.classes == ("ant", "cat") and train.labels is not None
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [0, 1, 1]
    assert validation is not None and validation.labels is not None
    assert names_of(validation) == ["cat/8.png"] and validation.labels.tolist() == [1]
    assert validation.classes == train.classes and train.name == validation.name
    dropped = open_data(tmp_path, "none")
    assert dropped.train.labels is None and dropped.train.classes == ()
    assert dropped.validation is not None and dropped.validation.labels is None


@pytest.mark.parametrize("beside", ["val", "valid", "validation", "test"])
def test_the_names_of_validation(tmp_path: Path, beside: str) -> None:
    make(tmp_path, "train/cat/1.png", f"{beside}/cat/8.png")
    assert open_data(tmp_path).validation is not None


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("Train", "Test"),
        ("TRAIN", "val"),
        ("training", "testing"),
        ("train2017", "val2017"),
        ("train_2012", "valid"),
        ("data/train", "data/val"),
        ("images/train", "images/test"),
        ("set/Training", "set/Validation"),
        ("training/train", "training/val"),
    ],
)
def test_splits_as_others_spell_and_place_them(tmp_path: Path, train: str, held: str) -> None:
    make(tmp_path, f"{train}/cat/1.png", f"{train}/ant/2.png", f"{held}/cat/3.png")
    make(tmp_path, "labels/train/1.txt")
    source, validation = open_data(tmp_path)
    assert names_of(source) == ["ant/2.png", "cat/1.png"] and source.classes == ("ant", "cat")
    assert validation is not None and names_of(validation) == ["cat/3.png"]
    assert source.notes == ()


HELD_OUT = [  # how each kind is spelled; of several kinds the first is validated on
    ["val", "Val", "VAL", "val2017"],
    ["valid", "Valid"],
    ["validation", "Validation"],
    ["test", "Test", "testing", "test-2015"],
]


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("inside", [False, True])
def test_of_two_kinds_of_held_out_splits_the_first_is_taken(first: int, inside: bool) -> None:
    """However they are spelled, as folders and in archives."""
    for taken in HELD_OUT[first]:
        for other in chain.from_iterable(HELD_OUT[first + 1 :]):
            names = ["train", other, taken]
            if inside:
                members = [Member(0, b"", 0, 0, None, f"{one}/1.png".encode()) for one in names]
                found = splits_inside(members)
                assert found is not None and found[1] == [members[2]._replace(inner=b"1.png")]
            else:
                assert split_names(names) == split_names(names[::-1]) == ("train", taken)


def test_of_several_held_out_splits_one_is_taken_and_none_trained_on(tmp_path: Path) -> None:
    make(tmp_path, "train2017/1.png", "val2017/2.png", "test2017/3.png", "Train2/4.png")
    train, validation = open_data(tmp_path)
    assert names_of(train) == ["1.png"] and validation is not None
    assert names_of(validation) == ["2.png"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["val/1.png", "test/2.png"], "test/, val/"),
        (["train2012/1.png", "train2017/1.png", "val2017/2.png"], "train2012/, train2017/"),
        (["a/train/1.png", "a/val/2.png", "b/train/3.png", "b/val/4.png"], "train/, val/"),
        (["a/train/1.png", "a/val/2.png", "loose.png"], "train/, val/"),
        (["Train/1.png", "bus/2.png", "plane/3.png"], "Train/"),
    ],
)
def test_what_looks_like_a_split_and_is_none_is_told(
    tmp_path: Path, names: list[str], shown: str
) -> None:
    train, validation = open_data(make(tmp_path, *names))
    assert len(train) == len(names) and validation is None
    (note,) = train.notes
    assert f"all {len(names)} images are trained on, though some lie in {shown}" in note


def test_a_split_without_classes_has_no_labels(tmp_path: Path) -> None:
    make(tmp_path, "train/1.png", "val/2.png")
    train, validation = open_data(tmp_path)
    assert train.labels is None and validation is not None and validation.labels is None


def test_validation_may_be_absent_empty_or_unlabelled(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.png")
    assert open_data(tmp_path).validation is None
    (tmp_path / "val").mkdir()
    assert open_data(tmp_path).validation is None
    make(tmp_path, "val/2.png")
    validation = open_data(tmp_path).validation
    assert validation is not None and validation.labels is None and len(validation) == 1


def test_folders_are_classes_when_asked(tmp_path: Path) -> None:
    make(tmp_path, "b/1.png", "a/deep/2.png", "a/3.png")
    source = open_data(tmp_path, "folders").train
    assert source.classes == ("a", "b") and source.labels is not None
    assert source.labels.tolist() == [0, 0, 1]
    make(tmp_path, "loose.png")
    text = refusal(tmp_path, "folders")
    assert "loose.png" in text and str(tmp_path) in text and "data.labels=none" in text


def test_mistakes_in_splits(tmp_path: Path) -> None:
    make(tmp_path / "a", "train/cat/1.png", "train/loose.png")
    assert "loose.png" in refusal(tmp_path / "a")
    make(tmp_path / "b", "train/cat/1.png", "val/dog/2.png")
    strange = open_data(tmp_path / "b")  # a run that lost its dogs goes on; a new one does not
    assert strange.validation is not None and strange.validation.classes == ("cat", "dog")
    with pytest.raises(UserError, match=r"class dog to validate on .* data\.labels=none"):
        strange.check_classes()
    open_data(tmp_path / "b", "none").check_classes()
    make(tmp_path / "c", "train/1.png", "bus/2.png", "plane/3.png")
    assert "bus/" in refusal(tmp_path / "c")
    make(tmp_path / "d/train/empty", "x.txt")
    assert "train" in refusal(tmp_path / "d")


def test_places_without_images(tmp_path: Path) -> None:
    assert "gone" in refusal(tmp_path / "gone")
    text = refusal(tmp_path)
    assert str(tmp_path) in text and all(extension in text for extension in EXTENSIONS)
    (tmp_path / "a.tar").write_bytes(b"x")
    assert "a.tar" in refusal(tmp_path / "a.tar")
    assert "give an existing path of images" in refusal(tmp_path / "a.tar" / "below")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which this process has no other rights than any user: a superuser has all."""
    with tempfile.TemporaryDirectory() as folder:
        images, cache = Path(folder, "images"), Path(folder, "cache")
        for place, rights in ((Path(folder), 0o755), (images, 0o755), (cache, 0o777)):
            place.mkdir(exist_ok=True)
            place.chmod(rights)
        monkeypatch.setenv("MOCOKIT_CACHE", str(cache))
        user = os.geteuid()
        yield images
        os.seteuid(user)
        for place, _, _ in os.walk(images):
            os.chmod(place, 0o755)


def as_nobody(root: Path, closed: Path, rights: int = 0) -> Splits | str:
    """What a user sees of images below `root`, if one of the folders has these rights."""
    user = os.geteuid()
    closed.chmod(rights)
    try:
        if user == 0:
            os.seteuid(65534)
        return open_data(root)
    except UserError as error:
        return str(error)
    finally:
        os.seteuid(user)
        closed.chmod(0o755)


@unix
@pytest.mark.parametrize("rights", [0o000, 0o644, 0o311])
def test_folders_that_may_not_be_listed_are_left_out_and_told(nobody: Path, rights: int) -> None:
    make(nobody, "a.png", "closed/b.png", "closed/below/c.png", "open/d.png")
    for place, _, _ in os.walk(nobody):
        os.utime(place, (1, 1))  # long ago: the listing would be kept
    seen = as_nobody(nobody, nobody / "closed", rights)
    assert not isinstance(seen, str)
    # Of a folder that may be listed but not entered the images are known, and cannot be read.
    inside = rights == 0o644
    assert names_of(seen.train) == ["a.png", *(["closed/b.png"] if inside else []), "open/d.png"]
    told = f"{nobody}/closed/below" if inside else f"{nobody}/closed"
    assert seen.train.notes == (f"left out, for they cannot be listed (Permission denied): {told}",)
    assert len(open_data(nobody).train) == 4  # rights change no time of change
    for name in ("a.png", "open/d.png"):
        (nobody / name).unlink()
    if not inside:
        assert str(as_nobody(nobody, nobody / "closed", rights)).endswith(f"denied): {told}")


@unix
def test_a_link_into_a_folder_that_is_closed_is_told(nobody: Path) -> None:
    make(nobody, "a.png", "z/vault/x/b.png")
    (nobody / "link").symlink_to(nobody / "z/vault/x")
    (nobody / "nowhere").symlink_to(nobody / "z/lost")
    seen = as_nobody(nobody, nobody / "z/vault")
    assert not isinstance(seen, str) and names_of(seen.train) == ["a.png"]
    told = f"{nobody}/link, {nobody}/z/vault"
    assert seen.train.notes == (f"left out, for they cannot be listed (Permission denied): {told}",)


@unix
def test_parquet_files_beside_a_folder_that_may_not_be_listed(nobody: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    make(nobody, "closed/x.png")
    table = pyarrow.table({"image": [(nobody / "closed/x.png").read_bytes()]})
    pytest.importorskip("pyarrow.parquet").write_table(table, nobody / "a.parquet")
    (nobody / "closed/x.png").unlink()
    seen = as_nobody(nobody, nobody / "closed")
    assert not isinstance(seen, str) and len(seen.train) == 1
    assert seen.train.notes[-1].endswith(f"denied): {nobody}/closed")


@unix
def test_of_a_split_that_may_not_be_listed_the_remedy_is_told(nobody: Path) -> None:
    make(nobody, "train/a.png", "val/b.png", "more/d.png")
    seen = as_nobody(nobody, nobody / "more")
    assert not isinstance(seen, str) and names_of(seen.train) == ["a.png"]
    assert seen.validation and seen.train.notes == ()  # beside two splits nothing is looked at
    for place in (nobody / "val", nobody / "train", nobody):
        text = as_nobody(nobody, place)
        assert text == f"cannot list {place} (Permission denied): make it readable or move it away"
    shutil.rmtree(nobody / "val")
    seen = as_nobody(nobody, nobody / "more")
    assert not isinstance(seen, str) and "/more" in seen.train.notes[0]


@unix
def test_archives_beside_a_folder_that_may_not_be_listed(nobody: Path) -> None:
    make(nobody, "closed/x.png")
    with tarfile.open(nobody / "a.tar", "w") as archive:
        archive.add(nobody / "closed" / "x.png", "x.png")
    (nobody / "closed/x.png").unlink()
    seen = as_nobody(nobody, nobody / "closed")
    assert not isinstance(seen, str) and names_of(seen.train) and "closed" in seen.train.notes[0]


def test_a_folder_that_fails_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a.png", "closed/b.png")
    scan = os.scandir

    def fail(path: Any) -> Any:
        if os.fsdecode(path) == str(tmp_path / "closed"):
            raise OSError(5, "Input/output error")
        return scan(path)

    monkeypatch.setattr(os, "scandir", fail)
    text = refusal(tmp_path)
    assert "Input/output error" in text and str(tmp_path / "closed") in text


def test_fingerprints_follow_names_and_labels_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "one", "a/1.png", "b/2.png")
    make(tmp_path / "two", "a/1.png", "b/2.png")
    os.utime(tmp_path / "two/a/1.png", (1, 1))
    one, two = (open_data(tmp_path / name).train for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint and int(one.fingerprint, 16) >= 0
    assert open_data(tmp_path / "one", "folders").train.fingerprint != one.fingerprint
    make(tmp_path / "two", "b/3.png")
    assert open_data(tmp_path / "two").train.fingerprint != one.fingerprint
    parts = (FolderSource(tmp_path, names, None, (), "x") for names in (["ab", "c"], ["a", "bc"]))
    assert len({part.fingerprint for part in parts}) == 2


def test_names_given_in_any_order_keep_their_labels(tmp_path: Path) -> None:
    labels = np.array([5, 6, 7])
    source = FolderSource(tmp_path, ["c", "a", "b"], labels, (), "x")
    assert names_of(source) == ["a", "b", "c"]
    assert source.labels is not None and source.labels.tolist() == [6, 7, 5]


@pytest.mark.parametrize("folder", ["My Photos (2024)", "ünï", "x" * 90, "..."])
def test_names_of_sources_fit_into_a_folder_name(tmp_path: Path, folder: str) -> None:
    name = open_data(make(tmp_path / folder, "a.png")).train.name
    assert 0 < len(name) <= 40 and name.isascii() and not set(name) & set("/\\ :()*?\"'")
    assert not name.startswith(".")


def test_a_relative_path_gets_the_folder_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make(tmp_path / "flowers", "a.png"))
    assert open_data(".").train.name == "flowers"


def test_caltech() -> None:
    if not (SHARED / "caltech_a").is_dir():
        pytest.skip("../shared/data/caltech_a is not on this machine")
    train, validation = open_data(SHARED / "caltech_a")
    assert validation is not None and train.labels is not None and validation.labels is not None
    assert (len(train), len(validation), len(train.classes)) == (1500, 557, 50)
    assert np.bincount(train.labels).tolist() == [30] * 50
    assert np.bincount(validation.labels, minlength=50).min() >= 1
    folders = [train.describe(index).split("/")[0] for index in range(0, 1500, 30)]
    assert tuple(folders) == train.classes == validation.classes


# Arrays


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def random_images(count: int = 10, *rest: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *(rest or (6, 5, 3))), np.uint8)


def test_an_archive_as_medmnist_publishes_them(tmp_path: Path) -> None:
    images, tests = random_images(10), random_images(4)
    path = save(
        tmp_path / "blood.npz",
        train_images=images,
        train_labels=np.arange(10, dtype=np.uint8)[:, None] % 3,
        val_images=random_images(3),
        val_labels=np.zeros((3, 1)),
        test_images=tests,
        test_labels=np.array([0, 4, 1, 2]),
    )
    train, validation = open_data(path)
    assert train.name == "blood" and train.labels is not None and validation is not None
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [i % 3 for i in range(10)]
    assert train.classes == validation.classes == ("0", "1", "2", "3", "4")
    np.testing.assert_array_equal(validation.read(2), tests[2])
    np.testing.assert_array_equal(train.read(7, 2), images[7])
    assert train.describe(7) == "image 7 of blood"
    dropped = open_data(path, "none")
    assert dropped.train.labels is None and dropped.train.classes == ()


def test_images_alone_are_enough(tmp_path: Path) -> None:
    train, validation = open_data(save(tmp_path / "x.npz", train_images=random_images()))
    assert validation is None and train.labels is None and len(train) == 10


@pytest.mark.parametrize("shape", [(7, 6, 5), (7, 6, 5, 1)])
def test_gray_arrays_become_rgb(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = random_images(*shape)
    source = open_data(save(tmp_path / "x.npz", train_images=images)).train
    assert isinstance(source, ArraySource)
    gathered = source.gather(np.array([3, 0, 3]))
    assert gathered.shape == (3, 6, 5, 3) and gathered.flags.c_contiguous
    for channel in range(3):
        np.testing.assert_array_equal(gathered[..., channel], images.reshape(7, 6, 5)[[3, 0, 3]])
    np.testing.assert_array_equal(source.read(3), gathered[0])


def test_an_npy_is_mapped_and_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", random_images())
    source = open_data(tmp_path / "x.npy").train
    assert isinstance(source, ArraySource) and isinstance(source.images, np.memmap)
    np.testing.assert_array_equal(source.read(9), random_images()[9])
    assert source.fingerprint == ArraySource(random_images(), None, "other name").fingerprint


def test_fingerprints_of_arrays_follow_pixels_and_labels() -> None:
    images, labels = random_images(), np.zeros(10, np.int64)
    one = ArraySource(images, labels, "x").fingerprint
    assert one == ArraySource(images.copy(), labels[:, None], "y").fingerprint
    changed = images.copy()
    changed[9, 5, 4, 2] ^= 1
    others = [
        ArraySource(changed, labels, "x"),
        ArraySource(images, labels + 1, "x"),
        ArraySource(images, None, "x"),
        ArraySource(images.reshape(10, 5, 6, 3), labels, "x"),
    ]
    assert len({one, *(other.fingerprint for other in others)}) == 5


class Touch:
    """Unpickled, it would create a file: what the refusal of pickles prevents."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("ending", ["npz", "npy", "pickle"])
def test_pickles_are_refused_unopened(tmp_path: Path, ending: str) -> None:
    trap, path = np.array([Touch(tmp_path / "touched")], object), tmp_path / f"x.{ending}"
    if ending == "npz":
        np.savez(path, train_images=trap)
    elif ending == "npy":
        np.save(path, trap)
    else:
        path = tmp_path / "x.npz"
        trap.dump(path)
    text = refusal(path)
    assert "pickle" in text and "run any program" in text
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"images": random_images(), "y": np.zeros(10)}, "images, y"),
        ({"train_images": random_images().astype(np.float32)}, "float32"),
        ({"train_images": random_images(10, 3, 6, 5)}, "(10, 3, 6, 5)"),
        ({"train_images": random_images(10, 6, 5, 4)}, "(10, 6, 5, 4)"),
        ({"train_images": random_images(6, 5, 3)}, "(6, 5, 3)"),
        ({"train_images": random_images(30, 30)}, "(30, 30)"),
        ({"train_images": random_images()[:0]}, "(0, 6, 5, 3)"),
        ({"train_images": random_images(), "train_labels": np.zeros(9, int)}, "(9,)"),
        ({"train_images": random_images(), "train_labels": np.zeros((10, 14), int)}, "(10, 14)"),
        ({"train_images": random_images(), "train_labels": np.zeros(10)}, "float64"),
        ({"train_images": random_images(), "train_labels": np.arange(10) - 1}, "-1"),
        ({"train_images": random_images(), "train_labels": np.full(10, 2**40)}, str(2**40)),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    text = refusal(save(tmp_path / "x.npz", **arrays))
    assert said in text and "x.npz" in text
    if "train_labels" in arrays:
        assert "data.labels=none" in text
        assert open_data(tmp_path / "x.npz", "none").train.labels is None


def test_any_damage_is_a_sentence_or_does_no_harm(tmp_path: Path) -> None:
    """Above all in the directory at the end: zipfile raises all kinds of errors."""
    path = save(tmp_path / "x.npz", train_images=random_images(4), train_labels=np.arange(4))
    content = path.read_bytes()
    sentences = 0
    for place in range(-220, 0):
        for value in (1, 8, 32, 64, 255):
            path.write_bytes(content[:place] + bytes([value]) + content[len(content) + place + 1 :])
            for read in (open_data, load_index):
                try:
                    read(path)
                except UserError:
                    sentences += 1
    assert sentences > 1000


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", train_images=random_images(100))
    content = path.read_bytes()
    for damaged in (b"", b"nothing", content[:200], content[: len(content) // 2], content[50:]):
        path.write_bytes(damaged)
        assert "x.npz" in refusal(path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    path.write_bytes(flipped)
    assert "x.npz" in refusal(path)
    path.with_suffix(".npy").write_bytes(content)
    assert "x.npy" in refusal(path.with_suffix(".npy"))
    np.save(path.with_suffix(".npy"), random_images())
    path.with_suffix(".npy").rename(path)
    assert "end in .npy" in refusal(path)


def test_folders_as_labels_need_a_folder(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz", train_images=random_images())
    assert "data.labels=folders" in refusal(path, "folders")
    assert "data.labels=folders" in refusal(None, "folders")


# The index


def test_an_index_brings_a_folder_back(tmp_path: Path) -> None:
    source = open_data(make(tmp_path / "in", "train/a/1.png", "train/b/2.png")).train
    save_index(source.index(), tmp_path / "images.idx")
    assert [path.name for path in tmp_path.iterdir() if path.name != "in"] == ["images.idx"]
    index = load_index(tmp_path / "images.idx")
    assert (index.kind, index.name, index.length) == ("folder", "in", 2)
    assert index.fingerprint == source.fingerprint
    again = FolderSource.of_index(tmp_path / "in/train", index)
    assert again.fingerprint == source.fingerprint and names_of(again) == names_of(source)
    assert again.classes == ("a", "b") and again.labels is not None
    assert again.labels.tolist() == [0, 1]


def test_the_index_of_arrays_is_small(tmp_path: Path) -> None:
    source = ArraySource(random_images(500), np.zeros(500), "x")
    save_index(source.index(), tmp_path / "images.idx")
    index = load_index(tmp_path / "images.idx")
    assert (index.kind, index.name, index.length) == ("array", "x", 500)
    assert index.fingerprint == source.fingerprint and index.names is None
    assert (tmp_path / "images.idx").stat().st_size < 2000
    with pytest.raises(UserError, match="names no files"):
        FolderSource.of_index(tmp_path, index)


def test_an_index_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "images.idx"
    save_index(ArraySource(random_images(3), None, "old").index(), path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_index(ArraySource(random_images(4), None, "new").index(), path)
    assert load_index(path).name == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.idx"
    with pytest.raises(UserError, match=r"images\.idx is no index .*No such file"):
        load_index(path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    save_index(ArraySource(random_images(3), None, "x").index(), path)
    for content in ((tmp_path / "other.npz").read_bytes(), b"junk", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no index"):
            load_index(path)
