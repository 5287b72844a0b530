"""Health without labels, of an encoder as it stands: measured, not judged (verdict.py judges).

How features lie in their space: rank, alignment, uniformity, deviation. RankMe is arXiv 2210.02885,
comparable only within one method; alignment and uniformity are arXiv 2005.10242.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocokit import chance
from mocokit.chance import Slot
from mocokit.data.source import Source
from mocokit.nets.heads import Encoder
from mocokit.nets.modes import evaluating
from mocokit.protocols.features import compute_features, evaluation_batches
from mocokit.views.params import ViewSpec

ALIGNED = 512  # images whose views are compared, at most
DEAD = 1e-4  # a dimension is dead if it deviates by less than this share of the liveliest one
_EPSILON = 1e-7  # RankMe's


class HealthMonitor:
    """Measures the geometry of features on some images of the training set, drawn from chance."""

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        device: torch.device,
        *,
        images: int,
        seed: int,
        workers: int = 0,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        drawn = chance.uniform(seed, 0, np.arange(len(source)), 0, Slot.HEALTH)
        self.numbers = np.sort(np.argsort(drawn, kind="stable")[:images])
        self.source, self.spec, self.device = source, spec, device
        self.workers, self.precision = workers, precision

    def run(self, encoder: Encoder, views: Sequence[Tensor]) -> dict[str, float]:
        """By name: ranks of backbone and head, and how the two views of some images lie."""

        total = torch.zeros((), device=self.device)
        square = torch.zeros((), device=self.device)

        precise = next(encoder.parameters()).dtype

        def network(images: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal total, square
            total, square = total + images.sum(0), square + images.square().sum(0)
            return encoder.both(images.to(precise))

        batches = evaluation_batches(
            self.source, self.numbers, self.spec, self.device, self.workers
        )
        with evaluating(encoder), self.precision():
            numbers, tables = compute_features(network, batches)
            first, *others = (encoder(view[:ALIGNED]).float() for view in views[:2])
        if not tables:
            return {}
        backbone, head = tables
        mean = total / len(numbers)
        between = (square / len(numbers) - mean.square()).clamp_min(0).mean().sqrt()
        aligned = {"alignment": alignment(first, others[0])} if others else {}
        return {
            "rankme": rankme(backbone),
            "rankme_of": float(min(backbone.shape)),
            "rankme_head": rankme(head),
            "rankme_head_of": float(min(head.shape)),
            "deviation": deviation(head),
            "dead_dimensions": dead_share(backbone),
            **aligned,
            "uniformity": uniformity(first),
            "image_deviation": float(between),
        }


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
