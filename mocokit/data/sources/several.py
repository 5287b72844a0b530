"""Several sources as one, and a source by the numbers that a run once gave it."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import BadImage
from mocokit.data.index import Index
from mocokit.data.names import Names, short_name
from mocokit.data.source import Source, extended, relabelled


class SeveralSource:
    """The images of one source after those of another.

    Classes are told apart by their names. Where one part has no labels, there are none.
    """

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self.notes = (*(note for part in parts for note in part.notes), *unlabelled(parts))
        self.name = short_name("+".join(part.name for part in parts))
        self._ends = np.cumsum([len(part) for part in parts])
        self.classes: tuple[str, ...] = ()
        self.labels: NDArray[np.int64] | None = None
        if all(part.labels is not None for part in parts):
            self.relabel(self._names_of_classes())
        self.fingerprint = self._digest()

    def relabel(self, classes: tuple[str, ...]) -> None:
        """Number the classes by this order of their names; those not among them come after."""
        classes = extended(classes, self._names_of_classes())
        positions = {name: number for number, name in enumerate(classes)}
        labels = []
        for part in self.parts:
            assert part.labels is not None
            numbers = np.array([positions[name] for name in part.classes], np.int64)
            labels.append(relabelled(part.labels, numbers))
        self.classes, self.labels = classes, np.concatenate(labels)

    def _names_of_classes(self) -> tuple[str, ...]:
        every = dict.fromkeys(name for part in self.parts for name in part.classes)
        digits = all(name.isascii() and name.isdigit() for name in every)
        return tuple(sorted(every, key=int)) if digits else tuple(sorted(every))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image."""
        part, own = self._place(index)
        return part.read(own, bound)

    def content(self, index: int) -> bytes | None:
        part, own = self._place(index)
        return part.content(own)

    def describe(self, index: int) -> str:
        part, own = self._place(index)
        return f"{part.name}: {part.describe(own)}"

    def _place(self, index: int) -> tuple[Source, int]:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], index - (int(self._ends[number - 1]) if number else 0)

    def stamp(self) -> str:
        return " ".join(part.stamp() for part in self.parts)

    def index(self) -> Index:
        names = Names.of([name for part in self._titled() for name in _full_names(*part)])
        known = ("several", self.name, len(self), self.fingerprint)
        tops = [top for part in self.parts if (top := part.index().top) is not None]
        return Index(*known, self.classes, names, self.labels, top=next(iter(tops), None))

    def _titled(self) -> Iterator[tuple[Source, str]]:
        """Each part and its name, counted where several have it: x/photos and y/photos."""
        seen: Counter[str] = Counter()
        for part in self.parts:
            seen[part.name] += 1
            count = seen[part.name]
            yield part, part.name if count == 1 else f"{part.name} ({count})"

    def _digest(self) -> str:
        digest = hashlib.blake2b(b"mocokit several 1", digest_size=16)
        for part in self.parts:
            digest.update(part.fingerprint.encode() + b"/")
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def unlabelled(parts: Sequence[Source]) -> tuple[str, ...]:
    """What to tell where labels are left out for want of others."""
    without = [part.name for part in parts if part.labels is None]
    if not 0 < len(without) < len(parts):
        return ()
    who = f"{without[0]} and {len(without) - 1:,} more have" if without[1:] else f"{without[0]} has"
    return (f"{who} no labels: those of the other parts are left out",)


def _full_names(part: Source, title: str) -> Iterator[bytes]:
    index = part.index()
    if index.names is not None:
        prefix = title.encode() + b": "
        yield from (prefix + name for name in index.names.every())
    else:  # pixels alone: a row is known by the array that it is in
        yield from (f"{title}: {part.fingerprint} {row}".encode() for row in range(len(part)))


class RenumberedSource:
    """A changed source by the index that a run began with: what is gone is bad, what is new unseen.

    numbers: (n,) int64, today's number of each of the index's images, or -1
    """

    notes: tuple[str, ...] = ()

    def __init__(self, source: Source, index: Index, numbers: NDArray[np.int64]) -> None:
        assert index.names is not None
        self.source, self.known, self.numbers = source, index, numbers
        self.name, self.labels, self.classes = index.name, index.labels, index.classes
        self.fingerprint = index.fingerprint

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int, bound: int | None = None) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of an image."""
        return self.source.read(self._today(index), bound)

    def content(self, index: int) -> bytes | None:
        return self.source.content(self._today(index))

    def _today(self, index: int) -> int:
        number = int(self.numbers[index])
        if number < 0:
            raise BadImage("it was there when the run began, and is no longer")
        return number

    def describe(self, index: int) -> str:
        assert self.known.names is not None
        return self.known.names.shown(index)

    def stamp(self) -> str:
        return f"{self.fingerprint} of {self.source.stamp()}"

    def index(self) -> Index:
        return self.known


def parts_of(source: Source) -> tuple[Source, ...]:
    """The sources that a source is made of; itself, if of no others."""
    if isinstance(source, RenumberedSource):
        return parts_of(source.source)
    return source.parts if isinstance(source, SeveralSource) else (source,)


def _matched(before: Names, today: Names) -> NDArray[np.int64]:
    """(n,) today's number of each name before, or -1; of equal names the first is still the first.

    Where one of several equal names is gone or new, nobody can tell which: all of them are gone.
    """
    numbers, places = np.full(len(before), -1, np.int64), _places(today)
    for name, rows in _places(before).items():
        found = places.get(name, [])
        if len(found) == len(rows):
            numbers[rows] = found
    return numbers


def _places(names: Names) -> dict[bytes, list[int]]:
    places: dict[bytes, list[int]] = {}
    for number, name in enumerate(names.every()):
        places.setdefault(name, []).append(number)
    return places


def renumbered(source: Source, index: Index) -> tuple[Source, str] | None:
    """The source by the numbers of an index, and what to tell of the difference; None: other data.

    It is the same data as long as at least half of the index's images are still there.
    """
    if source.fingerprint == index.fingerprint:
        return source, ""
    today = source.index()
    if index.names is None or today.names is None or index.kind != today.kind:
        return None
    numbers = _matched(index.names, today.names)
    gone = int((numbers < 0).sum())
    new = today.length - (index.length - gone)
    if 2 * gone > index.length:
        return None
    parts = []
    if gone:
        parts.append(f"{gone:,} of the run's images are gone, and count as bad")
    if new:
        parts.append(f"{new:,} new ones are ignored")
    text = " and ".join(parts) or "the images' order or classes have changed; the run keeps its own"
    return RenumberedSource(source, index, numbers), text
