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

from mocokit.methods.similarity import Negatives


@dataclass(frozen=True)
class Loss(ABC):
    """A loss at a temperature. `coupled` says that queries do not enter it one by one."""

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
        """Its value where all vectors are equally alike: nothing is told from anything."""
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
    own = torch.arange(len(a), device=a.device).repeat(2)
    compared = Negatives(views, own).compare(views, [temperature], own)
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
    own, others = ((s / temperature).exp() / constant for s in (positive, negatives))
    log_own = torch.log(own / (own + noise))
    log_noise = torch.log(noise / (others + noise)).sum(1)
    return -(log_own + log_noise).mean()


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows (n, C) and rows (n, C): (n,), outside autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return (a * b).sum(1)
