"""A recipe is written as its difference from another."""

from collections.abc import Mapping
from typing import Any

from mocokit.settings import replace
from mocokit.settings.schema import Settings


def derive(base: Settings, name: str, changes: Mapping[str, Any]) -> Settings:
    """Another recipe of that name: `base` with {dotted path: value} changed."""
    return replace(base, {"recipe": name, **changes}, origin=f"recipe {name}: setting")
