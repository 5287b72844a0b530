"""Named, complete settings. A recipe is a function; a variant is written as its difference.

Published values are quoted from the paper named beside them. "Not measured" means exactly that: we
have not run the recipe to its end ourselves.
"""

from mocokit.recipes.asked import RECIPES, asked, by_name, merge
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

__all__ = [
    "RECIPES",
    "ablation_a",
    "ablation_b",
    "ablation_c",
    "asked",
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
    "merge",
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
