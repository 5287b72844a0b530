"""What earlier versions wrote: the only place that knows their names."""

from collections.abc import Mapping
from typing import Any

from mocokit.settings.methods import BUILT_IN, MethodSettings

# 0.1 had one section for all methods, and wrote all of it into every config.yaml. What belonged to
# another method had no effect.
METHOD_0_1 = frozenset({
    "name", "loss", "temperature", "queue_size", "momentum", "momentum_batch", "momentum_schedule",
    "symmetric", "enqueue", "bank_negatives", "bank_momentum", "batch_norm", "group_size", "groups",
    "shuffle", "chunk",
})  # fmt: skip


# Recipes of 0.1 that score the whole short side; all others scored 224 of 256 pixels.
WHOLE_0_1 = frozenset({
    "demo", "mocov2_cifar10", "mocov2_cifar10_symmetric", "endtoend_cifar10", "simclr_cifar10",
    "memorybank_cifar10", "memorybank_softmax_cifar10",
})  # fmt: skip
# What a user may still name; the sentence says what to name instead.
MOVED = {
    "views.resize": "monitor.resize is the short side of the scoring view, and follows views.size "
    "where it is not set",
}


def upgrade(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as an earlier version wrote them, in today's names.

    What meant nothing for its method is left out. A file that a person wrote keeps what it states,
    save for a null.
    """
    tree = _scoring(tree)
    method = tree.get("method")
    name = method.get("name", "moco") if isinstance(method, Mapping) else None
    if not isinstance(method, Mapping) or not isinstance(name, str) or name not in BUILT_IN:
        return dict(tree)
    known = BUILT_IN[name].model_fields
    complete = method.keys() >= METHOD_0_1
    kept = {
        name: value
        for name, value in method.items()
        if name in known or name not in METHOD_0_1 or not (complete or value is None)
    }
    return {**tree, "method": kept}


def _scoring(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """`views.resize` was both the size of the scoring view and a bound of training canvases.

    The canvases stay as they were, since what a run computes depends on them. The scoring view
    follows `views.size` now, in the recipe's proportion, or as a whole where the two were equal.
    """
    views, monitor = tree.get("views"), tree.get("monitor", {})
    if not isinstance(views, Mapping) or "resize" not in views:
        return tree
    resize, size = views["resize"], views.get("size", 224)
    views = {"canvas": resize, **{name: views[name] for name in views if name != "resize"}}
    tree = {**tree, "views": views}
    if (tree.get("recipe") in WHOLE_0_1 or resize == size) and isinstance(monitor, Mapping):
        tree["monitor"] = {"centre": 1.0, **monitor}
    return tree


def means_nothing(path: str, value: Any, method: type[MethodSettings]) -> bool:
    """Whether a change only says that a method has not what it cannot have: queue_size=null."""
    section, _, name = path.partition(".")
    foreign = section == "method" and name in METHOD_0_1 - method.model_fields.keys()
    return foreign and value is None
