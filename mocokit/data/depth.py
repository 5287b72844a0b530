"""One scale of gray levels for a whole data set: images of 9 to 15 bits keep their range.

A container of 16 bits often holds 10, 12 or 14. The scale is the least power of two that holds what
a spread of images reaches and what their files declare, so it follows from the images alone, in
every process. A run keeps it in images.idx, a pack in its header: both outlive a change of images.
An image above the scale is a bad image. It is not clipped, because nobody would see that.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mocokit.data.decode import BadImage, Look, highest_of, look_at
from mocokit.data.levels import top_for
from mocokit.data.source import Encoded, Source, Splits
from mocokit.data.sources.several import parts_of

LOOKED_AT = 64  # images whose heads say whether there are deep ones, and bands left out
MEASURED = 256  # images whose levels are looked at, if there are deep ones
DARK = 8  # times the middle image's range, a scale leaves it five bits of eight, or fewer

Content = Callable[[int], bytes | None]  # of an image, by its number; raises BadImage


class Found(NamedTuple):
    """The level that becomes 255, or None where no deep image was seen; and notes for the user."""

    top: int | None
    notes: tuple[str, ...]


def settle(splits: Splits) -> None:
    """Give all images one scale, and the training images the notes about it."""
    parts = [part for part in encoded(*splits) if not part.settled]
    if not parts:
        return
    ends = np.cumsum([len(part) for part in parts])

    def content(number: int) -> bytes | None:
        at = int(np.searchsorted(ends, number, side="right"))
        return parts[at].content(number - (int(ends[at - 1]) if at else 0))

    found = measure(content, int(ends[-1]))
    for part in parts:
        part.top = found.top
    splits.train.notes += found.notes


def keep(splits: Splits, top: int | None) -> None:
    """Give all images the scale that a run began with."""
    for part in encoded(*splits):
        if not part.settled:
            part.top = top


def top_of(*sources: Source | None) -> int | None:
    """The scale of these images; None where none of them is deep."""
    return next((part.top for part in encoded(*sources) if part.top is not None), None)


def encoded(*sources: Source | None) -> list[Encoded]:
    """The parts of sources that are decoded when they are read."""
    every = (part for source in sources if source is not None for part in parts_of(source))
    return [part for part in every if isinstance(part, Encoded)]


def measure(content: Content, count: int) -> Found:
    """The scale of `count` images, by some that are spread evenly over them."""
    looks = [look for number in spread(count, LOOKED_AT) if (look := _look(content, number))]
    extra = sum(look.left_out > 0 for look in looks)
    notes: tuple[str, ...] = ()
    if extra:
        notes = (
            f"{extra} of {len(looks)} images looked at have bands that are neither colours nor, as "
            "the file says, transparency: these bands are left out",
        )
    if not any(look.deep for look in looks):
        return Found(None, notes)
    reached = [
        level
        for number in spread(count, MEASURED)
        if (look := _look(content, number)) and look.deep
        if (level := _reached(content, number)) is not None
    ]
    if not reached:
        return Found(None, notes)
    top = max(reached)
    what = f"0 to {top:,} ({top.bit_length()} bits)" if top > 1 else "0 to 1"
    told = f"images of more than 8 bits are read on one scale, {what}, that holds the "
    return Found(top, (*notes, f"{told}{len(reached):,} looked at", *_dark(reached, top)))


def _dark(reached: Sequence[int], top: int) -> list[str]:
    """What a scale costs images of another kind: nobody sees that a training image is black."""
    units, middle = sum(one == 1 for one in reached), int(np.median(reached))
    if 0 < units < len(reached):
        return [
            f"{units:,} of these hold levels from 0 to 1 and are black on this scale: give all "
            "images of the set one scale"
        ]
    if middle * DARK > top:
        return []
    return [
        f"half of these reach no more than {middle:,}, which becomes {255 * middle / top:.0f} of "
        "255: take images of another scale out of the set"
    ]


def spread(count: int, most: int) -> Sequence[int]:
    """At most so many numbers below `count`, evenly spread."""
    numbers: list[int] = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()
    return numbers


def _look(content: Content, number: int) -> Look | None:
    try:
        found = content(number)
        return None if found is None else look_at(found)
    except BadImage:
        return None


def _reached(content: Content, number: int) -> int | None:
    """The least top of a scale that holds an image; for floats it may be 1. None: it has none."""
    try:
        found = content(number)
        assert found is not None
        level, bits = highest_of(found)
        if 0 <= level <= 1 and look_at(found).floats:
            return 1
    except BadImage:
        return None
    return top_for(level, bits)
