"""Fine-tuning of all layers with a share of the labels: it measures how few a backbone needs.

A copy of the subject is trained. The subject is not changed.
"""

import copy
import dataclasses
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
from mocokit.engine.finite import FiniteWatch, check_weights
from mocokit.engine.runtime import seed_libraries
from mocokit.errors import NonFiniteLoss
from mocokit.nets.modes import evaluating
from mocokit.protocols.defaults import FineTune
from mocokit.protocols.features import evaluation_batches, probe_spec
from mocokit.protocols.labelled import LabelledSplit
from mocokit.protocols.linear_paper import EpochProgress
from mocokit.protocols.states import EndOf, State, States
from mocokit.protocols.table import CENTRE
from mocokit.protocols.training import Epoch, TrainingViews
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

    def describe(self, subject: FrozenModel) -> str:
        layers = (
            "" if self.layer_decay == 1 else f" (times {self.layer_decay:g} for each layer below)"
        )
        lasting = f"{self.epochs} epoch{'s' * (self.epochs != 1)}"
        return (
            f"fine-tuning of all layers, {lasting} and at least {LEAST_STEPS} "
            f"steps, SGD lr {self.lr:g}{layers} with Nesterov momentum {self.momentum:g}, cosine "
            f"per step, weight decay {self.weight_decay:g}, batch {self.batch_size}, or all images "
            "of fewer; trained on random crops of area .08 to 1 and flips, tested on: "
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
    states: States | None = None,
) -> tuple[Tensor, NDArray[Any], dict[str, Any]]:
    """(predictions, labels, details) for all test images that can be read.

    It resumes from where an earlier attempt left its state in `states`. Raises NonFiniteLoss, with
    a remedy, if training diverges; Stopped, once its state is saved, after a signal; MocokitError
    where the state cannot be saved then.
    """
    images = len(split.train_numbers)
    epochs = plan.epochs_for(images)
    values = {"probe": "finetune", "seed": seed, "epochs": epochs, **dataclasses.asdict(plan)}
    name = f"{subject.name} with {images:,} labelled images"
    with (states or States()).of(name, subject, split, values) as state:
        found = state.found or {}
        if "predicted" not in found:
            tuning = _Tuning(subject, split, plan, seed, workers, state)
            tuning.train(progress)
            found = tuning.tested()
        return found["predicted"], found["truth"].numpy(), found["details"]


class _Tuning:
    """A copy of a subject in training, with everything that its next step needs."""

    def __init__(
        self,
        subject: FrozenModel,
        split: LabelledSplit,
        plan: Plan,
        seed: int,
        workers: int,
        state: State,
    ) -> None:
        self.subject, self.split, self.plan = subject, split, plan
        self.seed, self.workers, self.state = seed, workers, state
        self.device, images = subject.device, len(split.train_numbers)
        model = Classifier(copy.deepcopy(subject.network), subject.width, len(split.classes))
        self.model = model.to(self.device).train().requires_grad_(True)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, plan.lr, plan.layer_decay),
            momentum=plan.momentum,
            nesterov=plan.momentum > 0,
            weight_decay=plan.weight_decay,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.batch, self.epochs = min(plan.batch_size, images), plan.epochs_for(images)
        self.watch = FiniteWatch(self.device)
        self.epoch, self.step, self.loss = Epoch.first(self.device), 0, math.nan
        if (found := state.found) is not None:
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.epoch.load(found["epoch"])
            self.step, self.loss = found["optimizer_step"], found["loss"]

    def content(self) -> dict[str, Any]:
        """Raises NonFiniteLoss rather than let a broken network be saved."""
        self._check()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch.state(),
            "optimizer_step": self.step,
            "loss": self.loss,
        }

    def train(self, progress: EpochProgress) -> None:
        while self.epoch.number < self.epochs:
            self._train_epoch()
            progress(self.epoch.number, self.epochs, self.loss)

    def _train_epoch(self) -> None:
        stream = chance.library_seed(self.seed, 2, Slot.EVALUATION)
        batches = TrainingViews(
            probe_spec(self.subject.spec),
            self.split,
            self.device,
            self.seed,
            self.epoch.number,
            self.batch,
            self.workers,
            self.epoch.batches,
        )
        total = self.epochs * len(batches)
        for views, labels in batches:
            seed_libraries(stream, self.step)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * self.step / total))
            self.step += 1
            if len(labels) > 1:  # batch norm cannot train on a single image
                self._update(views, labels)
            self.epoch.batches = batches.done
            if batches.done < len(batches):
                self._reached(len(batches), "step")
        self._check()
        self.loss = self.epoch.end()
        self._reached(len(batches), "epoch" if self.epoch.number < self.epochs else "end")

    def _update(self, views: Tensor, labels: Tensor) -> None:
        with self.subject.autocast():
            scores = self.model(views)
        value = F.cross_entropy(scores, labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        self.optimizer.step()
        self.watch.note(self.step, value)
        self.epoch.add(value, len(labels))

    def _reached(self, batches: int, end_of: EndOf) -> None:
        step, words = self.epoch.place(batches, self.epochs)
        self.state.reached(step, words, self.content, end_of)

    def _check(self) -> None:
        try:
            self.watch.check()
            check_weights(self.model, self.step)
        except NonFiniteLoss:
            rate = self.plan.lr / 10
            raise NonFiniteLoss(
                f"fine-tuning diverged in epoch {self.epoch.number + 1}: its loss or its weights "
                f"are not finite; try --lr {rate:g}, or --layer-decay 0.7, which spares the lower "
                "layers"
            ) from None

    def tested(self) -> dict[str, Any]:
        """The predictions, which are kept in place of the network if every image could be read."""
        predicted, truth = _predict(self.model, self.subject, self.split, self.workers)
        details: dict[str, Any] = {"images": len(self.split.train_numbers), "epochs": self.epochs}
        details |= {"train_loss": self.loss, "seed": self.seed}
        result = {"predicted": predicted, "truth": torch.from_numpy(truth), "details": details}
        if len(truth) == len(self.split.test_numbers):
            self.state.finish(result)
        return result


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
        raise split.unreadable_test()
    return torch.cat(predicted), torch.cat(truth).numpy()
