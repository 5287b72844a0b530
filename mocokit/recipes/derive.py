"""A recipe is written as its difference from another."""

from collections.abc import Mapping
from typing import Any

from mocokit.settings import replace
from mocokit.settings.schema import Settings

_PARENTS: dict[str, str | None] = {}  # noted when a recipe is built


def derive(base: Settings | None, name: str, changes: Mapping[str, Any]) -> Settings:
    """A recipe of that name: `base`, or the defaults, with {dotted path: value} changed."""
    _PARENTS[name] = base.recipe if base is not None else None
    return replace(
        base or Settings(), {"recipe": name, **changes}, origin=f"recipe {name}: setting"
    )


def parent(recipe: Settings) -> str | None:
    """The name of the recipe that this one was derived from; None for the defaults."""
    return _PARENTS[recipe.recipe]
