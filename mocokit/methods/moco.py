"""Momentum contrast: MoCo v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297).

The algorithm, for a batch of N images and a queue of K keys, both of C dimensions:

    q = normalise(encoder(query_view))                              # (N, C)
    with no_grad(): k = normalise(key_encoder(key_view))            # (N, C)
    logits = cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1)    # (N, 1 + K)
    loss = cross_entropy(logits / temperature, zeros(N))            # InfoNCE, equation 1
    loss.backward(); optimizer.step()
    key_weights = m * key_weights + (1 - m) * weights               # equation 2
    queue = cat([queue, k])[N:]                                     # the oldest keys leave

`forward` is the first four lines, `update` the last two; the loop (train.py) has the one between
them. The authors' code moves the key weights before it encodes keys: that is the same sequence of
numbers, begun half a step earlier. What each line became, and where to read on:

    q, k       `keys` and `query_loss` below; pieces.py has shuffled batch norm (section 3.3 of v1),
               so that a query and its key seldom share statistics, and steps in pieces
    logits     similarity.py: never as one table, so that a queue may be read a chunk at a time
    loss       losses.py: InfoNCE and its relatives
    weights    parts.py: the exponential moving average; the momentum m in effect is
               method.momentum ** (batch / momentum_batch), the same horizon at any batch size
    queue      parts.py
    processes  processes.py: one batch on several processes
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocokit.chance import Slot
from mocokit.methods.losses import LOSSES, Contrast, Loss
from mocokit.methods.method import Context, KeyGroups, Method, NoLeak, Output, Step, Views
from mocokit.methods.parts import Queue, follow
from mocokit.methods.pieces import (
    Encoding,
    GroupPlan,
    keys_regrouped,
    loss_in_pieces,
    shuffled_rows,
)
from mocokit.methods.processes import gather, rank_and_world
from mocokit.methods.similarity import Negatives
from mocokit.nets.heads import Encoder
from mocokit.settings.methods import MoCoSettings
from mocokit.transfer import to_device


class MoCo(Method):
    """A query encoder, a key encoder that is its moving average, and a queue of past keys.

    `count_groups` gives the number of batch-norm groups of a global batch. With `whole` the batch
    is one group over all processes. `micro_batch` does a step in pieces of whole groups. With
    `symmetric` each view is query once and key once, against the same queue, and the two losses are
    added, as in the authors' CIFAR notebook. `enqueue` then says whether the keys of both views
    join the queue, or those of one view, drawn at random. `predictor` comes after the query's
    head alone. With `momentum_to_one` the key momentum rises to 1 by a cosine over the run, as in
    MoCo v2+.
    """

    settings = MoCoSettings

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
        keys_per_image = 2 if symmetric and enqueue == "both" else 1
        self.queue = Queue(queue_size, dim, keys_per_image)
        self.loss, self.momentum, self.momentum_to_one = loss, momentum, momentum_to_one
        self.count_groups, self.whole, self.micro_batch = count_groups, whole, micro_batch
        self.shuffle, self.symmetric, self.enqueue, self.chunk = shuffle, symmetric, enqueue, chunk
        self._current_momentum = momentum

    @classmethod
    def build(cls, settings: MoCoSettings, context: Context) -> Self:
        momentum = settings.key_momentum(context.batch_size)
        assert momentum is not None
        return cls(
            context.encoder,
            loss=LOSSES[settings.loss](settings.temperature),
            dim=context.dim,
            queue_size=settings.queue_size,
            momentum=momentum,
            count_groups=context.count_groups,
            predictor=context.predictor(),
            momentum_to_one=settings.momentum_schedule == "cosine",
            whole=settings.batch_norm == "whole",
            shuffle=settings.shuffle,
            symmetric=settings.symmetric,
            enqueue=settings.enqueue,
            micro_batch=context.micro_batch,
            chunk=settings.chunk,
        )

    def forward(self, views: Sequence[Views], index: Tensor, step: Step) -> Output:
        plan = GroupPlan(step.images, self.count_groups(step.images), self.micro_batch, self.whole)
        pairs = [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]  # views of query and of key
        order = plan.key_permutation(step, self.shuffle)
        keys = [self.keys(views[second], plan, order) for _, second in pairs]  # each (B, C)
        contrast = Contrast(self.loss, plan)
        losses = [
            self.query_loss(views[first], key[plan.rows], plan, contrast, step.loss_scale)
            for (first, _), key in zip(pairs, keys, strict=True)
        ]
        loss = torch.stack(losses).sum()
        return Output(loss, contrast.metrics(), self.to_enqueue(keys, step))

    def update(self, keep: Tensor, step: int, progress: float) -> None:
        self._current_momentum = self.momentum_at(progress)
        follow(self.key_encoder, self.encoder, self._current_momentum)
        self.queue.enqueue(keep)

    @torch.no_grad()
    def keys(self, view: Views, plan: GroupPlan, order: NDArray[np.int64]) -> Tensor:
        """Keys (B, C) of the global batch, encoded in shuffled groups, in the batch's order."""
        encoding = Encoding([self.key_encoder], shuffled_rows(view, order, plan))
        keys = gather(encoding.encode_all(plan.pieces()), plan.counts)
        # argsort of a permutation is its inverse.
        return keys[to_device(np.argsort(order), keys.device)]

    def query_loss(
        self, view: Views, key: Tensor, plan: GroupPlan, contrast: Contrast, loss_scale: float
    ) -> Tensor:
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
            in_one_piece=plan.in_one_piece(),
            whole_batch_loss=self.loss.coupled,
            scale=loss_scale,
        )

    def to_enqueue(self, keys: list[Tensor], step: Step) -> Tensor:
        """The keys that join the queue after this step."""
        if self.enqueue == "one":
            return keys[int(step.draw(Slot.ENQUEUE, 1)[0] * len(keys))]
        return torch.cat(keys)

    def momentum_at(self, progress: float) -> float:
        """The key momentum of an update; progress in [0, 1]."""
        if not self.momentum_to_one:
            return self.momentum
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2

    def encoder_replaced(self) -> None:
        follow(self.key_encoder, self.encoder, 0.0)

    @property
    def leak(self) -> KeyGroups | NoLeak:
        if self.whole and rank_and_world()[1] > 1:
            # A process's share need not be whole groups, and its layers wait for the others.
            return NoLeak("one batch norm spans several processes")
        return KeyGroups()

    def regrouped(self) -> AbstractContextManager[None]:
        return keys_regrouped(self)

    @property
    def queues(self) -> Mapping[str, Queue]:
        return {"queue": self.queue}

    def health(self) -> dict[str, float]:
        return {"key_momentum": self._current_momentum}

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
