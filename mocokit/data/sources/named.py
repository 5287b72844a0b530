"""Well-known sets by their names, in torchvision's layout; downloaded where the network allows."""

import hashlib
import io
import os
import pickle
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mocokit.data.source import Splits
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.folder import FolderSource, Labels, open_folder
from mocokit.errors import UserError
from mocokit.files import cache_folder, locked, printable, show

_PATIENCE = 30.0  # s without an answer, after which a download is given up


def open_named(name: str, labels: Labels, root: str | Path | None) -> Splits:
    """The images of a set; `root` is where such sets lie, or are downloaded to."""
    if labels == "folders":
        raise UserError(f"data.labels=folders needs a folder, not {name}: set auto or none")
    place = cache_folder() / "datasets" if root is None else Path(root).expanduser()
    splits = _OPEN[name](place)
    if labels == "none":
        for source in splits:
            if source is not None:
                source.labels, source.classes = None, ()
    return splits


def _cifar(name: str) -> Callable[[Path], Splits]:
    def open_it(root: Path) -> Splits:
        from torchvision import datasets

        known = getattr(datasets, name.upper())
        key = b"labels" if name == "cifar10" else b"fine_labels"
        with _present(name, root, known.base_folder, known.url, known.filename, known.tgz_md5):
            read = _members(root, known.base_folder, known.filename)
            parts = [
                [read(member, md5) for member, md5 in members]
                for members in (known.train_list, known.test_list)
            ]
            classes = read(known.meta["filename"], known.meta["md5"])[known.meta["key"].encode()]
        names = tuple(one.decode() for one in classes)
        sources = []
        for batches in parts:
            rows = np.concatenate([batch[b"data"] for batch in batches])
            images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            numbers = np.concatenate([np.array(batch[key], np.int64) for batch in batches])
            sources.append(ArraySource(np.ascontiguousarray(images), numbers, name, names))
        return Splits(*sources)

    return open_it


def _members(root: Path, folder: str, archive: str) -> Callable[[str, str], dict[bytes, Any]]:
    """Reads a pickled batch of the unpacked set, or out of its archive, which stays packed."""
    inside: dict[str, bytes] = {}
    if not (root / folder).is_dir():
        with tarfile.open(root / archive, "r:gz") as file:
            for member in file:
                if member.isreg() and member.size < 2**28 and (part := file.extractfile(member)):
                    inside[member.name.rpartition("/")[2]] = part.read()

    def read(member: str, md5: str) -> dict[bytes, Any]:
        content = inside[member] if inside else (root / folder / member).read_bytes()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{member} is not the file that was published")
        batch: dict[bytes, Any] = _Plain(io.BytesIO(content), encoding="bytes").load()
        return batch

    return read


class _Plain(pickle.Unpickler):
    """Reads what CIFAR's authors pickled, arrays in dictionaries, and refuses to call all else."""

    _ALLOWED: ClassVar[set[tuple[str, str]]] = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it would call {module}.{name}, which may be any program")
        if name == "_reconstruct":
            module = "numpy._core.multiarray"
        return super().find_class(module, name)


def _stl10(root: Path) -> Splits:
    from torchvision.datasets import STL10

    folder = root / STL10.base_folder
    sums = dict([*STL10.train_list, *STL10.test_list])
    archive = STL10.url, STL10.filename, STL10.tgz_md5
    with _present("stl10", root, STL10.base_folder, *archive, unpack=True):
        names = tuple((folder / STL10.class_names_file).read_text().split())
        labels = np.fromfile(folder / "test_y.bin", np.uint8).astype(np.int64) - 1
        # Mapped: the unlabelled images alone are 2.8 GB; they lie column by column.
        images = [
            np.memmap(folder / f"{part}_X.bin", np.uint8, "r")
            .reshape(-1, 3, 96, 96)
            .transpose(0, 3, 2, 1)
            for part in ("unlabeled", "test")
        ]
    marks = [f"stl10 {sums[f'{part}_X.bin']}" for part in ("unlabeled", "test")]
    train = ArraySource(images[0], None, "stl10", (), marks[0])
    return Splits(train, ArraySource(images[1], labels, "stl10", names, marks[1]))


def _imagenette(root: Path) -> Splits:
    from torchvision.datasets import Imagenette

    url, md5 = Imagenette._ARCHIVES["full"]
    archive = url.rpartition("/")[2]
    folder = archive.removesuffix(".tgz")
    with _present("imagenette", root, folder, url, archive, md5, True):
        train, validation = open_folder(root / folder, "auto")
        names = tuple(Imagenette._WNID_TO_CLASS[wnid][0] for wnid in train.classes)
    for source in (train, validation):
        if source is not None:
            source.name, source.classes = "imagenette", names
    return Splits(train, validation)


def _imagenet(root: Path) -> Splits:
    for folder in (root / "imagenet", root / "ILSVRC2012"):
        if (folder / "train").is_dir():
            train, validation = open_folder(folder, "auto")
            train.name = "imagenet"
            return Splits(train, validation)
    raise UserError(
        f"imagenet is not in {show(root / 'imagenet')}, and can be had only with an account at "
        "image-net.org: unpack it there as train/<class>/ and val/<class>/, or set data.root"
    )


def _voc(root: Path) -> Splits:
    """The photos of trainval 2007 and 2012, on which detectors are trained."""
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    names: list[str] = []
    for year in ("2007", "2012"):
        known = DATASET_YEAR_DICT[year]
        folder, archive = known["base_dir"], (known["url"], known["filename"], known["md5"])
        with _present("voc", root, folder, *archive, unpack=True):
            text = (root / folder / "ImageSets" / "Main" / "trainval.txt").read_text()
            names += [f"{folder}/JPEGImages/{line.split()[0]}.jpg" for line in text.splitlines()]
    return Splits(FolderSource(root, names, None, (), "voc"), None)


@contextmanager
def _present(
    name: str, root: Path, folder: str, url: str, archive: str, md5: str, unpack: bool = False
) -> Iterator[None]:
    """The set's folder, or at least its archive, is there; what cannot be read is one sentence."""
    if not (root / folder).is_dir():
        _download(name, root, folder, url, archive, md5, unpack)
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, tarfile.TarError, pickle.PickleError) as error:
        if isinstance(error, UserError):
            raise
        why = printable(" ".join(str(error).split())[:120])
        remedy = f"delete {show(root / folder)} and {show(root / archive)}, and run it again"
        raise UserError(f"{name} in {show(root)} cannot be read ({why}): {remedy}") from error


def _download(
    name: str, root: Path, folder: str, url: str, archive: str, md5: str, unpack: bool
) -> None:
    from torchvision.datasets.utils import download_url, extract_archive

    patience = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".download.lock"):
            if (root / folder).is_dir():  # another process was faster
                return
            socket.setdefaulttimeout(_PATIENCE)
            download_url(url, str(root), archive, md5)
            if unpack:  # its content is known by its checksum
                # Elsewhere first: half a set would be taken for the whole one.
                with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as part:
                    extract_archive(str(root / archive), part)
                    (root / folder).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(part) / folder, root / folder)
    except (OSError, RuntimeError, ValueError) as error:
        why = printable(" ".join(str(error).split())[:120])
        raise UserError(
            f"{name} is not in {show(root)}, and cannot be downloaded ({why}): put {archive} from "
            f"{url} there by other means, or set data.root to where it lies"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


_OPEN: dict[str, Callable[[Path], Splits]] = {
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "stl10": _stl10,
    "imagenette": _imagenette,
    "imagenet": _imagenet,
    "voc": _voc,
}
