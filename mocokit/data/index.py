"""A source without its pixels, as kept in a run folder and in the user's cache."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocokit.data.levels import TOPS
from mocokit.data.names import Names
from mocokit.data.npz import DAMAGE, Archive, Arrays
from mocokit.errors import UserError
from mocokit.files import printable, reason_of, show, whole


class Index(NamedTuple):
    """A source without its pixels; of arrays only what distinguishes them from others.

    `extra` holds what one kind of source needs to find its images, and the others do not. `top` is
    the level that becomes 255 in images of more than 8 bits; None: as each image's container says.
    """

    kind: str
    name: str
    length: int
    fingerprint: str
    classes: tuple[str, ...] = ()
    names: Names | None = None
    labels: NDArray[np.int64] | None = None
    extra: Mapping[str, NDArray[Any]] = {}
    top: int | None = None


def stamp_of(fingerprint: str, paths: Iterable[bytes | Path]) -> str:
    """A hash of a fingerprint with the place, size and time of change of each file."""
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for path in paths:
        digest.update(os.path.abspath(os.fsencode(path)) + b"\0")
        with contextlib.suppress(OSError, ValueError):  # a missing file is reported when it is read
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def save_index(index: Index, path: str | Path) -> None:
    """Write images.idx, which identifies a run's images and fixes their numbers."""
    write_arrays(Path(path), to_arrays(index._replace(extra={})), compressed=True)


def load_index(path: str | Path) -> Index:
    """Read what `save_index` wrote."""
    try:
        return from_arrays(read_arrays(path))
    except DAMAGE as error:
        why = printable(reason_of(error))
        what = f"{show(path)} is no index of images ({why})"
        raise UserError(f"{what}: restore it, or begin a new run") from error


def to_arrays(index: Index, prefix: str = "") -> Arrays:
    """An index as arrays for an .npz file."""
    head = {"format": 1, "kind": index.kind, "name": index.name, "length": index.length}
    head |= {"fingerprint": index.fingerprint, "classes": index.classes}
    if index.top is not None:  # 0.1 knew none
        head["top"] = index.top
    arrays: Arrays = {"head": text_array(json.dumps(head))}
    if index.names is not None:
        arrays |= {"names": index.names.text, "ends": index.names.ends}
    if index.labels is not None:
        arrays["labels"] = index.labels
    arrays |= {f"extra.{name}": array for name, array in index.extra.items()}
    return {prefix + name: array for name, array in arrays.items()}


def from_arrays(arrays: Mapping[str, NDArray[Any]], prefix: str = "") -> Index:
    """What `to_arrays` was given; raises one of DAMAGE, also where its parts do not fit."""
    own = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    head = json.loads(own["head"].tobytes())
    if head["format"] != 1:
        raise ValueError(f"its format is {head['format']}, not 1")
    names = Names(own["names"], own["ends"]) if "names" in own else None
    extra = {k.removeprefix("extra."): a for k, a in own.items() if k.startswith("extra.")}
    fields = (head["kind"], head["name"], head["length"], head["fingerprint"])
    classes, labels = tuple(head["classes"]), own.get("labels")
    index = Index(*fields, classes, names, labels, extra, head.get("top"))
    _check(index)
    return index


def _check(index: Index) -> None:
    """Raises ValueError where lengths, labels or texts do not fit together."""
    texts = (index.kind, index.name, index.fingerprint, *index.classes)
    length, names, labels = index.length, index.names, index.labels
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("its texts are damaged")
    if type(length) is not int or length < 0 or (names is not None and len(names) != length):
        raise ValueError("its number of images is damaged")
    if names is not None:
        names.check()
    if labels is not None and (labels.shape != (length,) or labels.dtype.kind not in "iu"):
        raise ValueError("its labels are damaged")
    least, most = (labels.min(), labels.max()) if labels is not None and length else (0, -1)
    if least < -1 or most >= len(index.classes):
        raise ValueError("its labels have no classes")
    if index.top is not None and index.top not in TOPS:
        raise ValueError("its scale of levels is damaged")


def text_array(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def read_arrays(path: str | Path) -> Arrays:
    """The arrays of an .npz; raises one of DAMAGE."""
    with open(path, "rb") as file:
        return Archive(file).every()


def write_arrays(target: Path, arrays: Arrays, compressed: bool) -> None:
    """Write an .npz, all of it or nothing; of two writers at once, one wins."""
    save = np.savez_compressed if compressed else np.savez
    with whole(target, sync=True) as file:
        save(file, allow_pickle=False, **arrays)
