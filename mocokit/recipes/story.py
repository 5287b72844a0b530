"""What a recipe's docstring says of it, in parts.

A docstring has one form: a title of at most 34 characters, a description, then the lines Source,
Command, Cost, Published and Measured, each of which may go on in the next line.
"""

import inspect
import re
from dataclasses import dataclass

from mocokit import published
from mocokit.recipes import RECIPES

LINES = ("Source", "Command", "Cost", "Published", "Measured")
# By the module that a recipe stands in, in the order they are listed.
GROUPS = {
    "imagenet": "ImageNet: MoCo, and the rows of its tables",
    "mechanisms": "Mechanisms: other ways to get keys and negatives, on ImageNet",
    "small": "Small images: CIFAR-10, and the demo",
}


@dataclass(frozen=True)
class Story:
    """One recipe in words."""

    name: str
    group: str
    title: str
    description: str
    lines: dict[str, str]  # by the names of LINES

    @property
    def published(self) -> str:
        """The published scores alone, or nothing."""
        found = published.ACCURACY.get(self.name)
        return found.short() if found else ""

    @property
    def measured(self) -> str:
        """The measured score alone, or the range of several seeds, or nothing."""
        found = re.match(r"(kNN|linear) ([\d.]+(?:, [\d.]+)*)", self.lines["Measured"])
        if not found:
            return ""
        low, high = (pick(found[2].split(", "), key=float) for pick in (min, max))
        return f"{found[1]} {low}" if low == high else f"{found[1]} {low}-{high}"


def story(name: str) -> Story:
    """The story of the recipe of that name, which must exist."""
    recipe = RECIPES[name]
    title, _, rest = inspect.cleandoc(recipe.__doc__ or "").partition("\n")
    description, *pieces = re.split(rf"^({'|'.join(LINES)}): ", rest, flags=re.M)
    lines = dict(zip(pieces[::2], map(_joined, pieces[1::2]), strict=True))
    group = recipe.__module__.rpartition(".")[2]
    return Story(name, group, title.removesuffix("."), _joined(description), lines)


def _joined(text: str) -> str:
    return " ".join(text.split())
