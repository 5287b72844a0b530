"""The optimiser, and its learning rate as a pure function of the step.

LARS is SimCLR's variant: the step of a layer is proportional to the norm of its weights.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a step. `lr` is the peak value, already scaled to the batch size."""

    lr: float
    kind: str  # steps or cosine
    per: str  # epoch: constant within an epoch, as in the authors' code; step: smooth
    epochs: int
    steps_per_epoch: int
    first_epoch: int = 0
    drops: tuple[float, ...] = (0.6, 0.8)
    drop_factor: float = 0.1
    warmup_epochs: float = 0.0

    def __call__(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        warmup = self.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / (math.floor(warmup) + 1)
        return self.lr * self._factor(step, warmup)

    def _factor(self, step: int, warmup: float) -> float:
        epoch = step // self.steps_per_epoch
        if self.kind == "steps":
            progress = epoch / self.epochs if self.per == "epoch" else self._progress(step)
            # Rounded, because 0.6 * 200 epochs must be 120 in spite of floating-point errors.
            return self.drop_factor ** sum(round(progress - drop, 9) >= 0 for drop in self.drops)
        if self.per == "epoch":
            progress = (epoch + self.first_epoch) / self.epochs
        else:
            total = self.epochs * self.steps_per_epoch
            progress = (step - warmup) / max(total - warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def _progress(self, step: int) -> float:
        return step / (self.epochs * self.steps_per_epoch)


def build_optimizer(
    name: str,
    groups: Iterable[Mapping[str, Any]],
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float = 0.001,
) -> torch.optim.Optimizer:
    """SGD (without Nesterov), AdamW or LARS. SGD and AdamW are fused if the device allows it.

    Weight decay applies to batch norm and biases too, as in the authors' code, but not with LARS.
    Each of `groups` has `params`, and may have a `weight_decay` and a `trust` of its own. `set_lr`
    says what `lr_scale` and `fixed_lr` do.
    """
    parameters = [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in groups]
    if name == "lars":
        return LARS(parameters, lr, momentum, weight_decay, trust)
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    options["fused" if parameters[0]["params"][0].is_cuda else "foreach"] = True
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=momentum, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate, times its `lr_scale` where it has one.

    A group with `fixed_lr` keeps the rate that it was built with.
    """
    for group in optimizer.param_groups:
        if not group.get("fixed_lr", False):
            group["lr"] = lr * group.get("lr_scale", 1.0)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) with SimCLR's classic momentum.

    v <- momentum v + lr r (g + decay w), w <- w - v, where r = trust |w| / |g + decay w| for
    weights of two dimensions and more; batch norm and biases take plain steps without decay
    (arXiv 2002.05709, appendix B.3). The learning rate is part of v, so v keeps the rates of
    earlier steps.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(parameters, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step. Parameters without a gradient are not changed."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            moved: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            weights, vectors = [p for p in moved if p.ndim > 1], [p for p in moved if p.ndim <= 1]
            if weights and not group["trust"]:  # a group that is not adapted, but decays
                decay = group["weight_decay"]
                decayed = torch._foreach_add(_gradients(weights), weights, alpha=decay)
                self._move(weights, list(decayed), group)
            elif weights:
                steps = _adapted(weights, group["weight_decay"], group["trust"])
                self._move(weights, steps, group)
            if vectors:
                self._move(vectors, _gradients(vectors), group)
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
    """The gradient of each layer plus decay, scaled to `trust` times the norm of its weights."""
    steps = torch._foreach_add(_gradients(weights), weights, alpha=weight_decay)
    weight_norms = torch.stack(torch._foreach_norm(weights))
    step_norms = torch.stack(torch._foreach_norm(steps))
    safe = (weight_norms > 0) & (step_norms > 0)
    ratios = torch.where(safe, trust * weight_norms / step_norms, 1.0)
    torch._foreach_mul_(steps, list(ratios.unbind()))
    return list(steps)


def check_fits(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if what was loaded for a parameter is not of its shape.

    torch would notice at the next step, or never.
    """
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            tensor = isinstance(value, Tensor)
            fits = value.ndim == 0 or value.shape == parameter.shape if tensor else True
            if not fits or not isinstance(value, Tensor | int | float | None):
                raise ValueError(f"the optimiser's {name} is not of its parameter's shape")
