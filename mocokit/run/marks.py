"""Whether the image files of a run were replaced by others of the same names.

What a run is resumed on is known by names, so that a copy serves as well. Names say nothing of what
is in the files: their sizes and times of change do, mostly.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mocokit.data.source import Source
from mocokit.data.sources.folder import FolderSource
from mocokit.data.sources.packed import PackedSource
from mocokit.data.sources.parquet import ParquetSource
from mocokit.data.sources.several import parts_of
from mocokit.data.sources.shards import ShardSource
from mocokit.engine.identity import Identity

MOST = 4096  # files of each part: a network disk may take a millisecond for each
_SECOND = 10**9

Marks = dict[str, tuple[int, int]]


def places_of(source: Source) -> tuple[str, ...]:
    """Where the images lie: folders and files, absolute."""
    return tuple(os.path.abspath(place) for part in parts_of(source) for place in _places(part))


def marks_of(source: Source) -> Marks:
    """Size in bytes and time of change in ns of image files by name, of `MOST` of a large folder.

    The names are those that a copy has too. Of images that are no files nothing is known.
    """
    found = {}
    for number, part in enumerate(parts_of(source)):
        for name, path in _files(part):
            if (mark := _mark(path)) is not None:
                found[f"{number}/{name}"] = mark
    return found


def replaced(before: Identity, source: Source) -> str:
    """What to tell of files that are not what they were when the run began; empty: nothing."""
    today = _today(before.files, source)
    pairs = [(before.files[name], mark) for name, mark in today.items()]
    sizes = sum(old[0] != new[0] for old, new in pairs)
    # A copy has times of its own.
    copied = before.places != places_of(source)
    times = 0 if copied else sum(not _same_time(old[1], new[1]) for old, new in pairs)
    if not sizes and not times:
        return ""
    changed = sum(
        old[0] != new[0] or (not copied and not _same_time(old[1], new[1])) for old, new in pairs
    )
    what = f"{sizes:,} of them have another size" if sizes else "their sizes are the same"
    return (
        f"since the run began, {changed:,} of the {len(pairs):,} image files that were compared "
        f"have been replaced or changed ({what}): the run goes on with what they hold now"
    )


def _today(before: Mapping[str, tuple[int, int]], source: Source) -> Marks:
    """The marks of the same files today; those that are gone are told of elsewhere."""
    found = {}
    roots = dict(enumerate(parts_of(source)))
    others = {f"{n}/{name}": path for n, part in roots.items() for name, path in _archives(part)}
    for key in before:
        number, _, name = key.partition("/")
        part = roots.get(int(number)) if number.isdecimal() else None
        path = os.path.join(part.root, name) if isinstance(part, FolderSource) else others.get(key)
        if path is not None and (mark := _mark(path)) is not None:
            found[key] = mark
    return found


def _files(part: Source) -> Iterator[tuple[str, str]]:
    """(name, path) of files that are looked at."""
    if isinstance(part, FolderSource):
        count = len(part.names)
        for number in np.unique(np.linspace(0, count - 1, min(count, MOST)).astype(np.int64)):
            name = part.names[int(number)]
            yield name, os.path.join(part.root, name)
    else:
        yield from _archives(part)


def _archives(part: Source) -> Iterator[tuple[str, str]]:
    """(name, path) of the files that hold many images each."""
    paths: Sequence[str] = [] if isinstance(part, FolderSource) else _places(part)
    for path in paths:
        yield os.path.basename(path), path


def _places(part: Source) -> list[str]:
    if isinstance(part, FolderSource):
        return [str(part.root)]
    if isinstance(part, PackedSource):
        return [str(part.path)]
    if isinstance(part, ParquetSource):
        return [str(path) for path in part.paths]
    if isinstance(part, ShardSource):
        return [os.fsdecode(path) for path in part.archives.every()]
    return []


def _mark(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _same_time(one: int, other: int) -> bool:
    """Some disks keep whole seconds, which shows only once a file has left the system's memory."""
    whole = one % _SECOND == 0 or other % _SECOND == 0
    return one == other or (whole and one // _SECOND == other // _SECOND)
