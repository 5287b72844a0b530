"""Queries against keys and negatives: the loss with its weight, and what is recorded of it."""

import math

import torch
from torch import Tensor

from mocokit.methods.losses import Loss, dots
from mocokit.methods.pieces import GroupPlan
from mocokit.methods.processes import gather_with_gradient
from mocokit.methods.similarity import Negatives


class Contrast:
    """Compares the queries of a step, all at once or piece by piece; `queries` of each image.

    A loss is this process's share: its mean over the processes, however uneven their shares are,
    is the mean over all queries of the global batch.
    """

    def __init__(self, loss: Loss, plan: GroupPlan, queries: int = 1) -> None:
        self.loss, self.plan, self.queries = loss, plan, queries
        self._seen = 0.0  # how often all queries came: once for each direction
        self._top1: list[Tensor] = []
        self._moments: list[Tensor] = []

    def __call__(
        self, query: Tensor, key: Tensor, negatives: Negatives, own: Tensor | None = None
    ) -> Tensor:
        """query (n, C) against key (n, C) and negatives; own (n,): see Negatives.compare."""
        positive = dots(query, key)
        sums, hardest, number = negatives.compare(query, self.loss.temperatures, own)
        self.record(query, positive, hardest)
        if self.loss.coupled:
            counts = [self.queries * count for count in self.plan.counts]
            positive, number, *all_sums = (
                gather_with_gradient(part, counts) for part in (positive, number, *sums)
            )
            return self.loss(positive, all_sums, number)
        weight = len(query) * self.plan.world / (self.queries * self.plan.images)
        return self.loss(positive, sums, number) * weight

    @torch.no_grad()
    def record(self, query: Tensor, positive: Tensor, hardest: Tensor) -> None:
        """Take a piece into the metrics."""
        rank = self.plan.own
        share = len(query) / (self.queries * (rank.stop - rank.start))
        self._seen += share
        self._top1.append((positive > hardest).to(query.dtype).mean() * share)
        query = query.detach()
        self._moments.append(torch.stack([query.mean(0), query.square().mean(0)]) * share)

    def metrics(self) -> dict[str, Tensor]:
        """Of this process's queries: how many are nearest to their key, and how far they spread."""
        return {
            "contrast_top1": torch.stack(self._top1).sum() / self._seen,
            "feature_std": self._spread(),
        }

    def _spread(self) -> Tensor:
        """Deviation of unit vectors: 1 where they fill the sphere, 0 where collapsed to a point."""
        mean, square = torch.stack(self._moments).sum(0) / self._seen
        deviation: Tensor = (square - mean.square()).clamp_min(0).sqrt().mean()
        return deviation * math.sqrt(len(mean))
