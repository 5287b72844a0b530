"""ResNets of others: the authors' checkpoints of MoCo, torchvision's weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocokit.errors import UserError

SUFFIXES = (".pth", ".tar")  # ours end in .pt and .safetensors
# The query encoder of facebookresearch/moco with and without DDP, its main_lincls.py, torchvision.
_PREFIXES = ("module.encoder_q.", "encoder_q.", "module.", "")
_BLOCKS = {
    ("basic", 2): "resnet18",
    ("basic", 6): "resnet34",
    ("bottleneck", 6): "resnet50",
    ("bottleneck", 23): "resnet101",
    ("bottleneck", 36): "resnet152",
}


def read_resnet(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Its name and the weights of its backbone, without any head. Raises UserError.

    Read as tensors alone: a file that would need unpickling of code is refused.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as tensors ({reason}); a file that needs full unpickling could "
            "run any code, so it is refused"
        ) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    for prefix in _PREFIXES:
        if f"{prefix}conv1.weight" in state:
            found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            weights = {k: v for k, v in found.items() if not k.startswith("fc.")}
            return _name(weights, path), weights
    raise UserError(
        f"{path} holds no ResNet that is known here: no conv1.weight, with or without the prefixes "
        "of the authors' checkpoints"
    )


def _name(weights: dict[str, Tensor], path: Path) -> str:
    blocks = {key.split(".")[1] for key in weights if key.startswith("layer3.")}
    kind = "bottleneck" if "layer1.0.conv3.weight" in weights else "basic"
    try:
        return _BLOCKS[kind, len(blocks)]
    except KeyError:
        raise UserError(
            f"{path} holds a ResNet of {len(blocks)} {kind} blocks in its third stage; known are "
            f"{', '.join(_BLOCKS.values())}"
        ) from None
