"""Which images of a step a process holds, in which batch-norm groups, encoded piece by piece.

A piece is a run of whole groups, so that pieces compute what the undivided step does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mocokit.chance import Slot
from mocokit.methods.method import Draw, Views, as_float
from mocokit.methods.processes import exchange, rank_and_world
from mocokit.nets.batchnorm import group_sizes, one_statistics_update, set_groups, share_of_groups
from mocokit.transfer import to_device


class Piece(NamedTuple):
    """Some of a process's images, and the sizes of the batch-norm groups that they are cut into."""

    rows: slice
    groups: tuple[int, ...]


class GroupPlan:
    """Which images of a global batch this process holds, in how many groups and pieces.

    `whole` is batch norm over the whole batch: then images are shared one by one, and a process's
    part is a single group and piece.
    """

    def __init__(
        self, images: int, groups: int, micro_batch: int | None, whole: bool = False
    ) -> None:
        rank, self.world = rank_and_world()
        self.images, self.groups, self.whole = images, 1 if whole else groups, whole
        sizes = group_sizes(images, images if whole else groups)
        shares = [share_of_groups(len(sizes), r, self.world) for r in range(self.world)]
        self.counts = [sum(sizes[share]) for share in shares]  # images of each process
        start = sum(self.counts[:rank])
        self.own = slice(start, start + self.counts[rank])
        self._sizes = [[sum(sizes[share])] if whole else sizes[share] for share in shares]
        self._rank, self._micro_batch = rank, micro_batch

    def pieces(self, views: int = 1) -> list[Piece]:
        """Pieces of this process's images, or of several views of them one after another."""
        return self._pieces(self._rank, views)

    def undivided(self, views: int = 1) -> bool:
        """Whether every process does its images in one piece: they must go the same way."""
        return all(len(self._pieces(rank, views)) == 1 for rank in range(self.world))

    def _pieces(self, rank: int, views: int) -> list[Piece]:
        # With `whole` statistics, of all views together.
        own = self._sizes[rank]
        sizes = [sum(own) * views] if self.whole else own * views
        return _cut(sizes, self._micro_batch or sum(sizes))

    def key_permutation(self, draw: Draw, shuffle: bool) -> NDArray[np.int64]:
        """The order (B,) in which key images are cut into groups: position i holds order[i].

        Shuffled, so that a query and its key seldom share statistics (MoCo v1, section 3.3).
        """
        if shuffle and self.groups > 1:
            return np.argsort(draw(Slot.KEY_SHUFFLE, self.images), kind="stable")
        return np.arange(self.images)


def taken(view: Views, order: NDArray[np.int64], plan: GroupPlan) -> Callable[[slice], Tensor]:
    """Gives rows of this process's images where those of the whole batch are put in this order."""
    if (order == np.arange(plan.images)).all():
        return lambda rows: view[rows]
    mine = order[plan.own]
    if plan.world > 1:
        # In the precision in which the encoder takes them: half as much to send.
        own = exchange(as_encoded(view[:]), order, plan.counts)
        return lambda rows: own[rows]
    if isinstance(view, Tensor):
        images = view
        return lambda rows: images[to_device(mine[rows], images.device)]
    return lambda rows: view[mine[rows]]


def _cut(sizes: list[int], micro_batch: int) -> list[Piece]:
    """Runs of whole groups of at most `micro_batch` images, or of one group."""
    pieces: list[Piece] = []
    start = 0
    held: tuple[int, ...] = ()
    for size in sizes:
        if held and sum(held) + size > micro_batch:
            pieces.append(Piece(slice(start, start + sum(held)), held))
            start, held = start + sum(held), ()
        held = (*held, size)
    return [*pieces, Piece(slice(start, start + sum(held)), held)]


class Encoding:
    """Images to unit vectors, a piece at a time, through the modules of `network` in turn.

    `take` gives the images of some rows, in the order in which they are cut into groups.
    """

    def __init__(self, parts: Sequence[nn.Module], take: Callable[[slice], Tensor]) -> None:
        self.network, self.take = nn.ModuleList(parts), take

    def __call__(self, piece: Piece) -> Tensor:
        """Unit vectors (n, C), float32 outside autocast."""
        set_groups(self.network, piece.groups)
        outputs = self.take(piece.rows)
        for part in self.network:
            outputs = part(outputs)
        return normalise(outputs)

    def all(self, pieces: Sequence[Piece]) -> Tensor:
        """Unit vectors of all pieces; running statistics move as in one undivided forward."""
        with one_statistics_update(self.network, len(pieces)) as statistics:
            vectors = []
            for piece in pieces:
                vectors.append(self(piece))
                statistics.part(len(piece.groups))
            return torch.cat(vectors)


def as_encoded(views: Tensor) -> Tensor:
    """Views as a network's first layer takes them: under autocast, in its precision."""
    device = views.device.type
    if torch.is_autocast_enabled(device) and views.dtype == torch.float32:
        return views.to(torch.get_autocast_dtype(device))
    return views


def normalise(projections: Tensor) -> Tensor:
    """Unit vectors (N, C), in float32 outside autocast."""
    with torch.autocast(projections.device.type, enabled=False):
        return F.normalize(as_float(projections), dim=1)
