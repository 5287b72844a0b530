"""Projection heads, predictors, and the encoder: a backbone with a head."""

from typing import Any, cast

import torch
from torch import Tensor, nn


def build_head(kind: str, features: int, hidden: int | None, dim: int) -> nn.Sequential:
    """(N, features) -> (N, dim): one layer (MoCo v1), or two with a ReLU between (MoCo v2).

    Layers have biases and no batch norm, as in the authors' code. `mlp_bn` adds a batch norm before
    the ReLU (BYOL, arXiv 2006.07733, section 3.3); it is also used as a predictor.
    """
    if kind == "linear":
        return nn.Sequential(nn.Linear(features, dim))
    width = hidden or features
    norm = [nn.BatchNorm1d(width)] if kind == "mlp_bn" else []
    return nn.Sequential(nn.Linear(features, width), *norm, nn.ReLU(), nn.Linear(width, dim))


class Encoder(nn.Module):
    """Backbone and head: images (N, 3, H, W) -> projections (N, dim), not normalised."""

    backbone: nn.Module
    head: nn.Module

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.head(self.backbone(images))
        return projections

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's features (N, F), and their projections (N, dim)."""
        features = self.backbone(images)
        return features, self.head(features)

    def with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's feature map (N, C, h, w), and the projections (N, dim) of its mean.

        For methods that compare places. Only for backbones with timm's two halves.
        """
        backbone = cast(Any, self.backbone)
        maps: Tensor = backbone.forward_features(images)
        return maps, self.head(backbone.forward_head(maps))

    @property
    def num_features(self) -> int:
        """The width of the backbone's features."""
        return cast(int, self.backbone.num_features)


@torch.no_grad()
def calibrate_head(encoder: Encoder, images: Tensor) -> None:
    """Rescale the head's layers: each output gets mean 0 and standard deviation 1 on these images.

    This is a data-dependent initialisation (Krähenbühl et al. 2016, arXiv 1511.06856). The features
    of a small network nearly coincide at first; this spreads its queries from the first step.
    """
    outputs = encoder.backbone(images)
    for layer in encoder.head.children():
        if isinstance(layer, nn.Linear):
            responses = nn.functional.linear(outputs, layer.weight, layer.bias)
            scale = responses.std(0).clamp_min(1e-6)
            layer.weight.div_(scale[:, None])
            layer.bias.sub_(responses.mean(0)).div_(scale)
        outputs = layer(outputs)
