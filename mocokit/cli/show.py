"""Settings and recipes as tables for a person: `pretrain --show`, `--show-all` and `recipes`.

What differs comes first: what the user changed, what the recipe sets, what was fitted to the
images. Then comes what follows from the settings. torch is loaded only where images are opened or
the machine is examined.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pydantic import BaseModel

from mocokit import published, recipes
from mocokit.cli import tables
from mocokit.errors import UserError
from mocokit.files import printable
from mocokit.recipes.derive import parent
from mocokit.recipes.story import GROUPS, LINES, story
from mocokit.settings import LABELS, reading, sizes
from mocokit.settings.schema import Settings
from mocokit.views.params import ViewSpec, describe

NO_TERMINAL, NARROWEST, WIDEST = 80, 60, 110  # columns
MACHINE = frozenset({
    "data.workers", "engine.device", "engine.precision", "engine.memory_format", "engine.compile",
    "engine.cuda_graphs", "engine.threads",
})  # fmt: skip
HEADED = LABELS | {"data.path"}  # the heading names the recipe and the images
UNKNOWN = frozenset({"images", "steps_per_epoch", "total_steps"})  # without images
MANY = 10**6  # steps an epoch where no images are named: nothing is fitted to so many


class Setting(NamedTuple):
    """One setting of a Settings object."""

    path: str
    value: Any
    meaning: str


@dataclass(frozen=True)
class Shown:
    """The settings of a command at each stage, and what follows from them."""

    recipe: Settings  # as it was written
    asked: Settings  # with the user's changes
    fitted: Settings  # with sizes for the images, where they are named
    effect: sizes.Resolved
    images: int | None = None
    notices: tuple[str, ...] = ()
    machine: dict[str, Any] | None = None  # by path, what the machine settles


def pretrain(asked: Settings, stated: frozenset[str], everything: bool) -> str:
    """What `pretrain --show` prints, or `--show-all`."""
    named = asked.data.path is not None or asked.recipe == "demo"
    shown = _on_this_machine(_sized(asked, stated, _count_images(asked) if named else None))
    if everything:
        return _every_setting(shown)
    width = _width()
    blocks = [
        _changed(shown),
        _own(shown),
        *_fitted(shown),
        ("In effect", _effect(shown)),
    ]
    lines = [*_heading(shown, width), *tables.settings(blocks, width)]
    if shown.notices:
        lines += ["", *tables.wrapped([f"note: {notice}" for notice in shown.notices], width)]
    lines += [*_views(shown, width), ""]
    lines += tables.wrapped(
        ["`--set SECTION.NAME=VALUE` changes a setting; `--show-all` prints all of them."], width
    )
    return "\n".join(map(printable, lines))


def recipe_list() -> str:
    """One line a recipe, in groups, at most 100 columns wide."""
    stories = [story(name) for name in recipes.RECIPES]
    head = ("recipe", "what it is", "published", "measured")
    cells = [(s.name, s.title, s.published or "-", s.measured or "-") for s in stories]
    first, *lines = tables.columns([head, *cells])
    out = [first]
    for group in dict.fromkeys([*GROUPS, *(s.group for s in stories)]):
        out += ["", GROUPS.get(group, group)]
        out += [line for line, s in zip(lines, stories, strict=True) if s.group == group]
    out += ["", "Accuracies are in percent. `mocokit recipes NAME` gives their protocols."]
    return "\n".join(out)


def recipe_story(name: str) -> str:
    """All that is known of one recipe; raises UserError with the nearest for an unknown name."""
    if name not in recipes.RECIPES:
        raise UserError(f"there is no recipe named {name!r}; {recipes.nearest(name)}")
    words, width = story(name), _width()
    shown = _sized(recipes.RECIPES[name](), frozenset(), None)
    facts = list(words.lines.items())
    if voc := _voc(name):
        facts.insert(LINES.index("Published") + 1, ("", voc))
    own = _own(shown)
    blocks = [own, ("In effect", _effect(shown))]
    base = parent(shown.recipe)
    if base is not None and (changed := _changes(recipes.RECIPES[base](), shown.recipe)) != own[1]:
        blocks.insert(0, (f"Derived from {base} ({base} -> {name})", changed))
    lines = [f"{name}: {words.title}", "", *tables.wrapped([words.description], width), ""]
    lines += tables.facts(facts, width)
    lines += tables.settings(blocks, width) + _views(shown, width)
    return "\n".join(lines)


def _voc(name: str) -> str:
    """The published detection result of a recipe, or nothing."""
    found = published.VOC_OF_RECIPE.get(name)
    if found is None:
        return ""
    row = next(row for row in published.VOC["07+12"] if row.name == found)
    source = published.VOC_SOURCE["07+12"].partition(";")[0]
    return f"VOC07+12 detection: AP50 {row.ap50}, AP {row.ap}, AP75 {row.ap75} ({source})."


def _width() -> int:
    """Columns to print in: the terminal's, within limits."""
    found = shutil.get_terminal_size().columns if sys.stdout.isatty() else NO_TERMINAL
    return min(max(found, NARROWEST), WIDEST)


def _count_images(asked: Settings) -> int:
    from mocokit.data.open import open_data

    return len(open_data(asked.data.path, asked.data.labels, asked.data.root).train)


def _sized(asked: Settings, stated: frozenset[str], images: int | None) -> Shown:
    """The settings with sizes fitted to the images; without images, what holds for any number."""
    base = recipes.RECIPES.get(asked.recipe, recipes.mocov2)()
    number = asked.train.batch_size * MANY if images is None else images
    fitted, notices = sizes.fit(asked, number, stated)
    effect = sizes.resolve(fitted, number)
    return Shown(base, asked, fitted, effect, images, tuple(notices) if images is not None else ())


def _on_this_machine(shown: Shown) -> Shown:
    """With every `auto` that the machine settles."""
    from mocokit.engine.runtime import choose_device
    from mocokit.run import build

    device = choose_device(shown.asked.engine.device)
    settled = build.settle(shown.fitted, device, None)
    before = {path: value for path, value, _ in _each(shown.fitted)}
    machine = {
        path: value for path, value, _ in _each(settled) if path in MACHINE or value != before[path]
    }
    machine["engine.device"] = str(device)
    machine["data.workers"] = build.count_workers(settled, device)
    return replace(shown, machine=machine)


def _each(section: BaseModel, prefix: str = "") -> Iterator[Setting]:
    """Every setting that this object has; methods may have different ones."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _each(value, f"{prefix}{name}.")
        else:
            yield Setting(f"{prefix}{name}", value, field.description or "")
    for name, value in (section.model_extra or {}).items():  # of a method whose class is not here
        yield Setting(f"{prefix}{name}", value, "")


def _changes(before: Settings, after: Settings) -> list[tables.Row]:
    """What differs, as `old -> new`."""
    old = {path: value for path, value, _ in _each(before)}
    return [
        tables.Row(path, _arrow(old[path], value) if path in old else text(value), meaning)
        for path, value, meaning in _each(after)
        if path not in HEADED and (path not in old or old[path] != value)
    ]


def _changed(shown: Shown) -> tuple[str, list[tables.Row] | str]:
    rows = _changes(shown.recipe, shown.asked)
    return ("Changed by you (recipe -> yours)", rows) if rows else ("Changed by you", "nothing")


def _own(shown: Shown) -> tuple[str, list[tables.Row] | str]:
    rows = _changes(Settings(), shown.recipe)
    if not rows:
        return "The recipe's own", f"nothing, since mocokit's defaults are {shown.recipe.recipe}"
    return "The recipe's own (default -> recipe)", rows


def _fitted(shown: Shown) -> list[tuple[str, list[tables.Row] | str]]:
    rows = _changes(shown.asked, shown.fitted)
    on = "the settings above" if shown.images is None else f"the {shown.images:,} images"
    return [(f"Fitted to {on}", rows)] if rows else []


def _effect(shown: Shown) -> list[tables.Row]:
    """What the settings come to: sizes, and what this machine settles."""
    now, effect = shown.fitted, shown.effect
    batch, epochs = now.train.batch_size, now.train.epochs
    rows = [
        tables.Row("optim.learning rate", text(effect.lr), f"peak, at batch {batch}"),
        tables.Row("method.groups", text(effect.groups), "batch-norm groups of a batch"),
    ]
    if effect.key_momentum is not None:
        meaning = f"share of the old key encoder after a step, at batch {batch}"
        rows.append(tables.Row("method.key momentum", text(effect.key_momentum), meaning))
    if shown.images is not None:
        per, total, needs = f"{effect.steps_per_epoch:,}", f"{effect.total_steps:,}", ""
    else:
        per, total, needs = "unknown", "unknown", "; known once the images are named"
    if shown.machine is not None or shown.images is not None:  # not in a recipe's story
        rows.append(tables.Row("train.steps per epoch", per, f"steps of {batch} images{needs}"))
        rows.append(tables.Row("train.total steps", total, f"in {epochs} epochs{needs}"))
    machine = shown.machine or {}
    rows += [
        tables.Row(path, _arrow(value, machine[path]), meaning)
        for path, value, meaning in _each(now)
        if path in machine
    ]
    order = list(type(now).model_fields)
    return sorted(rows, key=lambda row: order.index(row.path.partition(".")[0]))


def _heading(shown: Shown, width: int) -> list[str]:
    name = shown.asked.recipe
    title = f" ({story(name).title})" if name in recipes.RECIPES else ""
    path = shown.asked.data.path
    where = f" in {path}" if path is not None else ""
    number = f"{shown.images:,}{where}" if shown.images is not None else "none named"
    return tables.wrapped([f"Recipe {name}{title}", f"Images: {number}"], width)


def _augmentation(shown: Shown) -> list[tuple[str, str, str]]:
    now = shown.fitted
    spec = ViewSpec(**now.views.model_dump(), resize=sizes.scoring_side(now))
    return [("operation", "probability", "parameters"), *describe(spec)]


def _views(shown: Shown, width: int) -> list[str]:
    rows = tables.three_columns(_augmentation(shown), width, indent=2)
    return ["", "Augmentation of both views, in order", *rows]


def _every_setting(shown: Shown) -> str:
    """All settings as a YAML file that `mocokit pretrain` reads, each with its meaning.

    An `auto` stays, so that the file means the same on another machine.
    """
    notes = [f"Every setting of a run by the recipe {shown.asked.recipe}"]
    notes += [f"note: {notice}" for notice in shown.notices]
    if shown.images is None:
        notes.append("note: no images are named, so these sizes are not fitted to any")
    lines = [*_comment(tables.wrapped(notes, 98)), ""]
    lines += _yaml(shown.fitted)
    follows: dict[str, Any] = dict(shown.effect.as_dict())
    if shown.images is None:
        follows = {k: v for k, v in follows.items() if k not in UNKNOWN}
    follows |= shown.machine or {}
    lines += ["", "# What follows from the settings above, here; never read back"]
    lines += reading.to_text({"resolved": follows}).splitlines()
    lines += ["", "# Augmentation of both views, in order"]
    lines += _comment(tables.three_columns(_augmentation(shown), 96, indent=2))
    return "\n".join(map(printable, lines))


def _yaml(section: BaseModel, indent: str = "") -> list[str]:
    """Lines of YAML, with the meaning of each setting above it."""
    lines = []
    plain = section.model_dump(mode="json")
    described = {name: field.description for name, field in type(section).model_fields.items()}
    for name in [*described, *(section.model_extra or {})]:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += ["", f"{indent}{name}:", *_yaml(value, f"{indent}  ")]
            continue
        meaning = textwrap.wrap(described.get(name) or "", 98 - len(indent))
        lines += [f"{indent}# {line}" for line in meaning]
        flow = isinstance(plain[name], (list, dict))
        dumped = reading.to_text(
            {name: plain[name]},
            default_flow_style=None if flow else False,
            width=10**6,
            allow_unicode=str(plain[name]).isprintable(),
        )
        lines += [f"{indent}{line}" for line in dumped.splitlines()]
    return lines


def _comment(lines: Iterable[str]) -> list[str]:
    return [f"# {line}".rstrip() for line in lines]


def _arrow(before: Any, after: Any) -> str:
    return text(after) if before == after else f"{text(before)} -> {text(after)}"


def text(value: Any) -> str:
    """A value as `--set` takes it; numbers are rounded to six digits."""
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
