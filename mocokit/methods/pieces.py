"""A step in pieces: which images a process holds, in which batch-norm groups, and their loss.

A piece is a run of whole groups, so that pieces compute what the whole step does. Only one piece's
activations are held at a time. A loss whose queries enter one by one is differentiated piece by
piece. One that compares all vectors of the batch with each other is differentiated by GradCache
(arXiv 2101.06983): all is encoded without gradient, the loss is differentiated by the vectors, and
each piece is encoded again and takes its part of that gradient. Memory then grows with the piece
and not with the batch, for one more forward. Either way the result is a loss like any other, whose
backward only delivers what was computed here: the loop need not know.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mocokit.chance import Slot
from mocokit.methods.method import Step, Views, as_float
from mocokit.methods.processes import exchange, rank_and_world
from mocokit.nets.batchnorm import (
    group_sizes,
    one_statistics_update,
    set_groups,
    share_of_groups,
)
from mocokit.transfer import to_device

# The loss of vectors (n, C), given which of this process's images (rows) they belong to.
LossOf = Callable[[Tensor, slice], Tensor]


class Piece(NamedTuple):
    """Some of a process's images, and the sizes of the batch-norm groups that they are cut into."""

    rows: slice
    groups: tuple[int, ...]


class GroupPlan:
    """Which images of a global batch this process holds, in how many groups and pieces.

    `whole` is batch norm over the whole batch: then images are shared one by one, and a process's
    part is a single group and piece. `rows` are this process's images in the global batch, `counts`
    how many each process has.
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
        self.rows = slice(start, start + self.counts[rank])
        self._sizes = [[sum(sizes[share])] if whole else sizes[share] for share in shares]
        self._rank, self._micro_batch = rank, micro_batch

    def pieces(self, views: int = 1) -> list[Piece]:
        """Pieces of this process's images, or of several views of them one after another."""
        return self._pieces(self._rank, views)

    def in_one_piece(self, views: int = 1) -> bool:
        """Whether every process does its images in one piece: all must go the same way."""
        return all(len(self._pieces(rank, views)) == 1 for rank in range(self.world))

    def _pieces(self, rank: int, views: int) -> list[Piece]:
        # With `whole` statistics, of all views together.
        mine = self._sizes[rank]
        sizes = [sum(mine) * views] if self.whole else mine * views
        return _cut(sizes, self._micro_batch or sum(sizes))

    def key_permutation(self, step: Step, shuffle: bool) -> NDArray[np.int64]:
        """The order (B,) in which key images are cut into groups: position i holds order[i].

        Shuffled, so that a query and its key seldom share statistics (MoCo v1, section 3.3).
        """
        if shuffle and self.groups > 1:
            return np.argsort(step.draw(Slot.KEY_SHUFFLE, self.images), kind="stable")
        return np.arange(self.images)


def shuffled_rows(
    view: Views, order: NDArray[np.int64], plan: GroupPlan
) -> Callable[[slice], Tensor]:
    """A function that gives rows of this process's part of the batch, once that is put in `order`.

    On one process nothing is sent. On several, each image travels once, to the process whose group
    it falls into.
    """
    if (order == np.arange(plan.images)).all():
        return lambda rows: view[rows]
    mine = order[plan.rows]
    if plan.world > 1:
        # In the precision in which the encoder takes them: half as much to send.
        received = exchange(as_encoded(view[:]), order, plan.counts)
        return lambda rows: received[rows]
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

    def encode_all(self, pieces: Sequence[Piece]) -> Tensor:
        """Unit vectors of all pieces; running statistics move as in one forward of the whole."""
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


def loss_in_pieces(
    encoding: Encoding,
    pieces: Sequence[Piece],
    loss_of: LossOf,
    parameters: Iterable[nn.Parameter],
    *,
    in_one_piece: bool,
    whole_batch_loss: bool,
    scale: float = 1.0,
) -> Tensor:
    """The sum of the pieces' losses, or with `whole_batch_loss` the loss of all vectors at once.

    Without gradients being recorded, or `in_one_piece`, nothing is differentiated here. All
    processes must agree on that, since a loss may need the vectors of others. `scale` is the
    caller's loss scaling: gradients in float16 need it, and it is divided out again here.
    """
    if in_one_piece or not torch.is_grad_enabled():
        vectors = encoding.encode_all(pieces)
        return loss_of(vectors, slice(0, len(vectors)))
    gradients = _Gradients(parameters, scale)
    way = _all_together if whole_batch_loss else _one_by_one
    total = way(encoding, pieces, loss_of, gradients)
    loss: Tensor = _Deliver.apply(total, gradients.sums, *gradients.parameters)
    return loss


def _one_by_one(
    encoding: Encoding, pieces: Sequence[Piece], loss_of: LossOf, gradients: "_Gradients"
) -> Tensor:
    losses = []
    with one_statistics_update(encoding.network, len(pieces)) as statistics:
        for piece in pieces:
            loss = loss_of(encoding(piece), piece.rows)
            statistics.part(len(piece.groups))
            gradients.add(loss * gradients.scale)
            losses.append(loss.detach())
    return torch.stack(losses).sum()


def _all_together(
    encoding: Encoding, pieces: Sequence[Piece], loss_of: LossOf, gradients: "_Gradients"
) -> Tensor:
    states = [_RandomState(encoding.network) for _ in pieces]
    with torch.no_grad(), one_statistics_update(encoding.network, len(pieces)) as statistics:
        parts = []
        for piece, state in zip(pieces, states, strict=True):
            state.remember()
            parts.append(encoding(piece))
            statistics.part(len(piece.groups))
    vectors = torch.cat(parts).requires_grad_()
    loss = loss_of(vectors, slice(0, len(vectors)))
    with torch.autocast(vectors.device.type, enabled=False):  # as where a loop differentiates
        (wanted,) = torch.autograd.grad(loss * gradients.scale, [vectors])
    with one_statistics_update(encoding.network, 0):  # they have moved
        for piece, state in zip(pieces, states, strict=True):
            state.restore()
            gradients.add((encoding(piece) * wanted[piece.rows]).sum())
    return loss.detach()


class _Gradients:
    """Sums of gradients, one for each parameter that is trained."""

    def __init__(self, parameters: Iterable[nn.Parameter], scale: float) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.sums: list[Tensor | None] = [None] * len(self.parameters)
        self.scale = scale

    def add(self, scaled: Tensor) -> None:
        """Differentiate a loss that carries the scale."""
        with torch.autocast(scaled.device.type, enabled=False):  # as where a loop differentiates
            parts = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        for number, part in enumerate(parts):
            if part is not None:
                before = self.sums[number]
                part = part if self.scale == 1 else part / self.scale
                self.sums[number] = part if before is None else before.add_(part)


class _Deliver(torch.autograd.Function):
    """Hands gradients that were computed beforehand to whoever differentiates the loss."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, scale):  # type: ignore[no-untyped-def]
        gradients = ctx.gradients
        ctx.gradients = None
        return None, None, *(g if g is None else g.mul_(scale.to(g.dtype)) for g in gradients)


class _RandomState:
    """The generators' states before a piece, so that dropout is the same when it comes again."""

    def __init__(self, network: nn.Module) -> None:
        device = next(network.parameters()).device
        self._device = device if device.type == "cuda" else None
        self._states: list[Tensor] = []

    def remember(self) -> None:
        self._states = [torch.get_rng_state()]
        if self._device is not None:
            self._states.append(torch.cuda.get_rng_state(self._device))

    def restore(self) -> None:
        torch.set_rng_state(self._states[0])
        if self._device is not None:
            torch.cuda.set_rng_state(self._states[1], self._device)


class Shuffling(Protocol):
    """A method whose keys are shuffled over batch-norm groups."""

    shuffle: bool
    count_groups: Callable[[int], int]
    whole: bool


@contextmanager
def keys_regrouped(method: Shuffling) -> Iterator[None]:
    """Shuffle a method's keys over at least two groups, however it is trained."""
    shuffle, count, whole = method.shuffle, method.count_groups, method.whole
    method.shuffle, method.whole = True, False
    method.count_groups = lambda images: max(2, count(images))
    try:
        yield
    finally:
        method.shuffle, method.count_groups, method.whole = shuffle, count, whole
