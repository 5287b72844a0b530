"""Is the run alive: non-finite losses, the size of the gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mocokit.errors import NonFiniteLoss


class FiniteWatch:
    """Remembers on the device the first step whose loss was not finite, and raises when asked.

    Asking waits for the device, so a GPU run asks only where it reads numbers anyway; no checkpoint
    is written without asking.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.long, device=device)

    def note(self, step: int, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss.detach()) & (self._first < 0)
        self._first.masked_fill_(bad, step)

    def check(self) -> None:
        """Raises NonFiniteLoss naming the step."""
        step = int(self._first)
        if step >= 0:
            raise NonFiniteLoss(f"the loss of step {step} is not finite")


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
