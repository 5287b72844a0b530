"""Every image is read: its format and size, whether it can be decoded, and which are equal."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocokit.data.decode import BadImage, look_at
from mocokit.data.source import Source

_CHUNK = 256
_BYTES = 16  # of a digest; by chance two of a billion images agree once in 10^20


class Look(NamedTuple):
    """What one image is; `reason` is empty if it can be read."""

    kind: str
    height: int
    width: int
    digest: bytes
    reason: str = ""


class Examined(NamedTuple):
    """What the images of a source are.

    heights, widths: (readable,) int64; bad: names with reasons
    digests: (n, 16) uint8, of each image's content, zero where it cannot be read
    """

    kinds: Counter[str]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    bad: list[str]
    digests: NDArray[np.uint8]

    def twins(self, other: "Examined | None" = None) -> Iterator[NDArray[np.int64]]:
        """Numbers of the images that have the same content, group by group; each group rises.

        With `other`, numbers of this source's images that the other one has too, in one group.
        """
        own = _keys(self.digests)
        if other is not None:
            found = np.flatnonzero(np.isin(own, _keys(other.digests)) & self.digests.any(1))
            if len(found):
                yield found
            return
        order = np.argsort(own, kind="stable")
        _, first, counts = np.unique(own[order], return_index=True, return_counts=True)
        groups = [order[a : a + n] for a, n in zip(first, counts, strict=True) if n > 1]
        groups = [group for group in groups if self.digests[group[0]].any()]
        yield from sorted(groups, key=lambda group: int(group[0]))


def examine(source: Source, bound: int, threads: int, advance: Callable[[int], None]) -> Examined:
    """Read every image as training does; `advance(n)` counts the images that are done."""
    kinds: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    bad: list[str] = []
    digests = np.zeros((len(source), _BYTES), np.uint8)
    with ThreadPoolExecutor(threads) as pool:  # decoding and hashing release the interpreter
        for first in range(0, len(source), _CHUNK):
            numbers = range(first, min(first + _CHUNK, len(source)))
            looks = pool.map(lambda number: _look(source, number, bound), numbers)
            for number, look in zip(numbers, looks, strict=True):
                if look.reason:
                    bad.append(f"{source.describe(number)}: {look.reason}")
                    continue
                kinds[look.kind] += 1
                sizes.append((look.height, look.width))
                digests[number] = np.frombuffer(look.digest, np.uint8)
            advance(len(numbers))
    heights, widths = np.array(sizes, np.int64).reshape(-1, 2).T
    return Examined(kinds, heights, widths, bad, digests)


def _look(source: Source, number: int, bound: int) -> Look:
    try:
        content = source.content(number)
        pixels = source.read(number, bound)
        if content is None:
            height, width = pixels.shape[:2]
            digest = hashlib.blake2b(f"{height} {width} ".encode(), digest_size=_BYTES)
            digest.update(np.ascontiguousarray(pixels).data)
            return Look("bare pixels", height, width, digest.digest())
        digest = hashlib.blake2b(content, digest_size=_BYTES)
        return Look(*look_at(content)[:3], digest.digest())
    except BadImage as error:
        return Look("", 0, 0, b"", str(error))


def _keys(digests: NDArray[np.uint8]) -> NDArray[np.void]:
    return np.ascontiguousarray(digests).view(f"V{_BYTES}").reshape(-1)
