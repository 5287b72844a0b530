"""The contrastive losses: functions of a query's positive similarity and of its negatives' sums.

Any of them can be used with any mechanism (method.loss). Each is written for all queries of a
step and is their mean; in float32 outside autocast.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mocokit.methods.pieces import GroupPlan
from mocokit.methods.processes import gather_with_gradient
from mocokit.methods.similarity import Negatives


@dataclass(frozen=True)
class Loss(ABC):
    """A loss at a temperature; with `coupled`, one query's part depends on the other queries."""

    temperature: float
    coupled: ClassVar[bool] = False

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures at which it wants the negatives' log-sum-exps."""
        return (self.temperature,)

    @abstractmethod
    def __call__(self, positive: Tensor, log_sums: Sequence[Tensor], count: Tensor) -> Tensor:
        """Mean over queries: similarity to the positive (n,), one log-sum-exp over the negatives
        (n,) for each of `temperatures`, number of negatives (n,)."""

    def by_chance(self, negatives: int) -> float:
        """The loss of an encoder that maps every image to the same point.

        Any common similarity gives the same value; 0 is taken.
        """
        level = torch.zeros(1, dtype=torch.float64)
        sums = [level + math.log(negatives)] * len(self.temperatures)
        return float(self(level, sums, level + negatives))


class InfoNCE(Loss):
    """-log of the positive's share among all: MoCo v1 (arXiv 1911.05722), eq. 1.

    With the 2(N - 1) other views of a batch as negatives it is SimCLR's NT-Xent (arXiv 2002.05709,
    eq. 1).
    """

    def __call__(self, positive: Tensor, log_sums: Sequence[Tensor], count: Tensor) -> Tensor:
        positive = positive / self.temperature
        return (torch.logaddexp(positive, log_sums[0]) - positive).mean()


class DCL(Loss):
    """Decoupled contrastive learning: the positive is left out of the sum (arXiv 2110.06848)."""

    def __call__(self, positive: Tensor, log_sums: Sequence[Tensor], count: Tensor) -> Tensor:
        return (log_sums[0] - positive / self.temperature).mean()


class DCLW(Loss):
    """DCL with positives weighted by the negative von Mises-Fisher weights of mean 1.

    w = 2 - softmax over the batch of positive / sigma, times its size: a positive that is already
    near counts less (arXiv 2110.06848, section 3.3). Gradients pass through the weights.
    """

    coupled = True
    SIGMA: ClassVar[float] = 0.5

    def __call__(self, positive: Tensor, log_sums: Sequence[Tensor], count: Tensor) -> Tensor:
        weight = 2 - len(positive) * (positive / self.SIGMA).softmax(0)
        return (log_sums[0] - weight * positive / self.temperature).mean()


class AlignUniform(Loss):
    """3 x alignment + uniformity at t = 3, which replace InfoNCE (arXiv 2005.10242).

    Alignment is the mean squared distance to the positive, uniformity the log of the mean of
    exp(-t squared distance) over all pairs of a query and a negative. Has no temperature.
    """

    coupled = True
    WEIGHT: ClassVar[float] = 3.0
    T: ClassVar[float] = 3.0

    @property
    def temperatures(self) -> tuple[float, ...]:
        # exp(-t (2 - 2 s)) = exp(s / (1 / 2t)) / exp(2t)
        return (1 / (2 * self.T),)

    def __call__(self, positive: Tensor, log_sums: Sequence[Tensor], count: Tensor) -> Tensor:
        alignment = (2 - 2 * positive).mean()
        uniformity = log_sums[0].logsumexp(0) - 2 * self.T - count.sum().log()
        return self.WEIGHT * alignment + uniformity


class DualTemperature(Loss):
    """InfoNCE weighted by how hard a query is at ten times the temperature (arXiv 2203.17248).

    The weight (1 - p_inter) / (1 - p_intra), without gradient, takes out of the gradient what the
    low temperature does between queries; it needs few negatives.
    """

    RATIO: ClassVar[float] = 10.0

    @property
    def temperatures(self) -> tuple[float, ...]:
        return (self.temperature, self.RATIO * self.temperature)

    def __call__(self, positive: Tensor, log_sums: Sequence[Tensor], count: Tensor) -> Tensor:
        totals = [
            torch.logaddexp(positive / t, log_sum)
            for t, log_sum in zip(self.temperatures, log_sums, strict=True)
        ]
        # log (1 - p) is the negatives' share of the total: exact where p is nearly 1.
        intra, inter = (s - total for s, total in zip(log_sums, totals, strict=True))
        weight = (inter - intra).exp().detach()
        return (weight * (totals[0] - positive / self.temperature)).mean()


LOSSES: dict[str, type[Loss]] = {
    "info_nce": InfoNCE,
    "dcl": DCL,
    "dclw": DCLW,
    "align_uniform": AlignUniform,
    "dual_temperature": DualTemperature,
}


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE: cross-entropy of telling each query's key from the negatives, mean over queries.

    query (N, C), key (N, C), negatives (K, C), all unit vectors. MoCo v1 (arXiv 1911.05722), eq. 1.
    """
    compared = Negatives(negatives).compare(query, [temperature])
    return InfoNCE(temperature)(dots(query, key), compared.log_sums, compared.number)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent: each of 2N views against its partner and the 2(N-1) others, mean over views.

    a (N, C), b (N, C), unit vectors of the two views. SimCLR (arXiv 2002.05709), eq. 1.
    """
    views = torch.cat([a, b])  # (2N, C)
    images = torch.arange(len(a), device=a.device).repeat(2)
    compared = Negatives(views, images).compare(views, [temperature], images)
    positive = dots(views, torch.cat([b, a]))
    return InfoNCE(temperature)(positive, compared.log_sums, compared.number)


def nce(
    positive: Tensor, negatives: Tensor, images: int, temperature: float, constant: Tensor
) -> Tensor:
    """Noise-contrastive estimation of InstDisc (arXiv 1805.01978, eq. 7), mean over images.

    Each image's similarity to its own entry of the bank (n,) and to m entries drawn from all
    `images` (n, m); probabilities are exp(similarity / temperature) / constant, noise is uniform.
    """
    noise = negatives.shape[1] / images
    of_own, of_drawn = ((s / temperature).exp() / constant for s in (positive, negatives))
    log_own = torch.log(of_own / (of_own + noise))
    log_noise = torch.log(noise / (of_drawn + noise)).sum(1)
    return -(log_own + log_noise).mean()


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows (n, C) and rows (n, C): (n,), outside autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return (a * b).sum(1)


class Contrast:
    """Compares the queries of a step, all at once or piece by piece, and keeps their metrics.

    `queries` of each image. A loss is this process's share: its mean over the processes, however
    uneven their shares are, is the mean over all queries of the global batch.
    """

    def __init__(self, loss: Loss, plan: GroupPlan, queries: int = 1) -> None:
        self.loss, self.plan, self.queries = loss, plan, queries
        self._seen = 0.0  # 1 for each direction in which all queries came
        self._top1: list[Tensor] = []
        self._moments: list[Tensor] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Negatives,
        query_images: Tensor | None = None,
    ) -> Tensor:
        """query (n, C) against key (n, C) and negatives; query_images (n,): see Negatives."""
        positive = dots(query, key)
        sums, hardest, number = negatives.compare(query, self.loss.temperatures, query_images)
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
        rows = self.plan.rows
        share = len(query) / (self.queries * (rows.stop - rows.start))
        self._seen += share
        self._top1.append((positive > hardest).to(query.dtype).mean() * share)
        query = query.detach()
        self._moments.append(torch.stack([query.mean(0), query.square().mean(0)]) * share)

    def metrics(self) -> dict[str, Tensor]:
        """How many of this process's queries are nearest to their key, and how far they spread."""
        return {
            "contrast_top1": torch.stack(self._top1).sum() / self._seen,
            "feature_std": self._spread(),
        }

    def _spread(self) -> Tensor:
        """Deviation of unit vectors: 1 where they fill the sphere, 0 where collapsed to a point."""
        mean, square = torch.stack(self._moments).sum(0) / self._seen
        deviation: Tensor = (square - mean.square()).clamp_min(0).sqrt().mean()
        return deviation * math.sqrt(len(mean))
