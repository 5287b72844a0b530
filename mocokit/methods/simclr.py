"""End-to-end contrast: keys and negatives from the batch itself, with gradients through both views.

SimCLR (arXiv 2002.05709), and the end-to-end mechanism that MoCo compares itself with (arXiv
1911.05722, figure 2a; arXiv 2003.04297, Table 3).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mocokit.methods.losses import LOSSES, Contrast, Loss
from mocokit.methods.method import (
    Context,
    KeyGroups,
    Method,
    NoLeak,
    Output,
    Step,
    ViewRole,
    Views,
)
from mocokit.methods.pieces import (
    Encoding,
    GroupPlan,
    keys_regrouped,
    loss_in_pieces,
    shuffled_rows,
)
from mocokit.methods.processes import gather, gather_with_gradient
from mocokit.methods.similarity import Negatives
from mocokit.nets.heads import Encoder
from mocokit.settings.methods import SimCLRSettings
from mocokit.transfer import to_device


class SimCLR(Method):
    """One encoder for both views. No queue: an image's negatives are the others of its batch.

    `symmetric`: each of the 2N views is a query, against its partner and the 2(N - 1) others
    (SimCLR); otherwise first views are queries and second views keys, against the N - 1 others
    (MoCo v1's end-to-end). `whole` normalises all 2N views together, over all processes, as SimCLR
    does; otherwise batch norm has groups, the second views are shuffled over them, and
    `micro_batch` does a step in pieces of whole groups, so that its memory does not grow with the
    batch.
    """

    settings = SimCLRSettings
    views = (ViewRole("first"), ViewRole("second"))

    def __init__(
        self,
        encoder: Encoder,
        *,
        loss: Loss,
        count_groups: Callable[[int], int],
        batch_size: int,
        whole: bool = False,
        shuffle: bool = True,
        symmetric: bool = True,
        micro_batch: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss, self.count_groups, self.batch_size = loss, count_groups, batch_size
        self.whole, self.shuffle, self.symmetric = whole, shuffle, symmetric
        self.micro_batch, self.chunk = micro_batch, chunk

    @classmethod
    def build(cls, settings: SimCLRSettings, context: Context) -> Self:
        return cls(
            context.encoder,
            loss=LOSSES[settings.loss](settings.temperature),
            count_groups=context.count_groups,
            batch_size=context.batch_size,
            whole=settings.batch_norm == "whole",
            shuffle=settings.shuffle,
            symmetric=settings.symmetric,
            micro_batch=context.micro_batch,
            chunk=settings.chunk,
        )

    def forward(self, views: Sequence[Views], index: Tensor, step: Step) -> Output:
        plan = GroupPlan(step.images, self.count_groups(step.images), self.micro_batch, self.whole)
        order = plan.key_permutation(step, self.shuffle)
        contrast = Contrast(self.loss, plan, queries=2 if self.symmetric else 1)
        first, second = (lambda rows: views[0][rows]), shuffled_rows(views[1], order, plan)
        here = plan.rows.stop - plan.rows.start
        encoding = Encoding([self.encoder], lambda rows: _both(first, second, here, rows))
        loss = loss_in_pieces(
            encoding,
            plan.pieces(views=2),
            lambda vectors, _: self.contrast(vectors, index, np.argsort(order), contrast),
            self.trained(),
            in_one_piece=plan.in_one_piece(views=2),
            whole_batch_loss=True,
            scale=step.loss_scale,
        )
        return Output(loss, contrast.metrics())

    def contrast(
        self, vectors: Tensor, query_images: Tensor, back: np.ndarray, contrast: Contrast
    ) -> Tensor:
        """The loss of this process's vectors: n first views in order, n second ones shuffled.

        query_images (n,) numbers the images. An image that comes twice, as a substitute may, is no
        negative of itself.
        """
        plan = contrast.plan
        a, shuffled = vectors.chunk(2)
        all_b = gather_with_gradient(shuffled, plan.counts)[to_device(back, vectors.device)]
        b = all_b[plan.rows]
        images = gather(query_images, plan.counts)
        if not self.symmetric:
            return contrast(a, b, Negatives(all_b, images, self.chunk), query_images)
        everything = torch.cat([gather_with_gradient(a, plan.counts), all_b])  # (2B, C)
        negatives = Negatives(everything, images.repeat(2), self.chunk)
        return contrast(torch.cat([a, b]), torch.cat([b, a]), negatives, query_images.repeat(2))

    def update(self, keep: None, step: int, progress: float) -> None:
        """Nothing follows: there is one encoder and no memory."""

    @property
    def leak(self) -> KeyGroups | NoLeak:
        if self.whole:
            return NoLeak("one batch norm spans the batch, and all negatives come from that batch")
        return KeyGroups()

    def regrouped(self) -> AbstractContextManager[None]:
        return keys_regrouped(self)

    @property
    def negatives(self) -> int:
        """How many negatives a query of a full batch has."""
        return (self.batch_size - 1) * (2 if self.symmetric else 1)

    @property
    def chance_loss(self) -> float:
        return self.loss.by_chance(self.negatives)

    @property
    def expectation(self) -> str:
        return (
            f"the loss starts near {self.chance_loss:.2f}, the level of chance among "
            f"{self.negatives} negatives, and falls from the first steps on."
        )


def _both(
    first: Callable[[slice], Tensor], second: Callable[[slice], Tensor], images: int, rows: slice
) -> Tensor:
    """Rows of two views of `images` images as if they were one batch, first views first."""
    parts = []
    if rows.start < images:
        parts.append(first(slice(rows.start, min(rows.stop, images))))
    if rows.stop > images:
        parts.append(second(slice(max(rows.start - images, 0), rows.stop - images)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
