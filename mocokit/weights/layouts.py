"""ResNets of others: the authors' checkpoints of MoCo, torchvision's weights, other toolkits'.

What a file holds is found out from its keys, whatever it is called.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mocokit.errors import UserError
from mocokit.files import brief, show

_BLOCKS = {
    ("basic", 2): "resnet18",
    ("basic", 6): "resnet34",
    ("bottleneck", 6): "resnet50",
    ("bottleneck", 23): "resnet101",
    ("bottleneck", 36): "resnet152",
}
_OWN = re.compile(r"(conv1|bn1|layer[1-4])\.")  # not the classifier, nor what stands beside it
_FIRST, _SECOND = "conv1.weight", "layer1.0.conv1.weight"
# Words of names of the encoder that papers transfer, and of its slower copy, or of a student's.
_TAKEN = ("encoder_q", "base_encoder", "online", "teacher")
_COPIES = ("encoder_k", "momentum", "target", "ema", "student")


def read_resnet(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The name of the ResNet in a file's content, and its weights without any head.

    Of several encoders, the one that papers transfer. Raises UserError.
    """
    found = list(_networks(content))
    if not found:
        what = f", whose names begin with {brief(name, 60)}" if (name := _example(content)) else ""
        raise UserError(
            f"{show(path)} holds weights of others{what}: no ResNet that is known here, with "
            "conv1.weight and layer1 to layer4 under any prefix"
        )
    ranks = [_rank(place + prefix) for place, prefix, _ in found]
    chosen = [one for one, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
    if len(chosen) > 1:
        names = ", ".join(brief(place + prefix, 40) or "none" for place, prefix, _ in chosen[:4])
        raise UserError(
            f"{show(path)} holds {len(chosen)} ResNets, with the prefixes {names}; keep one"
        )
    _, prefix, state = chosen[0]
    own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    weights = {k: v for k, v in own.items() if _OWN.match(k)}
    return _name(weights, path), weights


def _networks(
    content: Any, place: str = "", depth: int = 0
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each ResNet in nested dicts: the names of its dicts, the prefix of its keys, its dict."""
    if not isinstance(content, dict) or depth > 3:
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    for name, value in named.items():
        prefix = name.removesuffix(_FIRST)
        if name.endswith(_FIRST) and f"{prefix}{_SECOND}" in named:
            yield place, prefix, named
        yield from _networks(value, f"{place}{name}.", depth + 1)


def _rank(prefix: str) -> int:
    if any(word in prefix for word in _COPIES):
        return 0
    return 2 if any(word in prefix for word in _TAKEN) else 1


def _example(content: Any) -> str:
    """The first name of a tensor, or nothing."""
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, Tensor):
                return str(name)
            if inner := _example(value):
                return inner
    return ""


def _name(weights: dict[str, Tensor], path: Path) -> str:
    blocks = {key.split(".")[1] for key in weights if key.startswith("layer3.")}
    kind = "bottleneck" if "layer1.0.conv3.weight" in weights else "basic"
    try:
        return _BLOCKS[kind, len(blocks)]
    except KeyError:
        raise UserError(
            f"{show(path)} holds a ResNet of {len(blocks)} {kind} blocks in its third stage; known "
            f"are {', '.join(_BLOCKS.values())}"
        ) from None
