"""Whether losses, weights and the optimiser's state are finite; the norm of the gradient."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocokit.errors import NonFiniteLoss


class FiniteWatch:
    """Keeps on the device the first step whose loss was not finite. `check` raises the error.

    `check` waits for the device. A GPU run therefore calls it only where it reads numbers anyway,
    and before every checkpoint.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.long, device=device)

    def note(self, step: int, loss: Tensor) -> None:
        """Remember the step if its loss is the first that is not finite; does not wait."""
        bad = ~torch.isfinite(loss.detach()) & (self._first < 0)
        self._first.masked_fill_(bad, step)

    def check(self) -> None:
        """Raises NonFiniteLoss, which names the step; on every process if on any."""
        first = self._first
        if dist.is_initialized():
            first = torch.where(first < 0, torch.iinfo(torch.long).max, first)
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
            first = torch.where(first == torch.iinfo(torch.long).max, -1, first)
        if int(first) >= 0:
            raise NonFiniteLoss(f"the loss of step {int(first)} is not finite")


@torch.no_grad()
def check_weights(module: nn.Module, step: int) -> None:
    """Raises NonFiniteLoss if a parameter or buffer is not finite.

    A finite loss can have a non-finite gradient, and the step it corrupts would otherwise become
    the "last good" checkpoint.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if not bool(torch.nn.utils.get_total_norm(tensors).isfinite()):
        raise NonFiniteLoss(f"the weights after step {step} are not finite")


@torch.no_grad()
def check_progress(optimizer: Mapping[str, Any], scaler: Mapping[str, Any], step: int) -> None:
    """Raises NonFiniteLoss if the state of an optimiser or of a gradient scaler is not finite.

    The weights may be finite while a momentum buffer or a moment of Adam is not: the next step
    would spoil them. A scale of zero skips every further step.
    """
    numbers = [*_leaves(optimizer), *_leaves(scaler)]
    tensors = [t for t in numbers if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    # The largest magnitude: the sum of squares of large moments would overflow.
    if not bool(torch.nn.utils.get_total_norm(tensors, math.inf).isfinite()) or not all(
        math.isfinite(value) for value in numbers if isinstance(value, float)
    ):
        raise NonFiniteLoss(f"the optimiser's state after step {step} is not finite")
    if scaler and not scaler.get("scale", 1.0) > 0:
        raise NonFiniteLoss(f"the scale of the loss after step {step} has fallen to zero")


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _leaves(branch)
    else:
        yield tree


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
