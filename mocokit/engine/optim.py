"""The optimiser, and its learning rate as a pure function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mocokit.engine.lars import LARS


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a step. `lr` is the peak in effect, after scaling with the batch."""

    lr: float
    kind: str  # steps or cosine
    per: str  # epoch: constant within an epoch, as the authors have it; step: smooth
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
            # Rounded, because 0.6 * 200 epochs must mean 120 whatever the floats say.
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
    parameters: Iterable[nn.Parameter],
    lr: float,
    momentum: float,
    weight_decay: float,
    trust: float = 0.001,
) -> torch.optim.Optimizer:
    """SGD (no Nesterov) or AdamW on all parameters alike, fused where the device allows; or LARS.

    The weight decay covers batch norm and biases too, as in the authors' code; not with LARS.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if name == "lars":
        return LARS(parameters, lr, momentum, weight_decay, trust)
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    options["fused" if parameters[0].is_cuda else "foreach"] = True
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=momentum, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
