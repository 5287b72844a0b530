"""Images in parquet files, as Hugging Face keeps data sets; copied once into a pack.

A row of a parquet file cannot be read without the hundreds around it, so reading at random would
read everything hundreds of times. The copy lies in the user's cache folder and holds the images as
they are. Parquet holds data alone: no program is run, whatever the file's author wanted.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mocokit.data import locations
from mocokit.data.cache import Watch, forget_unused
from mocokit.data.decode import BadImage
from mocokit.data.index import Index, stamp_of
from mocokit.data.names import Names, short_name
from mocokit.data.source import Encoded, Splits
from mocokit.data.sources.columns import (
    Columns,
    check_group,
    load_pyarrow,
    missing,
    opened,
    reading,
)
from mocokit.data.sources.folder import Labels
from mocokit.data.sources.pack import write_pack
from mocokit.data.sources.packed import PackedSource, damage_mark, open_pack
from mocokit.data.sources.shards import split_by_words, split_word
from mocokit.data.walk import Endings, walk
from mocokit.errors import UserError
from mocokit.files import cache_folder, locked, printable, show

PARQUET: Endings = frozenset([b"parquet"])
_REMEDY = "make room, or name another folder by MOCOKIT_CACHE"

Advance = Callable[[int], None]
Counting = Callable[[str, int], AbstractContextManager[Advance]]


class ParquetSource(Encoded):
    """Rows of parquet files in their order; fast only in that order."""

    def __init__(
        self, paths: Sequence[Path], name: str, labelled: bool, known: tuple[str, ...] = ()
    ) -> None:
        self.paths, self.name = tuple(paths), name
        self._lock = threading.Lock()
        self._group: tuple[int, Any] = -1, None
        files = [opened(path) for path in paths]
        columns = Columns.common(files, paths)
        self._image = columns.image
        counts = [
            [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            for file in files
        ]
        self._groups = [(f, g) for f, rows in enumerate(counts) for g in range(len(rows))]
        self._ends = np.cumsum([rows for part in counts for rows in part], dtype=np.int64)
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        used = ("mocokit parquet 2", columns.image, labelled and columns.label)
        digest = hashlib.blake2b(repr(used).encode(), digest_size=16)
        classes = []
        for path, file in zip(paths, files, strict=True):
            with reading(path):
                digest.update(_mark(path))
                if labelled and columns.label:
                    classes.append(file.read([columns.label]).column(0))
        if classes:
            self.labels, self.classes, why = columns.labels(classes, known)
            if why:
                self.notes = (f"{name}: the column {columns.label} {why}",)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def content(self, index: int) -> bytes:
        """The encoded image of a row; raises BadImage."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        with self._lock:
            if self._group[0] != number:
                file, group = self._groups[number]
                with reading(self.paths[file]):
                    of = opened(self.paths[file])
                    check_group(of, group, self._image)
                    table = of.read_row_group(group, [self._image])
                self._group = number, table.column(0)
            with reading(self.paths[self._groups[number][0]]):
                cell = self._group[1][index - first].as_py()
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise BadImage("the parquet file holds no bytes of it")
        return content

    def describe(self, index: int) -> str:
        return f"row {index} of {self.name}"

    def stamp(self) -> str:
        return stamp_of(self.fingerprint, self.paths)

    def index(self) -> Index:
        names = Names.of([f"row {row}".encode() for row in range(len(self))])
        known = ("parquet", self.name, len(self), self.fingerprint)
        return Index(*known, self.classes, names, self.labels)


def open_parquet_below(root: Path, labels: Labels, counting: Counting | None) -> Splits | None:
    """The images of all parquet files below a folder; None: there is no such file."""
    watch = Watch()
    found = [root / os.fsdecode(one) for one in walk(root, PARQUET, watch)]
    if not found:
        return None
    splits = open_parquet(sorted(found), labels, counting, root=root)
    splits.train.notes += watch.notes
    return splits


def open_parquet(
    paths: Sequence[Path],
    labels: Labels,
    counting: Counting | None = None,
    name: str = "",
    root: Path | None = None,
) -> Splits:
    """The images of parquet files to train on, and those to validate on, by way of a pack.

    Which they are, a file's own name says, or else the nearest folder that says so: all folders are
    asked below `root`, without it the file's own.
    """
    if labels == "folders":
        raise UserError("data.labels=folders needs a folder, not parquet files: set auto or none")
    train, held = split_by_words(paths, [_split_of(path, root) for path in paths])
    name = name or short_name(paths[0].resolve().parent.name)
    labelled = labels != "none"
    trained = ParquetSource(train, name, labelled)
    tested = ParquetSource(held, name, labelled, trained.classes) if held else None
    if not len(trained):
        raise UserError(f"{show(paths[0])} holds no rows to train on: give another")
    tested = tested or None  # it may be without rows too
    # Not by the fingerprint, which knows the files' ends alone: one may change and keep its size.
    text = " ".join(source.stamp() for source in (trained, tested) if source)
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    pack = cache_folder() / "packs" / f"{name}-{key}.pack"
    try:
        pack.parent.mkdir(parents=True, exist_ok=True)
        with locked(pack.with_name(f".{pack.name}.lock")):
            there = pack.exists()
            if not (whole := _is_whole(pack)):
                forget_unused(pack.parent, "*.pack")
                _copy(Splits(trained, tested), pack, counting)
    except OSError as error:
        where = f"images of {show(paths[0])} cannot be copied to {show(pack)} ({error.strerror})"
        raise UserError(f"{where}: {_REMEDY}") from error
    splits = Splits(*open_pack(pack, "auto"))
    for source in splits:
        if isinstance(source, PackedSource):
            source.is_copy = True
    if there and not whole:
        what = f"the copy of {name} in the cache, {show(pack)}, was damaged"
        splits.train.notes += (f"{what}: it was made anew",)
    held_notes = tested.notes if tested else ()
    splits.train.notes += (*trained.notes, *(f"to validate on: {note}" for note in held_notes))
    return splits


def _split_of(path: Path, root: Path | None) -> str:
    """train of train-00000-of-00003.parquet, train/0000.parquet and train.parquet/0.parquet."""
    folders = path.relative_to(root).parts[:-1] if root else (path.parent.name,)
    return next(filter(None, map(split_word, (path.name, *reversed(folders)))), "")


def _is_whole(pack: Path) -> bool:
    """Whether the copy is there, now used once more; a damaged one is removed."""
    mark = damage_mark(pack)
    try:
        if mark.exists():
            raise UserError(f"a record of {show(pack)} is damaged")
        open_pack(pack, "auto")
        with suppress(OSError):  # features of the images are kept by its time of change
            os.utime(pack, ns=(time.time_ns(), pack.stat().st_mtime_ns))
    except UserError:
        pack.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
        return False
    return True


def _copy(splits: Splits, pack: Path, counting: Counting | None) -> None:
    images = sum(len(source) for source in splits if source)
    shown = counting("copied", images) if counting else nullcontext(_silent)
    with shown as advance:
        write_pack(splits, pack, None, False, 1, advance, _REMEDY, anew=True)


def _mark(path: Path) -> bytes:
    """What tells a parquet file from others: its size and end, which describes all columns."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**16))
        return f"{path.name} {size} ".encode() + file.read()


def open_hub(text: str, labels: Labels, counting: Counting | None = None) -> Splits:
    """A set of Hugging Face from its parquet files: `hub:owner/name`, also with @revision.

    A set of several configurations is named with one: `hub:owner/name/configuration`.
    """
    path, _, revision = text.removeprefix(locations.HUB).partition("@")
    owner, name, wanted = [*path.split("/", 2), "", ""][:3]
    load_pyarrow()  # what is missing is told before anything is downloaded
    # Where a set is kept as scripts or loose files, the hub itself makes parquet files of it.
    for tried in [revision] if revision else ["main", "refs/convert/parquet"]:
        folder = _downloaded(text, f"{owner}/{name}" if name else owner, tried)
        files = sorted(folder.rglob("*.parquet"))
        if not files:
            continue
        chosen = _configuration(text, folder, files, wanted)
        return open_parquet(chosen, labels, counting, short_name(name or owner), folder)
    raise UserError(f"{text} has no parquet files: give a revision that has, as {text}@REVISION")


def _downloaded(text: str, repo: str, revision: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing("huggingface_hub") from None
    try:
        kind: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": "*.parquet"}
        return Path(snapshot_download(repo, revision=revision, **kind))
    except Exception as error:  # of the network, the hub and its client, of many types
        why = printable(" ".join(str(error).split())[:160])
        raise UserError(
            f"{text} is neither in the cache of huggingface_hub nor can it be downloaded ({why}): "
            "check its name and the network, or give parquet files that lie here"
        ) from error


def _configuration(text: str, folder: Path, files: list[Path], wanted: str) -> list[Path]:
    """The files of one configuration: of a set with several, the first folder names it."""
    parts = {file: file.relative_to(folder).parts for file in files}
    tops = {
        file: part[0] if len(part) > 1 and not split_word(part[0]) else ""
        for file, part in parts.items()
    }
    if wanted and wanted in tops.values():
        return [file for file in files if tops[file] == wanted]
    if wanted or len(set(tops.values())) > 1:
        known = ", ".join(map(printable, sorted(set(tops.values()) - {""})))
        form = f"{locations.HUB}OWNER/NAME/CONFIGURATION"
        if not known:
            raise UserError(f"{text}: that set has no configurations; leave {wanted} out")
        raise UserError(f"{text} names no configuration of that set: give {form}, one of {known}")
    return files


def _silent(count: int) -> None:
    pass
