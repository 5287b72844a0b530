"""Parts that methods share: the queue, the slow follower, and what crosses processes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Piece = TypeVar("Piece")


class Queue(nn.Module):
    """The latest keys, first in, first out: `rows` (K, C), unit vectors, kept in checkpoints.

    Starts with random unit vectors (MoCo v1, the authors' code); `filled` counts real keys so far.
    """

    rows: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys (N, C) in the place of the oldest rows, in order, wrapping at the end.

        Of more keys than rows the last stay, as if they had come one by one.
        """
        size, count = len(self.rows), len(keys)
        kept = keys[-size:]
        start = self.pointer + (count - len(kept))
        places = (start + torch.arange(len(kept), device=self.rows.device)) % size
        self.rows.index_copy_(0, places, kept.to(self.rows.dtype))
        self.pointer.add_(count).remainder_(size)
        self.filled.add_(count).clamp_(max=size)


@torch.no_grad()
def follow(key_module: nn.Module, module: nn.Module, momentum: float) -> None:
    """Move the key module's parameters towards the module's: k <- m k + (1 - m) q.

    Parameters only: the key encoder's batch-norm buffers move by its own forward. MoCo v1, eq. 2.
    """
    keys: list[Tensor] = [*key_module.parameters()]
    queries: list[Tensor] = [*module.parameters()]
    torch._foreach_mul_(keys, momentum)
    torch._foreach_add_(keys, queries, alpha=1.0 - momentum)


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) on its own."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def to_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """Numbers of the host on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@torch.no_grad()
def gather(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes in their order, without gradient; process r holds counts[r].

    (counts[rank], ...) -> (sum(counts), ...).
    """
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _DeliverGradients(torch.autograd.Function):
    """Hands gradients that were computed beforehand to whoever differentiates the loss."""

    @staticmethod
    def forward(ctx, loss, gradients, *parameters):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, scale):  # type: ignore[no-untyped-def]
        gradients = ctx.gradients
        ctx.gradients = None
        return None, None, *(g if g is None else g * scale.to(g.dtype) for g in gradients)


def sum_of_pieces(
    loss_of: Callable[[Piece], Tensor],
    pieces: Sequence[Piece],
    parameters: Iterable[nn.Parameter],
    scale: float = 1.0,
) -> Tensor:
    """The sum of the pieces' losses, of which only one piece's activations are held at a time.

    Each piece is differentiated as soon as it is computed; the sum then delivers the gradients, so
    for the caller (and for DDP) it is a loss like any other. Without gradients being recorded, or
    for a single piece, this is the plain sum. `scale` is the caller's loss scaling: it must be on
    the loss while gradients are float16, and is taken off again here.
    """
    if len(pieces) == 1 or not torch.is_grad_enabled():
        return torch.stack([loss_of(piece) for piece in pieces]).sum()
    leaves = [p for p in parameters if p.requires_grad]
    gradients: list[Tensor | None] = [None] * len(leaves)
    total: Tensor | None = None
    for piece in pieces:
        loss = loss_of(piece)
        with torch.autocast(loss.device.type, enabled=False):  # as where a loop differentiates
            parts = torch.autograd.grad(loss * scale, leaves, allow_unused=True)
        for number, part in enumerate(parts):
            if part is not None:
                before = gradients[number]
                part = part / scale
                gradients[number] = part if before is None else before.add_(part)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    result: Tensor = _DeliverGradients.apply(total.requires_grad_(), gradients, *leaves)
    return result
