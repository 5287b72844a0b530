"""Known sets: read from torchvision's own layout, with small sets in the place of the large."""

import hashlib
import http.server
import io
import pickle
import re
import socket
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocokit.data.open import open_data
from mocokit.data.sources import named
from mocokit.errors import UserError
from mocokit.evaluate.session import labelled
from mocokit.settings import replace
from mocokit.settings.schema import Settings

torchvision_sets = pytest.importorskip("torchvision.datasets")
DRAW = np.random.default_rng(0)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def dumped(content: dict[str, Any]) -> bytes:
    """A pickle of Python 2, whose texts are strings of bytes."""
    return re.sub(
        rb"X(.)\0\0\0(data|labels|label_names|cat|dog)",
        rb"U\1\2",
        pickle.dumps(content, protocol=2),
    )


def batch(count: int, key: str) -> tuple[bytes, np.ndarray]:
    """A batch as CIFAR's authors pickled theirs."""
    rows = DRAW.integers(0, 256, (count, 3072), np.uint8)
    return dumped({"data": rows, key: [int(i) % 2 for i in range(count)]}), rows


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server, on this machine, of what lies in tmp_path / "server"."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(Quiet, directory=str(tmp_path / "server"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=partial(serving.serve_forever, 0.02), daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


@pytest.fixture
def cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> tuple[Path, dict[str, Any]]:
    """An archive like CIFAR-10's with two batches of images, on a server."""
    files, rows = {}, {}
    for name, count in (("data_batch_1", 5), ("data_batch_2", 4), ("test_batch", 3)):
        files[name], rows[name] = batch(count, "labels")
    files["batches.meta"] = dumped({"label_names": ["cat", "dog"]})
    return publish(tmp_path, monkeypatch, files, server), rows


def publish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], server: str
) -> Path:
    source = tmp_path / "server" / "cifar-10-python.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    kind, sums = torchvision_sets.CIFAR10, {n: md5(c) for n, c in files.items()}
    monkeypatch.setattr(kind, "url", f"{server}/{source.name}")
    monkeypatch.setattr(kind, "tgz_md5", md5(source.read_bytes()))
    monkeypatch.setattr(kind, "train_list", [[n, s] for n, s in sums.items() if "data" in n])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(kind, "meta", meta)
    return tmp_path / "root"


def test_cifar_is_downloaded_once_and_read_as_torchvision_reads_it(
    cifar: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, rows = cifar
    train, test = open_data("cifar10", root=root)
    assert len(train) == 9 and test is not None and len(test) == 3
    assert train.classes == ("cat", "dog") and train.labels is not None
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1]
    expected = rows["data_batch_2"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(train.read(6), expected)
    assert not (root / "cifar-10-batches-py").exists()  # the archive stays packed
    monkeypatch.setattr(torchvision_sets.CIFAR10, "url", "http://127.0.0.1:9/gone")
    assert open_data("cifar10", root=root).train.fingerprint == train.fingerprint
    theirs = torchvision_sets.CIFAR10(str(root), train=True, download=True)
    np.testing.assert_array_equal(theirs.data[6], train.read(6))
    assert theirs.targets == train.labels.tolist()
    unpacked = open_data("cifar10", root=root).train  # now from torchvision's folder
    assert unpacked.fingerprint == train.fingerprint
    assert open_data("cifar10", "none", root=root).train.labels is None


def test_cifar100_has_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torchvision_sets.CIFAR100
    rows = bytes(DRAW.integers(0, 256, 3 * 3072, np.uint8))
    content = {b"data": np.frombuffer(rows, np.uint8).reshape(3, 3072)}
    content |= {b"coarse_labels": [0, 0, 0], b"fine_labels": [1, 0, 2]}
    texts = [b"apple", b"bear", b"cup"]
    meta = {b"coarse_label_names": [b"all"], b"fine_label_names": texts}
    files = {"train": content, "test": content, "meta": meta}
    packed = {name: pickle.dumps(one, protocol=2) for name, one in files.items()}
    sums = {name: md5(one) for name, one in packed.items()}
    for part in ("train", "test"):
        monkeypatch.setattr(kind, f"{part}_list", [[part, sums[part]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["meta"]})
    (tmp_path / kind.base_folder).mkdir()
    for name, one in packed.items():
        (tmp_path / kind.base_folder / name).write_bytes(one)
    train = open_data("cifar100", root=tmp_path).train
    assert train.classes == ("apple", "bear", "cup") and train.labels is not None
    assert train.labels.tolist() == [1, 0, 2]


def test_without_a_network_one_sentence_says_what_to_do(
    cifar: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_sets.CIFAR10, "url", "http://127.0.0.1:9/gone.tar.gz")
    with pytest.raises(UserError, match=r"cannot be downloaded .* by other means") as caught:
        open_data("cifar10", root=cifar[0])
    assert "\n" not in str(caught.value) and "data.root" in str(caught.value)
    assert socket.getdefaulttimeout() is None  # that of a download is for it alone


def test_another_file_than_the_published_is_refused(
    cifar: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_sets.CIFAR10, "train_list", [["data_batch_1", "0" * 32]])
    with pytest.raises(UserError, match="not the file that was published"):
        open_data("cifar10", root=cifar[0])


class Touch:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_a_pickle_with_a_program_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    """Even with the right checksum: the unpickler itself calls nothing but numpy's arrays."""
    trap = dumped({"data": Touch(tmp_path / "touched"), "labels": [0]})
    meta = dumped({"label_names": ["cat"]})
    files = {"data_batch_1": trap, "test_batch": trap, "batches.meta": meta}
    root = publish(tmp_path, monkeypatch, files, server)
    with pytest.raises(UserError, match=r"it would call io\.open"):
        open_data("cifar10", root=root)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "payload", [b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n(S'x'\ntR.", b"c_codecs\nlookup\n."]
)
def test_what_the_unpickler_refuses(payload: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it would call"):
        named._Plain(io.BytesIO(payload)).load()


def test_stl10_trains_on_its_unlabelled_split(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    arrays = {p: DRAW.integers(0, 256, (n, 3, 96, 96), np.uint8) for p, n in
              (("unlabeled", 4), ("train", 2), ("test", 3))}  # fmt: skip
    for part, array in arrays.items():
        array.tofile(folder / f"{part}_X.bin")
    np.array([3, 1, 10], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    train, test = open_data("stl10", root=tmp_path)
    assert len(train) == 4 and train.labels is None and test is not None
    assert test.labels is not None and test.labels.tolist() == [2, 0, 9]
    # torchvision: reshape to (N, 3, 96, 96), transpose to (N, 3, W, H) -> image (H, W, 3)
    np.testing.assert_array_equal(train.read(2), np.transpose(arrays["unlabeled"][2], (2, 1, 0)))


def test_imagenette_and_imagenet_are_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for wnid in torchvision_sets.Imagenette._WNID_TO_CLASS:
            path = tmp_path / "imagenette2" / split / wnid / "a.JPEG"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(path, "JPEG")
    train, validation = open_data("imagenette", root=tmp_path)
    assert train.name == "imagenette" and len(train.classes) == 10 and train.classes[0] == "tench"
    assert validation is not None and validation.classes == train.classes
    with pytest.raises(UserError, match="account at image-net"):
        open_data("imagenet", root=tmp_path)
    (tmp_path / "imagenette2").rename(tmp_path / "imagenet")
    assert open_data("imagenet", root=tmp_path).train.name == "imagenet"


WORDS = {
    "pack": "pack imagenet x.pack",
    "check": "check demo imagenet --quick",
    "show": "pretrain demo imagenet --show",
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set in the folder `there`, which is not the user's cache."""
    monkeypatch.chdir(tmp_path)
    for number, wnid in enumerate(["n01440764", "n02102040"] * 32):
        path = tmp_path / "there/imagenet/train" / wnid / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (number, 0, 0)).save(path, "JPEG")


@pytest.mark.parametrize("verb", WORDS)
def test_every_command_looks_for_a_set_in_data_root(verb: str, there: None, mocokit: Any) -> None:
    code, out, err = mocokit(*WORDS[verb].split(), "--set", "data.root=elsewhere")
    assert code != 0 and "account at image-net" in err
    code, out, err = mocokit(*WORDS[verb].split(), "--set", "data.root=there")
    assert code == 0 and "64" in out + err, err


def test_scores_are_taken_on_the_set_of_the_runs_own_root(there: None) -> None:
    settings = replace(Settings(), {"data.path": "imagenet", "data.root": "there"})
    assert len(labelled(None, settings).train) == 64
    with pytest.raises(UserError, match="account at image-net"):
        labelled(None, replace(settings, {"data.root": "elsewhere"}))


def test_a_set_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    """Unpacking that is broken off leaves nothing that looks like the set."""
    files = tmp_path / "files"
    for split in ("train", "val"):
        for wnid in torchvision_sets.Imagenette._WNID_TO_CLASS:
            (files / "imagenette2" / split / wnid).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(files / "imagenette2" / split / wnid / "a.JPEG", "JPEG")
    source = tmp_path / "server" / "imagenette2.tgz"
    with tarfile.open(source, "w:gz") as archive:
        archive.add(files / "imagenette2", "imagenette2")
    known = {"full": (f"{server}/imagenette2.tgz", md5(source.read_bytes()))}
    monkeypatch.setattr(torchvision_sets.Imagenette, "_ARCHIVES", known)
    root = tmp_path / "root"

    def broken(archive: str, where: str) -> None:
        (Path(where) / "imagenette2/train/n01440764").mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.utils.extract_archive", broken)
        with pytest.raises(KeyboardInterrupt):
            open_data("imagenette", root=root)
    assert not (root / "imagenette2").exists()
    train, validation = open_data("imagenette", root=root)
    assert len(train) == 10 and validation is not None and len(validation) == 10
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["imagenette2"]
    make_one = root / "imagenette2/train/zzz/a.JPEG"
    make_one.parent.mkdir()
    Image.new("RGB", (4, 4)).save(make_one, "JPEG")
    with pytest.raises(UserError, match=r"imagenette in .* cannot be read \('zzz'\)"):
        open_data("imagenette", root=root)


def test_voc_is_the_photos_of_both_years(shared_data: Path) -> None:
    train, validation = open_data("voc", root=shared_data / "voc_sample")
    assert len(train) == 220 and train.labels is None and validation is None
    assert train.read(0).shape[2] == 3
    theirs = torchvision_sets.VOCDetection(
        str(shared_data / "voc_sample"), year="2007", image_set="trainval"
    )
    ours = {train.describe(number).rpartition("/")[2] for number in range(220)}
    assert {Path(path).name for path in theirs.images} < ours


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "voc/a.png")
    assert len(open_data("voc").train) == 1
