"""A frozen network, the views it expects, and the hash of its weights."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mocokit.views.params import ViewSpec

Layer = Literal["backbone", "head"]


@dataclass(frozen=True)
class FrozenModel:
    """A network (N, 3, H, W) -> (N, width), on its device and in eval mode."""

    name: str  # shown to the user
    network: nn.Module
    width: int
    spec: ViewSpec
    architecture: str  # what the state dict does not contain
    layer: Layer = "backbone"
    precision: str = "float32"
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def weights(self) -> str:
        """A hash of every parameter and buffer."""
        return weights_hash(self.network)

    def features(self, views: Tensor) -> Tensor:
        """(n, width) in float32, computed in the model's precision."""
        with self.autocast():
            features: Tensor = self.network(views)
        return features.float()


class Pixels(nn.Module):
    """The baseline without a network: (N, 3, H, W) -> (N, 3 H W), the pixels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # its device is the model's

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def weights_hash(module: nn.Module) -> str:
    """Equal for two modules if and only if all tensors of their state dicts have the same bits."""
    digest = hashlib.blake2b(b"mocokit weights 1", digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
