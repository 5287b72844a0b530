"""Look before you spend: what a data set holds, and what the network will see of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mocokit import build, recipes, sizes
from mocokit.data.batch import look
from mocokit.data.source import Source, open_data
from mocokit.engine.record import Speaker
from mocokit.errors import UserError
from mocokit.views.params import canvas_bound
from mocokit.views.sheet import contact_sheet

LOOKED_AT = 200  # images that are decoded to report their sizes


def check(
    recipe: str | None = None,
    data: str | Path | None = None,
    out: str | Path = "views.png",
    settings: Mapping[str, Any] | None = None,
    images: int = 8,
) -> Path:
    """Report what was found and write a contact sheet of views; returns the sheet's path.

    `recipe` and `data` are as in `pretrain`. The sheet shows `images` images beside the query and
    the key view that the first epoch would make of them, with every parameter drawn.
    """
    speaker, path = Speaker(), Path(out)
    asked, stated = recipes.asked(recipe, None if data is None else str(data), settings or {})
    splits = open_data(asked.data.path, asked.data.labels)
    _tell(speaker, "train", splits.train)
    if splits.validation is not None:
        _tell(speaker, "validation", splits.validation)
    found, bad = look(splits.train, LOOKED_AT, None)
    if not found:
        raise UserError(f"none of {len(bad)} images looked at can be read: {bad[0]}")
    heights, widths = zip(*(canvas.shape[:2] for canvas in found.values()), strict=True)
    speaker.say(
        f"{len(found)} looked at: {min(heights)} to {max(heights)} pixels high, "
        f"{min(widths)} to {max(widths)} wide"
    )
    for line in bad:
        speaker.say(f"cannot be read: {line}", "yellow")
    for notice in sizes.fit(asked, len(splits.train), stated)[1]:
        speaker.say(f"note: {notice}", "yellow")
    spec = build.view_spec(asked)
    canvases, _ = look(splits.train, images, canvas_bound(spec))
    try:
        contact_sheet(spec, list(canvases.values()), list(canvases), asked.seed, path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path} ({error}); choose another --out") from None
    speaker.say(f"views of {asked.recipe}: {path}")
    return path


def _tell(speaker: Speaker, split: str, source: Source) -> None:
    text = f"{split}: {len(source):,} images"
    if source.labels is not None:
        counts = np.bincount(source.labels, minlength=len(source.classes))
        text += f", {len(counts)} classes of {counts.min():,} to {counts.max():,}"
    speaker.say(text, "bold")
