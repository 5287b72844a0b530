"""From a command's words to settings: which recipe or file, which data, what was stated."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mocokit.data import locations
from mocokit.errors import UserError
from mocokit.recipes import RECIPES, by_name
from mocokit.settings import load, methods, replace, stated_in
from mocokit.settings.schema import Settings


def asked(
    recipe: str | None,
    data: str | None,
    changes: Mapping[str, Any],
    needs_data: bool = True,
    allowed: Collection[str] = (),
    source: str | None = None,
) -> tuple[Settings, frozenset[str]]:
    """The settings of a command, and the dotted paths that its user stated.

    `recipe` is a recipe's name or a .yaml file; else a path, which then is the data of mocov2.
    Nothing at all is the embedded demo, the only recipe with data of its own. A method from outside
    the package is imported if `changes` name it, or if `allowed` has its module. `source` is the
    name of a Source object, which was given in place of data. Raises UserError for what does not
    exist.
    """
    methods.allow(allowed)
    if ":" in (name := str(changes.get("method.name"))) and not methods.is_known(name):
        methods.use(name)
    if recipe is not None and recipe not in RECIPES and not recipe.endswith((".yaml", ".yml")):
        if data is None and locations.exist(recipe):
            recipe, data = "mocov2", recipe
        elif data is None and any(mark in recipe for mark in "/.:{*"):
            raise UserError(locations.lacking(recipe))
    stated = set(changes)
    if recipe is not None and recipe.endswith((".yaml", ".yml")):
        base = load(Path(recipe))
        stated |= stated_in(Path(recipe))
        # What a user states beside a file is what runs: the file's quoted batch is not theirs.
        for value in ("optim.lr", "method.momentum"):
            if value in changes and f"{value}_batch" not in changes:
                stated.discard(f"{value}_batch")
    else:
        base = by_name(recipe or ("demo" if data is None and source is None else "mocov2"))
    if data is not None:
        changes = {**changes, "data.path": data}
    settings = replace(base, changes)
    if source is not None:  # a file cannot say how to open it again
        return replace(settings, {"data.path": f"Source object {source}"}), frozenset(stated)
    path = settings.data.path
    if path is not None and os.path.isfile(os.path.join(path, "config.yaml")):
        raise UserError(
            f"{path} is a run folder, not images; repeat its run with {path}/config.yaml, resume "
            f"it by --out {path}, or train it longer with --extend EPOCHS {path}"
        )
    if path is None and needs_data and settings.recipe != "demo":
        raise UserError(
            f"{settings.recipe} needs images: name a folder of them after it; only the recipe demo "
            "has images of its own"
        )
    if path is not None and not locations.exist(path):
        raise UserError(locations.lacking(path))
    if path is not None:  # a run must find them again from anywhere
        settings = replace(settings, {"data.path": locations.absolute(path)})
    return settings, frozenset(stated)


def merge(flags: Mapping[str, Any], assignments: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of settings by flags, where given, and by --set; raises UserError on a double."""
    given = {path: value for path, value in flags.items() if value is not None}
    for path in given.keys() & assignments.keys():
        raise UserError(f"{path} is stated twice, by its flag and by --set; keep one")
    if "recipe" in assignments:
        raise UserError("recipe is a name, not a setting; give another recipe as first argument")
    return {**given, **assignments}
