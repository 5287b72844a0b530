"""images.idx: what a run keeps of its images, to know them again and to number them alike."""

import contextlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocokit.data.names import Names, show
from mocokit.errors import UserError


class Index(NamedTuple):
    """A source without its pixels; of arrays only what tells them from others."""

    kind: str
    name: str
    length: int
    fingerprint: str
    classes: tuple[str, ...] = ()
    names: Names | None = None
    labels: NDArray[np.int64] | None = None


def save_index(index: Index, path: str | Path) -> None:
    """Write an index, all of it or nothing."""
    head = {"format": 1, "kind": index.kind, "name": index.name, "length": index.length}
    head |= {"fingerprint": index.fingerprint, "classes": index.classes}
    arrays: dict[str, NDArray[Any]] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
    if index.names is not None:
        arrays |= {"names": index.names.text, "ends": index.names.ends}
    if index.labels is not None:
        arrays["labels"] = index.labels
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def load_index(path: str | Path) -> Index:
    """Read what `save_index` wrote."""
    try:
        # Opened here, because numpy leaves the file open when the archive is damaged.
        with open(path, "rb") as file:
            arrays = dict(np.load(file, allow_pickle=False))
        head = json.loads(arrays["head"].tobytes())
        if head["format"] != 1:
            raise ValueError(f"its format is {head['format']}, not 1")
        names = Names(arrays["names"], arrays["ends"]) if "names" in arrays else None
        fields = (head["kind"], head["name"], head["length"], head["fingerprint"])
        return Index(*fields, tuple(head["classes"]), names, arrays.get("labels"))
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError),
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        what = f"{show(path)} is no index of images ({why})"
        raise UserError(f"{what}: restore it, or begin a new run") from error
