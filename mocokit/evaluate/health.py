"""Health without labels, of an encoder as it stands: measured, not judged (verdict.py judges)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from mocokit import chance
from mocokit.chance import Slot
from mocokit.data.source import Source
from mocokit.evaluate.features import compute_features, evaluating, evaluation_batches
from mocokit.evaluate.geometry import alignment, dead_share, deviation, rankme, uniformity
from mocokit.nets.heads import Encoder
from mocokit.views.params import ViewSpec

ALIGNED = 512  # images whose views are compared, at most


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
            features = encoder.backbone(images.to(precise))
            return features, encoder.head(features)

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
