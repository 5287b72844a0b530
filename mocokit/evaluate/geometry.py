"""How features lie in their space, which needs no labels: rank, alignment, uniformity, deviation.

RankMe is arXiv 2210.02885, comparable only within one method; alignment and uniformity are arXiv
2005.10242.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

DEAD = 1e-4  # a dimension is dead if it deviates by less than this share of the liveliest one
_EPSILON = 1e-7  # RankMe's


def rankme(features: Tensor) -> float:
    """Effective rank of features (N, D): exp of the entropy of their singular values' shares."""
    matrix = features.detach().cpu().double()
    if not bool(matrix.isfinite().all()):
        return math.nan
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total + _EPSILON
    return float((-(share * share.log()).sum()).exp())


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the unit vectors of two views (N, C) each: 0 is perfect."""
    a, b = (F.normalize(view.detach().float(), dim=1) for view in (first, second))
    return float((a - b).square().sum(1).mean())


def uniformity(features: Tensor, sharpness: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over pairs of unit vectors (N, C): 0 is one point.

    On the sphere of many dimensions it goes down to about -2 t.
    """
    unit = F.normalize(features.detach().float(), dim=1)
    distance = (2 - 2 * unit @ unit.T).clamp_min(0)
    inside = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    return float((-sharpness * distance[inside]).exp().mean().log())


def deviation(features: Tensor) -> float:
    """Deviation of unit vectors over images: 1 where they fill the sphere, 0 where one point."""
    unit = F.normalize(features.detach().float(), dim=1)
    return float(unit.std(0, correction=0).mean() * math.sqrt(unit.shape[1]))


def dead_share(features: Tensor) -> float:
    """Share of dimensions that say the same of every image."""
    std = features.detach().float().std(0, correction=0)
    return float((std <= DEAD * std.max()).float().mean())


def positives_in_queue(images: int, queue: int, views: int = 1) -> float:
    """Expected share of queries whose own older key is still among the negatives.

    An image comes once an epoch, at a random place; `queue` keys are the last queue / views images.
    """
    reach = queue / views / images  # in epochs; two visits lie 0 to 2 epochs apart, 1 on average
    if reach <= 1:
        return reach**2 / 2
    return 1 - max(0.0, 2 - reach) ** 2 / 2
