"""mocokit: turn a folder of unlabelled images into a visual backbone by momentum contrast.

The public names load what they need on first use, so that importing the package is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mocokit.version import VERSION

if TYPE_CHECKING:
    from mocokit.errors import Interrupted, MocokitError, NonFiniteLoss, UserError
    from mocokit.evaluate.api import evaluate_finetune, evaluate_knn, evaluate_linear
    from mocokit.evaluate.voc import evaluate_voc
    from mocokit.train import Run, pretrain
    from mocokit.weights.resolve import load

__version__ = VERSION

_HOMES = {
    "pretrain": "mocokit.train",
    "Run": "mocokit.train",
    "load": "mocokit.weights.resolve",
    "evaluate_knn": "mocokit.evaluate.api",
    "evaluate_linear": "mocokit.evaluate.api",
    "evaluate_finetune": "mocokit.evaluate.api",
    "evaluate_voc": "mocokit.evaluate.voc",
    "MocokitError": "mocokit.errors",
    "UserError": "mocokit.errors",
    "NonFiniteLoss": "mocokit.errors",
    "Interrupted": "mocokit.errors",
}
_ROOMS = ("chance", "evaluate", "methods", "nets", "recipes", "settings", "views")

__all__ = [
    "Interrupted",
    "MocokitError",
    "NonFiniteLoss",
    "Run",
    "UserError",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_voc",
    "load",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"mocokit.{name}")
    raise AttributeError(f"module 'mocokit' has no attribute {name!r}")
