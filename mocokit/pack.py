"""One file of bounded images from any data set: faster to read than thousands of large ones."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocokit.data.open import open_data
from mocokit.data.sources.pack import write_pack
from mocokit.engine.record import Console
from mocokit.engine.runtime import default_threads
from mocokit.errors import Interrupted, UserError
from mocokit.files import shell_word, show
from mocokit.run import command
from mocokit.views.params import canvas_bound, scoring_bound
from mocokit.weights.encoder import view_spec


def pack(
    data: str | Path,
    file: str | Path,
    recipe: str = "mocov2",
    raw: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the images of `data` to one file, which then is data itself; returns its path.

    Images are shrunk by whole factors, to no less than the smallest crop of the recipe's views can
    use. What is shrunk becomes a JPEG of quality 95, all else stays as it is; with `raw`, bare
    pixels are stored, which need the most room and no decoding. An interrupted pack resumes.
    Nothing that is there already is replaced.
    """
    console, target = Console(), Path(file)
    asked, _ = command.asked(recipe, str(data), settings or {})
    if os.path.lexists(target):
        raise UserError(f"{show(target)} is there already: choose another file, or delete it")
    if not target.resolve().parent.is_dir():
        raise UserError(f"there is no folder {show(target.resolve().parent)}: make it first")
    splits = open_data(asked.data.path, asked.data.labels, asked.data.root, console.counting)
    bound = max(canvas_bound(spec := view_spec(asked)), scoring_bound(spec))
    for note in splits.train.notes:
        console.say(f"note: {note}", "yellow")
    count = sum(len(source) for source in splits if source is not None)
    console.say(
        f"{count:,} images, larger ones shrunk to no less than {bound} pixels, to {show(target)}",
        "bold",
    )
    try:
        with console.counting("packed", count) as advance:
            found = write_pack(splits, target, bound, raw, default_threads(), advance)
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on where it ended", 130) from None
    if found.bad:
        console.say(f"{found.bad:,} cannot be read; they are bad images of the pack too", "yellow")
    console.say(
        f"{found.shrunk:,} were shrunk; {found.bytes / 2**20:,.1f} MiB; train on it with: "
        f"mocokit pretrain {asked.recipe} {shell_word(target)}"
    )
    return target
