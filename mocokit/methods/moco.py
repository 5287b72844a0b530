"""Momentum contrast: MoCo v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297).

The method is the paper's Algorithm 1 with its second half moved to `update`: the loss is computed
from the queue and key encoder as they are, then both follow. That is the same sequence of numbers.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocokit.chance import Slot
from mocokit.methods.contrast import Contrast
from mocokit.methods.gradients import loss_in_pieces
from mocokit.methods.losses import Loss
from mocokit.methods.method import Draw, Method, Output, Views
from mocokit.methods.parts import Queue, follow
from mocokit.methods.pieces import Encoding, GroupPlan, taken
from mocokit.methods.processes import gather
from mocokit.methods.similarity import Negatives
from mocokit.nets.heads import Encoder
from mocokit.transfer import to_device


class MoCo(Method):
    """A query encoder, a slowly following key encoder, and a queue of its past keys as negatives.

    `count_groups` tells into how many batch-norm groups a global batch is cut, `whole` that it is
    not cut; `micro_batch` does a step in pieces of whole groups. `symmetric` lets each view be
    query once and key once, against the same queue, and adds the two losses, as the authors' CIFAR
    notebook does; `enqueue` then says whether the keys of both views join the queue or those of one
    of them, drawn at random. `predictor` comes after the query's head alone, and
    `momentum_to_one` lets the key momentum rise to 1 by a cosine over the run (MoCo v2+).
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        loss: Loss,
        dim: int,
        queue_size: int,
        momentum: float,
        count_groups: Callable[[int], int],
        predictor: nn.Module | None = None,
        momentum_to_one: bool = False,
        whole: bool = False,
        shuffle: bool = True,
        symmetric: bool = False,
        enqueue: Literal["both", "one"] = "both",
        micro_batch: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = nn.Identity() if predictor is None else predictor
        self.queue = Queue(queue_size, dim)
        self.loss, self.momentum, self.momentum_to_one = loss, momentum, momentum_to_one
        self.count_groups, self.whole, self.micro_batch = count_groups, whole, micro_batch
        self.shuffle, self.symmetric, self.enqueue, self.chunk = shuffle, symmetric, enqueue, chunk
        self._current_momentum = momentum

    def forward(self, views: Sequence[Views], index: Tensor, draw: Draw) -> Output:
        plan = GroupPlan(draw.images, self.count_groups(draw.images), self.micro_batch, self.whole)
        turns = [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]
        order = plan.key_permutation(draw, self.shuffle)
        keys = [self.keys(views[key], plan, order) for _, key in turns]  # each (B, C)
        contrast = Contrast(self.loss, plan)
        losses = [
            self.contrast(views[query], key[plan.own], plan, contrast)
            for (query, _), key in zip(turns, keys, strict=True)
        ]
        loss = torch.stack(losses).sum()
        return Output(loss, contrast.metrics(), self.to_enqueue(keys, draw))

    def update(self, keep: Tensor, step: int, progress: float) -> None:
        self._current_momentum = self.momentum_at(progress)
        follow(self.key_encoder, self.encoder, self._current_momentum)
        self.queue.enqueue(keep)

    @torch.no_grad()
    def keys(self, view: Views, plan: GroupPlan, order: NDArray[np.int64]) -> Tensor:
        """Keys (B, C) of the global batch, encoded in shuffled groups, in the batch's order."""
        encoding = Encoding([self.key_encoder], taken(view, order, plan))
        keys = gather(encoding.all(plan.pieces()), plan.counts)
        return keys[to_device(np.argsort(order), keys.device)]

    def contrast(self, view: Views, key: Tensor, plan: GroupPlan, contrast: Contrast) -> Tensor:
        """The loss of this process's queries against their keys (n, C) and the queue."""
        negatives = Negatives(self.queue.rows, chunk=self.chunk)

        def loss_of(query: Tensor, rows: slice) -> Tensor:
            return contrast(query, key[rows], negatives)

        encoding = Encoding([self.encoder, self.predictor], lambda rows: view[rows])
        return loss_in_pieces(
            encoding,
            plan.pieces(),
            loss_of,
            self.trained(),
            undivided=plan.undivided(),
            together=self.loss.coupled,
            scale=self.loss_scale,
        )

    def to_enqueue(self, keys: list[Tensor], draw: Draw) -> Tensor:
        """The keys that join the queue after this step."""
        if self.enqueue == "one":
            return keys[int(draw(Slot.ENQUEUE, 1)[0] * len(keys))]
        return torch.cat(keys)

    def momentum_at(self, progress: float) -> float:
        """The key momentum of an update; progress in [0, 1]."""
        if not self.momentum_to_one:
            return self.momentum
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2

    def encoder_replaced(self) -> None:
        follow(self.key_encoder, self.encoder, 0.0)

    def health(self) -> dict[str, float]:
        return {
            "queue_filled": float(self.queue.filled) / len(self.queue.rows),
            "key_momentum": self._current_momentum,
        }

    @property
    def chance_loss(self) -> float:
        return self.loss.by_chance(len(self.queue.rows)) * (2 if self.symmetric else 1)

    @property
    def expectation(self) -> str:
        return (
            "the queue starts with random vectors, so the first losses may be low and contrast "
            "near 100 %; as keys fill the queue, the loss rises towards "
            f"{self.chance_loss:.2f}, the level of chance, and falls later. That is healthy."
        )
