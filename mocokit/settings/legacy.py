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


def upgrade(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as an earlier version wrote them, in today's names.

    What meant nothing for its method is left out. A file that a person wrote keeps what it states,
    save for a null.
    """
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


def means_nothing(path: str, value: Any, method: type[MethodSettings]) -> bool:
    """Whether a change only says that a method has not what it cannot have: queue_size=null."""
    section, _, name = path.partition(".")
    foreign = section == "method" and name in METHOD_0_1 - method.model_fields.keys()
    return foreign and value is None
