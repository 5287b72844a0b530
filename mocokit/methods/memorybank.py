"""The memory bank: keys are vectors stored for every image when it was last seen.

InstDisc (arXiv 1805.01978), and the improved bank that MoCo compares itself with (arXiv
1911.05722, figure 2b).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from mocokit.chance import Slot
from mocokit.methods.losses import LOSSES, Contrast, InfoNCE, Loss, dots, nce
from mocokit.methods.method import Context, Method, NoLeak, Output, Step, ViewRole, Views
from mocokit.methods.parts import Bank
from mocokit.methods.pieces import Encoding, GroupPlan, loss_in_pieces
from mocokit.methods.processes import gather, sum_over_processes
from mocokit.methods.similarity import Negatives
from mocokit.nets.heads import Encoder
from mocokit.settings.methods import MemoryBankSettings
from mocokit.transfer import to_device

# Of queries (n, C) and the numbers of their images (n,): the loss, and NCE's constant.
Compare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Seen(NamedTuple):
    """What the bank takes in after a step, of the whole batch."""

    vectors: Tensor  # (B, C)
    images: Tensor  # (B,) their numbers
    constant: Tensor  # of NCE; in effect from the first step on


class MemoryBank(Method):
    """One view, one encoder: a query's key is its image's own entry of a bank of N vectors.

    With `noise` the loss is InstDisc's NCE: for each image `negatives` entries drawn with
    replacement, which may hold its own. Otherwise `loss` compares with `negatives` entries drawn
    for the whole batch, or with all of the bank (None); an image's own entry is left out. Entries
    move by `momentum` towards what was computed, after the scores.
    """

    settings = MemoryBankSettings
    views = (ViewRole("query"),)
    leak = NoLeak("a key is an entry of the bank, computed an epoch ago among other images")
    constant: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        loss: Loss,
        images: int,
        dim: int,
        negatives: int | None,
        momentum: float,
        count_groups: Callable[[int], int],
        noise: bool = False,
        whole: bool = False,
        micro_batch: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.bank = Bank(images, dim)
        self.register_buffer("constant", torch.zeros(()))  # 0: not yet estimated
        self.loss, self.noise, self.negatives, self.momentum = loss, noise, negatives, momentum
        self.count_groups, self.whole = count_groups, whole
        self.micro_batch, self.chunk = micro_batch, chunk

    @classmethod
    def build(cls, settings: MemoryBankSettings, context: Context) -> Self:
        return cls(
            context.encoder,
            # InfoNCE only holds NCE's temperature: the formula is `nce`.
            loss=(InfoNCE if settings.loss == "nce" else LOSSES[settings.loss])(
                settings.temperature
            ),
            images=context.images,
            dim=context.dim,
            negatives=settings.bank_negatives,
            momentum=settings.bank_momentum,
            count_groups=context.count_groups,
            noise=settings.loss == "nce",
            whole=settings.batch_norm == "whole",
            micro_batch=context.micro_batch,
            chunk=settings.chunk,
        )

    def forward(self, views: Sequence[Views], index: Tensor, step: Step) -> Output:
        (view,) = views
        plan = GroupPlan(step.images, self.count_groups(step.images), self.micro_batch, self.whole)
        contrast = Contrast(self.loss, plan)
        compare = (self._against_noise if self.noise else self._against_bank)(step, contrast)
        vectors, constants = [], []

        def loss_of(query: Tensor, rows: slice) -> Tensor:
            loss, constant = compare(query, index[rows])
            vectors.append(query.detach())
            constants.append(constant)
            return loss

        loss = loss_in_pieces(
            Encoding([self.encoder], lambda rows: view[rows]),
            plan.pieces(),
            loss_of,
            self.trained(),
            in_one_piece=plan.in_one_piece(),
            # NCE's constant is estimated from all scores of the first batch.
            whole_batch_loss=self.loss.coupled or self.noise,
            scale=step.loss_scale,
        )
        here = torch.cat(vectors)
        seen = Seen(gather(here, plan.counts), gather(index, plan.counts), constants[-1])
        return Output(loss, contrast.metrics(), seen)

    def update(self, keep: Seen, step: int, progress: float) -> None:
        self.bank.blend(keep.images, keep.vectors, self.momentum)
        self.constant.copy_(keep.constant)

    def _against_bank(self, step: Step, contrast: Contrast) -> Compare:
        """The loss of queries against the bank as it is, or against a part that is drawn."""
        rows = self.bank.rows
        if self.negatives is None:
            row_images = torch.arange(len(rows), device=rows.device)
            negatives = Negatives(rows, row_images, self.chunk)
        else:
            row_images = self._draw(step, self.negatives, rows.device)
            negatives = Negatives(rows[row_images], row_images, self.chunk)
        return lambda query, images: (
            contrast(query, rows[images], negatives, images),
            self.constant,
        )

    def _against_noise(self, step: Step, contrast: Contrast) -> Compare:
        """InstDisc's NCE of all of this process's queries, and its constant."""
        rows, size, plan = self.bank.rows, len(self.bank.rows), contrast.plan
        count = self.negatives or size
        drawn = self._draw(step, plan.images * count, rows.device).view(plan.images, count)

        def compare(query: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(query.device.type, enabled=False):
                noise = torch.bmm(rows[drawn[plan.rows]], query[:, :, None])[:, :, 0]  # (n, m)
            positive = dots(query, rows[images])
            contrast.record(query, positive, noise.detach().amax(1))
            constant = self._constant(positive, noise, plan)
            weight = len(query) * plan.world / plan.images
            loss = nce(positive, noise, size, self.loss.temperature, constant) * weight
            return loss, constant

        return compare

    def _draw(self, step: Step, count: int, device: torch.device) -> Tensor:
        """Numbers of `count` images of the data, with replacement."""
        numbers = (step.draw(Slot.BANK_NEGATIVES, count) * len(self.bank.rows)).astype(np.int64)
        return to_device(numbers, device)

    @torch.no_grad()
    def _constant(self, positive: Tensor, noise: Tensor, plan: GroupPlan) -> Tensor:
        """NCE's Z, estimated once from the first batch: N times the mean of exp(s / t)."""
        scores = torch.cat([positive[:, None], noise], 1) / self.loss.temperature
        total = sum_over_processes(scores.exp().sum())
        estimate = total / (plan.images * scores.shape[1]) * len(self.bank.rows)
        return torch.where(self.constant > 0, self.constant, estimate)

    def health(self) -> dict[str, float]:
        return {"bank_seen": min(float(self.bank.seen) / len(self.bank.rows), 1.0)}

    @property
    def chance_loss(self) -> float:
        size = len(self.bank.rows)
        count = self.negatives or size
        if not self.noise:
            return self.loss.by_chance(count if self.negatives else count - 1)
        # All similarities equal: every probability is 1 / N, whatever the constant was.
        level = torch.zeros(1, 1, dtype=torch.float64)
        constant = torch.tensor(float(size), dtype=torch.float64)
        return float(nce(level[0], level.expand(1, count), size, 1.0, constant))

    @property
    def expectation(self) -> str:
        return (
            "the bank starts with random vectors, and an image's own entry is always an epoch "
            f"old: in the first epochs the loss stands above {self.chance_loss:.2f}, the level of "
            "chance, because entries seen lately resemble every query; then it falls. That is "
            "healthy."
        )
