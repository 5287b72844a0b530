"""Fine-tuning of all layers with a share of the labels: it measures how few a backbone needs.

A copy of the subject is trained. The subject is not changed.
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mocokit import chance
from mocokit.chance import Slot
from mocokit.engine.finite import FiniteWatch
from mocokit.engine.runtime import seed_libraries
from mocokit.errors import NonFiniteLoss, UserError
from mocokit.nets.modes import evaluating
from mocokit.protocols.defaults import FineTune
from mocokit.protocols.features import evaluation_batches, probe_spec
from mocokit.protocols.labelled import LabelledSplit
from mocokit.protocols.linear_paper import EpochProgress, training_views
from mocokit.protocols.table import CENTRE
from mocokit.weights.subject import FrozenModel

LEAST_STEPS = 400  # few labels make short epochs, so there are more of them, up to this many steps


@dataclass(frozen=True)
class Plan:
    """The values of fine-tuning. They are our own choice, not the protocol of a paper."""

    epochs: int = FineTune.epochs
    lr: float = FineTune.lr
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    layer_decay: float = FineTune.layer_decay

    def epochs_for(self, images: int) -> int:
        """The number of epochs for this many images."""
        steps = max(1, -(-images // self.batch_size))
        return max(self.epochs, -(-LEAST_STEPS // steps))

    def ahead(self, images: int) -> str:
        """A description of the training on this many images, before it starts."""
        epochs = self.epochs_for(images)
        steps = epochs * -(-images // self.batch_size)
        least = f" (more than --epochs {self.epochs}, for at least {LEAST_STEPS} steps)"
        return (
            f"{images:,} labelled images, {epochs} epoch{'s' * (epochs != 1)} of them, "
            f"{steps:,} steps{least * (epochs > self.epochs)}"
        )

    def describe(self, subject: FrozenModel, images: int) -> str:
        layers = (
            "" if self.layer_decay == 1 else f" (times {self.layer_decay:g} for each layer below)"
        )
        lasting = f"{self.epochs} epoch{'s' * (self.epochs != 1)}"
        return (
            f"fine-tuning of all layers, {lasting} and at least {LEAST_STEPS} "
            f"steps, SGD lr {self.lr:g}{layers} with Nesterov momentum {self.momentum:g}, cosine "
            f"per step, weight decay {self.weight_decay:g}, batch {min(self.batch_size, images)}; "
            "trained on random crops of area .08 to 1 and flips, tested on: "
            f"{CENTRE.describe(subject.spec)}; last epoch"
        )


class Classifier(nn.Module):
    """A backbone with a linear layer on top, which starts at zero."""

    def __init__(self, backbone: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.layer = backbone, nn.Linear(width, classes)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.layer(features.float())
        return scores


def fine_tune(
    subject: FrozenModel,
    split: LabelledSplit,
    plan: Plan,
    *,
    seed: int,
    workers: int = 0,
    progress: EpochProgress = lambda done, total, loss: None,
) -> tuple[Tensor, NDArray[Any], dict[str, Any]]:
    """(predictions, labels, details) for all test images that can be read.

    Raises NonFiniteLoss, with a remedy, if training diverges.
    """
    device, images = subject.device, len(split.train_numbers)
    model = Classifier(copy.deepcopy(subject.network), subject.width, len(split.classes))
    model = model.to(device).train().requires_grad_(True)
    optimizer = torch.optim.SGD(
        parameter_groups(model, plan.lr, plan.layer_decay),
        momentum=plan.momentum,
        nesterov=plan.momentum > 0,
        weight_decay=plan.weight_decay,
    )
    batch, epochs = min(plan.batch_size, images), plan.epochs_for(images)
    peaks = [group["lr"] for group in optimizer.param_groups]
    spec, watch = probe_spec(subject.spec), FiniteWatch(device)
    total_steps, step, loss = epochs * -(-images // batch), 0, math.nan
    stream = chance.library_seed(seed, 2, Slot.EVALUATION)
    for epoch in range(epochs):
        total, seen = torch.zeros((), device=device), 0
        for views, labels in training_views(spec, split, device, seed, epoch, batch, workers):
            seed_libraries(stream, step)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / total_steps))
            step += 1
            if len(labels) < 2:
                continue  # batch norm cannot train on a single image
            with subject.autocast():
                scores = model(views)
            value = F.cross_entropy(scores, labels)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            optimizer.step()
            watch.note(step, value)
            total += value.detach() * len(labels)
            seen += len(labels)
        _check(watch, epoch, plan.lr)
        loss = float(total) / max(seen, 1)
        progress(epoch + 1, epochs, loss)
    predicted, truth = _predict(model, subject, split, workers)
    return predicted, truth, {"images": images, "epochs": epochs, "train_loss": loss, "seed": seed}


def _check(watch: FiniteWatch, epoch: int, lr: float) -> None:
    try:
        watch.check()
    except NonFiniteLoss:
        raise NonFiniteLoss(
            f"fine-tuning diverged in epoch {epoch + 1}: its loss is not finite; "
            f"try --lr {lr / 10:g}, or --layer-decay 0.7, which spares the lower layers"
        ) from None


def parameter_groups(model: Classifier, lr: float, decay: float) -> list[dict[str, Any]]:
    """The parameters by layer, each layer with its learning rate. The new layer has `lr`."""
    depths: dict[str, int] = {}
    found: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.backbone.named_parameters():
        block = block_of(name)
        depth = depths.setdefault(block, len(depths)) if block else max(len(depths) - 1, 0)
        found.setdefault(depth, []).append(parameter)
    top = max(found, default=-1) + 1
    groups = [
        {"params": parameters, "lr": lr * decay ** (top - depth)}
        for depth, parameters in sorted(found.items())
    ]
    return [*groups, {"params": list(model.layer.parameters()), "lr": lr}]


def block_of(name: str) -> str:
    """The numbered block of a parameter, such as layer1.0 or blocks.3; empty if there is none.

    Parameters without a number join the block before them, and a stem joins the first block.
    """
    match = re.match(r"(?:[A-Za-z_]\w*\.)+?\d+(?:\.\d+)?(?=\.)", name)
    return match[0] if match else ""


def _predict(
    model: Classifier, subject: FrozenModel, split: LabelledSplit, workers: int
) -> tuple[Tensor, NDArray[Any]]:
    labels = split.test.labels
    assert labels is not None
    predicted, truth = [], []
    batches = evaluation_batches(
        split.test, split.test_numbers, subject.spec, subject.device, workers
    )
    with evaluating(model), subject.autocast():
        for batch, views in batches:
            predicted.append(model(views).argmax(1).cpu())
            truth.append(torch.from_numpy(labels[batch.index]))
    if not predicted:
        raise UserError(f"none of the test images of {split.test.name} can be read")
    return torch.cat(predicted), torch.cat(truth).numpy()
