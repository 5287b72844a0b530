"""The messages of a run before its first step and after its last."""

from typing import Any

from mocokit import settings as settings_
from mocokit.files import show
from mocokit.recipes import RECIPES
from mocokit.run import extend, readme
from mocokit.run.readme import JUDGED, NAMES
from mocokit.run.state import RunState


def start(run: RunState) -> None:
    """Print the settings and what loss to expect, and write the README of an unfinished run."""
    say, settings, effect = run.console.say, run.settings, run.effect
    images, classes = len(run.splits.train), len(run.splits.train.classes)
    say(
        f"{settings.recipe}: {images:,} images" + (f", {classes} classes" if classes else ""),
        "bold",
    )
    if settings.data.path is None:
        say("A procedural demonstration on embedded textures, not a benchmark.")
    shown = f"{settings.engine.precision} on {run.device}"
    say(
        f"{effect.total_steps:,} steps of {settings.train.batch_size} images in {effect.groups} "
        f"batch-norm group{'s' if effect.groups > 1 else ''}, lr {effect.lr:.3g}, "
        + (f"key momentum {effect.key_momentum:.6g}, " if effect.key_momentum is not None else "")
        + shown
    )
    if settings.recipe in RECIPES:
        changed = settings_.difference(RECIPES[settings.recipe](), settings)
        own = {k: v for k, v in changed.items() if not k.startswith(("engine.", "data.path"))}
        for path, (before, after) in own.items():
            say(f"  {path}: {before} in the recipe -> {after}")
    if run.step:
        say(f"resumed after step {run.step} of {effect.total_steps}")
    elif longer := extend.told(settings):
        say(f"{longer}.")
    else:
        say(f"What to expect: {run.parts.method.expectation}")
    say(f"run folder: {show(run.folder.path)}")
    if run.world.writes:
        readme.write(run)


def result(run: RunState, result: dict[str, Any]) -> None:
    """Print the table of scores, and where the run folder is."""
    rows = [(text, f"{result[name]:.1%}") for name, text in NAMES.items() if name in result]
    if rows:
        run.console.table(f"{run.settings.recipe}: kNN accuracy", ["features", "kNN"], rows)
        run.console.say(result["protocol"])
    for name in JUDGED:
        if name in result:
            run.console.say(result[name])
    if run.settings.data.path is None:
        run.console.say("A procedural demonstration on embedded textures, not a benchmark.")
    run.console.say(f"finished: {show(run.folder.path)}")
