"""Look before you spend: what a data set holds, and what the network will see of it."""

import io
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mocokit.data.batch import read_spread
from mocokit.data.examine import Examined, examine
from mocokit.data.open import open_data
from mocokit.data.source import Source
from mocokit.data.sources.packed import lacking
from mocokit.engine.record import Console
from mocokit.engine.runtime import default_threads
from mocokit.errors import UserError
from mocokit.files import check_result, reason_of, show, write_result
from mocokit.run import build, command
from mocokit.settings import sizes
from mocokit.views.params import ViewSpec, seen_share
from mocokit.views.sheet import contact_sheet, is_sheet
from mocokit.weights.encoder import view_spec

QUICK = 200  # images that a quick look decodes
SHOWN = 10  # groups of equal images that are named


def check(
    recipe: str | None = None,
    data: str | Path | None = None,
    out: str | Path = "views.png",
    settings: Mapping[str, Any] | None = None,
    images: int = 8,
    quick: bool = False,
    allow_import: Collection[str] = (),
) -> Path:
    """Report what was found and write a contact sheet of views; returns the sheet's path.

    `recipe` and `data` are as in `pretrain`. Every image is read; `quick` reads 200 of a split. The
    sheet shows `images` images beside the query and the key view that the first epoch would make
    of them, with every parameter drawn, and beside the view of which scores are taken.
    """
    console, path = Console(), Path(out)
    check_result(path, "--out", is_sheet)
    kind = _format_of(path)
    where = None if data is None else str(data)
    asked, stated = command.asked(recipe, where, settings or {}, allowed=allow_import)
    splits = open_data(asked.data.path, asked.data.labels, asked.data.root, console.counting)
    for note in splits.train.notes:
        console.say(f"note: {note}", "yellow")
    specs, scored = build.view_specs(asked), view_spec(asked)
    bound = build.largest_canvas(specs.values())
    for lack in lacking(splits.train, bound):
        console.say(f"note: {lack}", "yellow")
    examined: list[Examined] = []
    for split, source in zip(("train", "validation"), splits, strict=True):
        if source is not None:
            _tell_counts(console, split, source)
            if quick:
                _quick(console, source)
            else:
                examined.append(_full(console, source, bound))
    if len(examined) == 2 and splits.validation is not None:
        for leaked in examined[1].twins(examined[0]):
            names = _named(splits.validation, leaked)
            text = f"{len(leaked):,} validation images are among the training images too: {names}"
            console.say(text, "yellow")
    try:
        splits.check_classes()
        notices = sizes.fit(asked, len(splits.train), stated)[1]
    except UserError as error:  # too few to train on, not to look at
        notices = [str(error)]
    for notice in notices:
        console.say(f"note: {notice}", "yellow")
    canvases, _ = read_spread(splits.train, images, bound)
    if canvases:
        console.say(_seen(scored, [canvas.shape[:2] for canvas in canvases.values()]))
    sheet = io.BytesIO()
    try:
        shown = list(canvases.values()), list(canvases)
        contact_sheet(specs, *shown, asked.seed, sheet, scored=scored, kind=kind)
    except (OSError, ValueError) as error:
        why = f"cannot write {show(path)} ({reason_of(error)})"
        raise UserError(f"{why}; choose another --out") from None
    write_result(path, sheet.getvalue(), "--out", is_sheet)
    console.say(f"views of {asked.recipe}: {show(path)}")
    return path


def _seen(spec: ViewSpec, sizes: Iterable[tuple[int, ...]]) -> str:
    """What a score sees of images of these heights and widths."""
    share = float(np.median([seen_share(spec, *size) for size in sizes]))
    return (
        f"scores see {share:.0%} of a photo's area: its short side resized to {spec.resize} "
        f"pixels, of which {spec.size} x {spec.size} in the centre (monitor.resize)"
    )


def _format_of(path: Path) -> str:
    """Pillow's name of the format that the path's ending asks for; PNG of a path without one."""
    if not path.suffix or path.is_relative_to("/dev"):
        return "PNG"
    try:
        return Image.registered_extensions()[path.suffix.lower()]
    except KeyError:
        raise UserError(
            f"--out {show(path)}: {show(path.suffix)} names no picture format; use .png"
        ) from None


def _tell_counts(console: Console, split: str, source: Source) -> None:
    text = f"{split}: {len(source):,} images"
    if source.labels is not None and len(source.classes):
        known = source.labels[source.labels >= 0]
        counts = np.bincount(known, minlength=len(source.classes))
        few, many = int(counts.argmin()), int(counts.argmax())
        text += f", {len(counts)} classes of {counts[few]:,} to {counts[many]:,}"
        if counts[few] < counts[many]:
            text += f" ({source.classes[few]}, {source.classes[many]})"
    console.say(text, "bold")


def _quick(console: Console, source: Source) -> None:
    found, bad = read_spread(source, QUICK, None)
    if not found:
        raise UserError(f"none of {len(bad)} images looked at can be read: {bad[0]}")
    heights, widths = np.array([canvas.shape[:2] for canvas in found.values()]).T
    console.say(f"{len(found)} looked at: {_sizes(heights, widths)}")
    _tell_bad(console, bad)


def _full(console: Console, source: Source, bound: int) -> Examined:
    with console.counting("read", len(source)) as advance:
        found = examine(source, bound, default_threads(), advance)
    if not len(found.heights):
        raise UserError(f"none of {len(source):,} images can be read: {found.bad[0]}")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.most_common())
    console.say(f"formats: {kinds}")
    console.say(f"sizes: {_sizes(found.heights, found.widths)}")
    groups = list(found.twins())
    if groups:
        extra = sum(len(group) - 1 for group in groups)
        console.say(f"duplicates: {extra:,} images have the content of another", "yellow")
        for group in groups[:SHOWN]:
            console.say(f"  {_named(source, group, ' = ')}")
        if len(groups) > SHOWN:
            console.say(f"  and {len(groups) - SHOWN:,} more groups")
    else:
        console.say("duplicates: none")
    _tell_bad(console, found.bad)
    if not found.bad:
        console.say("unreadable: none")
    return found


def _tell_bad(console: Console, bad: list[str]) -> None:
    for line in bad:
        console.say(f"cannot be read: {line}", "yellow")
    if bad:
        console.say(f"unreadable: {len(bad):,}", "yellow")


def _sizes(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> str:
    short = np.minimum(heights, widths)
    return (
        f"{heights.min()} to {heights.max()} pixels high, {widths.min()} to {widths.max()} wide, "
        f"short side {np.median(short):.0f} in the middle"
    )


def _named(source: Source, numbers: NDArray[np.int64], between: str = ", ") -> str:
    names = between.join(show(source.describe(number)) for number in numbers[:SHOWN].tolist())
    return names + (" ..." if len(numbers) > SHOWN else "")
