"""Small networks for tests."""

import torch
from torch import nn

from mocokit.nets.batchnorm import use_groups
from mocokit.nets.heads import Encoder, build_head


def small_backbone(batch_norm: bool = True) -> nn.Module:
    """(N, 3, H, W) -> (N, 12), with plain torch layers."""
    norm = nn.BatchNorm2d if batch_norm else (lambda channels: nn.Identity())
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        norm(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    net.num_features = 12
    return net


def small_encoder(head: str = "mlp", batch_norm: bool = True, dim: int = 8, seed: int = 0):
    """The same encoder twice: with torch's batch norm, and with grouped batch norm."""
    torch.manual_seed(seed)
    plain = Encoder(small_backbone(batch_norm), build_head(head, 12, None, dim))
    torch.manual_seed(seed)
    grouped = Encoder(small_backbone(batch_norm), build_head(head, 12, None, dim))
    return plain, use_groups(grouped, 4)
