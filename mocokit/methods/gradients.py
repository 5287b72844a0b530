"""The loss of a step in pieces, of which only one piece's activations are held at a time.

A loss whose queries enter one by one is differentiated piece by piece. One that compares all
vectors of the batch with each other is differentiated by GradCache (arXiv 2101.06983): encode
everything without gradient, differentiate the loss by the vectors, then encode each piece again and
hand it its part of that gradient. Memory then grows with the piece and not with the batch, for one
more forward. Either way the result is a loss like any other, whose backward only delivers what was
computed here: the loop does not know.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from mocokit.methods.pieces import Encoding, Piece
from mocokit.nets.batchnorm import one_statistics_update

# Of vectors (n, C) and the rows that they are among this process's images.
LossOf = Callable[[Tensor, slice], Tensor]


def loss_in_pieces(
    encoding: Encoding,
    pieces: Sequence[Piece],
    loss_of: LossOf,
    parameters: Iterable[nn.Parameter],
    *,
    undivided: bool,
    together: bool,
    scale: float = 1.0,
) -> Tensor:
    """The sum of the pieces' losses; or, `together`, the loss of all their vectors at once.

    Without gradients being recorded, or `undivided`, nothing is differentiated here; all processes
    must agree on that, since a loss may ask others for their vectors. `scale` is the caller's loss
    scaling: it must be on the loss while gradients are float16, and is taken off again here.
    """
    if undivided or not torch.is_grad_enabled():
        vectors = encoding.all(pieces)
        return loss_of(vectors, slice(0, len(vectors)))
    gradients = _Gradients(parameters, scale)
    way = _all_together if together else _one_by_one
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
    chance = [_RandomState(encoding.network) for _ in pieces]
    with torch.no_grad(), one_statistics_update(encoding.network, len(pieces)) as statistics:
        parts = []
        for piece, state in zip(pieces, chance, strict=True):
            state.remember()
            parts.append(encoding(piece))
            statistics.part(len(piece.groups))
    vectors = torch.cat(parts).requires_grad_()
    loss = loss_of(vectors, slice(0, len(vectors)))
    with torch.autocast(vectors.device.type, enabled=False):  # as where a loop differentiates
        (wanted,) = torch.autograd.grad(loss * gradients.scale, [vectors])
    with one_statistics_update(encoding.network, 0):  # they have moved
        for piece, state in zip(pieces, chance, strict=True):
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
