"""Momentum contrast: MoCo v1 (arXiv 1911.05722) and v2 (arXiv 2003.04297).

The method is the paper's Algorithm 1 with its second half moved to `update`: the loss is computed
from the queue and key encoder as they are, then both follow. That is the same sequence of numbers.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mocokit.chance import Slot
from mocokit.methods.losses import contrast_logits
from mocokit.methods.method import Draw, Method, Output, as_float
from mocokit.methods.parts import (
    Queue,
    follow,
    gather,
    rank_and_world,
    sum_of_pieces,
    to_device,
)
from mocokit.nets.batchnorm import group_sizes, moving_once, set_groups, share_of_groups
from mocokit.nets.heads import Encoder


class MoCo(Method):
    """A query encoder, a slowly following key encoder, and a queue of its past keys as negatives.

    `count_groups` tells into how many batch-norm groups a global batch is cut; `micro_batch` does a
    step in pieces of whole groups; `symmetric` lets each view be query once and key once, against
    the same queue, and adds the two losses as the authors' CIFAR notebook does.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        dim: int,
        queue_size: int,
        temperature: float,
        momentum: float,
        count_groups: Callable[[int], int],
        shuffle: bool = True,
        symmetric: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = Queue(queue_size, dim)
        self.temperature, self.momentum = temperature, momentum
        self.count_groups, self.micro_batch = count_groups, micro_batch
        self.shuffle, self.symmetric = shuffle, symmetric

    def forward(self, views: tuple[Tensor, Tensor], index: Tensor, draw: Draw) -> Output:
        plan = GroupPlan(draw.images, self.count_groups(draw.images), self.micro_batch)
        a, b = views
        turns = [(a, b), (b, a)] if self.symmetric else [(a, b)]
        all_keys = self.keys([key_view for _, key_view in turns], plan, draw)  # each (B, C)
        metrics: dict[str, list[Tensor]] = {"contrast_top1": [], "feature_std": []}
        loss = a.new_zeros((), dtype=all_keys[0].dtype)
        for (query_view, _), keys in zip(turns, all_keys, strict=True):
            loss = loss + self.contrast(query_view, keys[plan.own], plan, metrics)
        means = {name: torch.stack(parts).sum() / len(turns) for name, parts in metrics.items()}
        return Output(loss, means, torch.cat(all_keys))

    def update(self, keep: Tensor, step: int, progress: float) -> None:
        follow(self.key_encoder, self.encoder, self.momentum)
        self.queue.enqueue(keep)

    @torch.no_grad()
    def keys(self, key_views: list[Tensor], plan: "GroupPlan", draw: Draw) -> list[Tensor]:
        """Each view's keys (B, C) of the global batch, encoded in shuffled groups, in its order."""
        order = np.arange(plan.images)
        if self.shuffle and plan.groups > 1:
            order = np.argsort(draw(Slot.KEY_SHUFFLE, plan.images), kind="stable")
        mine = to_device(order[plan.own], key_views[0].device)
        back = to_device(np.argsort(order), key_views[0].device)
        keys = []
        for view in key_views:
            shuffled = gather(view, plan.counts)[mine] if plan.moves(order) else view
            with moving_once(self.key_encoder, len(plan.pieces)) as statistics:
                parts = []
                for piece, groups in plan.pieces:
                    set_groups(self.key_encoder, groups)
                    parts.append(normalise(self.key_encoder(shuffled[piece])))  # (n, C)
                    statistics.part(groups)
            keys.append(gather(torch.cat(parts), plan.counts)[back])
        return keys

    def contrast(
        self, query_view: Tensor, key: Tensor, plan: "GroupPlan", metrics: dict[str, list[Tensor]]
    ) -> Tensor:
        """InfoNCE of this process's queries against their keys (n, C) and the queue."""
        with moving_once(self.encoder, len(plan.pieces)) as statistics:

            def loss_of(part: tuple[slice, int]) -> Tensor:
                piece, groups = part
                set_groups(self.encoder, groups)
                query = normalise(self.encoder(query_view[piece]))  # (n, C)
                statistics.part(groups)
                logits = contrast_logits(query, key[piece], self.queue.rows, self.temperature)
                share = len(query) / len(key)
                top1 = (logits.argmax(1) == 0).to(logits.dtype).mean()
                metrics["contrast_top1"].append(top1.detach() * share)
                metrics["feature_std"].append(spread(query) * share)
                labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
                # Times the world, because DDP takes the mean over processes of unequal shares.
                weight = plan.world / plan.images
                return F.cross_entropy(logits, labels, reduction="sum") * weight

            parameters = self.encoder.parameters()
            return sum_of_pieces(loss_of, plan.pieces, parameters, self.loss_scale)

    @property
    def chance_loss(self) -> float:
        return math.log(1 + len(self.queue.rows)) * (2 if self.symmetric else 1)

    def health(self) -> dict[str, float]:
        return {
            "queue_filled": float(self.queue.filled) / len(self.queue.rows),
            "key_momentum": self.momentum,
        }


class GroupPlan:
    """Which images of a global batch this process holds, in how many groups and pieces."""

    def __init__(self, images: int, groups: int, micro_batch: int | None) -> None:
        rank, self.world = rank_and_world()
        self.images, self.groups = images, groups
        sizes = group_sizes(images, groups)
        shares = [share_of_groups(groups, r, self.world) for r in range(self.world)]
        self.counts = [sum(sizes[share]) for share in shares]  # images of each process
        start = sum(self.counts[:rank])
        self.own = slice(start, start + self.counts[rank])
        self.pieces = _pieces(sizes[shares[rank]], micro_batch)

    def moves(self, order: np.ndarray) -> bool:
        return not bool((order == np.arange(self.images)).all())


def _pieces(sizes: list[int], micro_batch: int | None) -> list[tuple[slice, int]]:
    """Runs of whole groups of at most `micro_batch` images, or of one group: (images, groups)."""
    if micro_batch is None:
        return [(slice(0, sum(sizes)), len(sizes))]
    pieces, start, held = [], 0, [0, 0]
    for size in sizes:
        if held[1] and held[0] + size > micro_batch:
            pieces.append((slice(start, start + held[0]), held[1]))
            start, held = start + held[0], [0, 0]
        held = [held[0] + size, held[1] + 1]
    return [*pieces, (slice(start, start + held[0]), held[1])]


def normalise(projections: Tensor) -> Tensor:
    """Unit vectors (N, C), in float32 outside autocast."""
    with torch.autocast(projections.device.type, enabled=False):
        return F.normalize(as_float(projections), dim=1)


def spread(query: Tensor) -> Tensor:
    """Deviation of unit vectors over the batch: 1 where they fill the sphere, 0 where collapsed."""
    query = query.detach()
    deviation: Tensor = query.std(0, correction=0).mean() * math.sqrt(query.shape[1])
    return deviation
