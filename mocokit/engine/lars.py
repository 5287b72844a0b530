"""LARS as SimCLR uses it: each layer's step is as long as its weights, not as its gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) with SimCLR's classic momentum.

    v <- momentum v + lr r (g + decay w), w <- w - v, where r = trust |w| / |g + decay w| for
    weights of two dimensions and more; batch norm and biases take plain steps without decay
    (arXiv 2002.05709, appendix B.3). The learning rate is inside v, so a step remembers the rates
    of those before it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(parameters, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; parameters without gradient stay."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            moved: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            layers, others = [p for p in moved if p.ndim > 1], [p for p in moved if p.ndim <= 1]
            if layers:
                steps = _adapted(layers, group["weight_decay"], group["trust"])
                self._move(layers, steps, group)
            if others:
                self._move(others, _gradients(others), group)
        return loss

    def _move(self, parameters: list[Tensor], steps: list[Tensor], group: dict[str, Any]) -> None:
        velocities = [self._velocity(p) for p in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, steps, alpha=group["lr"])
        torch._foreach_sub_(parameters, velocities)

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: Tensor = state["velocity"]
        return velocity


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _adapted(weights: list[Tensor], weight_decay: float, trust: float) -> list[Tensor]:
    """Each layer's decayed gradient, scaled to `trust` times the length of its weights."""
    steps = torch._foreach_add(_gradients(weights), weights, alpha=weight_decay)
    of_weights = torch.stack(torch._foreach_norm(weights))
    of_steps = torch.stack(torch._foreach_norm(steps))
    ratios = torch.where((of_weights > 0) & (of_steps > 0), trust * of_weights / of_steps, 1.0)
    torch._foreach_mul_(steps, list(ratios.unbind()))
    return list(steps)
