"""Named, complete settings. A recipe is a function; a variant is written as its difference.

Published values are quoted from the paper named beside them. "Not measured" means exactly that: we
have not run the recipe to its end ourselves.
"""

import difflib
from collections.abc import Callable

from mocokit.errors import UserError
from mocokit.recipes.imagenet import (
    ablation_a,
    ablation_b,
    ablation_c,
    mocov1,
    mocov2,
    mocov2_800,
    mocov2_symmetric,
    mocov2plus,
)
from mocokit.recipes.mechanisms import (
    endtoend,
    endtoend_4096,
    endtoend_v1,
    memorybank,
    memorybank_softmax,
    simclr,
    simclr_256,
)
from mocokit.recipes.small import (
    demo,
    endtoend_cifar10,
    memorybank_cifar10,
    memorybank_softmax_cifar10,
    mocov2_cifar10,
    mocov2_cifar10_symmetric,
    simclr_cifar10,
)
from mocokit.settings.schema import Settings

__all__ = [
    "RECIPES",
    "ablation_a",
    "ablation_b",
    "ablation_c",
    "by_name",
    "demo",
    "endtoend",
    "endtoend_4096",
    "endtoend_cifar10",
    "endtoend_v1",
    "memorybank",
    "memorybank_cifar10",
    "memorybank_softmax",
    "memorybank_softmax_cifar10",
    "mocov1",
    "mocov2",
    "mocov2_800",
    "mocov2_cifar10",
    "mocov2_cifar10_symmetric",
    "mocov2_symmetric",
    "mocov2plus",
    "simclr",
    "simclr_256",
    "simclr_cifar10",
]

RECIPES: dict[str, Callable[[], Settings]] = {
    function.__name__: function
    for function in (
        demo,
        mocov1,
        mocov2,
        mocov2_800,
        mocov2_symmetric,
        mocov2plus,
        ablation_a,
        ablation_b,
        ablation_c,
        endtoend,
        endtoend_4096,
        endtoend_v1,
        simclr,
        simclr_256,
        memorybank,
        memorybank_softmax,
        mocov2_cifar10,
        mocov2_cifar10_symmetric,
        endtoend_cifar10,
        simclr_cifar10,
        memorybank_cifar10,
        memorybank_softmax_cifar10,
    )
}


def by_name(name: str) -> Settings:
    """The recipe of that name; raises UserError with the nearest known one."""
    if name not in RECIPES:
        raise UserError(
            f"there is neither a recipe nor a file or folder named {name!r}; {nearest(name)}"
        )
    return RECIPES[name]()


def nearest(name: str) -> str:
    """For a name that is no recipe's: the one that may be meant, or all of them."""
    close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(RECIPES)}"
