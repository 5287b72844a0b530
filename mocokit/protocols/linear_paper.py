"""The linear classifier of MoCo v1 and v2, to the letter of the authors' main_lincls.py.

A frozen backbone in eval mode; one layer, weights N(0, .01) and biases 0, on random crops; SGD
with the learning rate 30 that the authors found by grid search, no weight decay, 100 epochs, a
tenth of the rate after epochs 60 and 80. The authors report the best epoch on the test set; here
it is the last one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mocokit import chance
from mocokit.chance import Slot
from mocokit.data.loader import read_batches
from mocokit.engine.finite import FiniteWatch
from mocokit.errors import NonFiniteLoss
from mocokit.nets.modes import evaluating
from mocokit.protocols.defaults import Linear
from mocokit.protocols.features import probe_spec
from mocokit.protocols.table import CENTRE, Table
from mocokit.protocols.task import Task
from mocokit.views.params import ViewSpec, canvas_bound, draw_table
from mocokit.views.views import make_views
from mocokit.weights.subject import FrozenModel

LR, MOMENTUM, EPOCHS, BATCH = Linear.lr, 0.9, Linear.epochs, 256
DROPS = (0.6, 0.8)  # epochs 60 and 80 of 100
INIT_STD = 0.01
TellEpoch = Callable[[int, int, float], None]  # epochs done, epochs in all, mean loss


@dataclass(frozen=True)
class Fitted:
    """A linear layer (C, D), (C,) on features as they are, and what became of its training."""

    weight: Tensor
    bias: Tensor
    details: dict[str, Any]
    notes: tuple[str, ...] = ()

    def predict(self, features: Tensor) -> Tensor:
        """Classes (N,), on the host."""
        device = self.weight.device
        parts = torch.split(features, 16384)
        scores = [F.linear(part.to(device), self.weight, self.bias).argmax(1) for part in parts]
        return torch.cat(scores).cpu()


def protocol(subject: FrozenModel, epochs: int, lr: float) -> str:
    """What `fit_paper` does, in words."""
    drops = " and ".join(f"{share * epochs:.0f}" for share in DROPS)
    own = "" if (epochs, lr) == (EPOCHS, LR) else " (the paper's are 100 and 30)"
    size, lasting = subject.spec.size, f"{epochs} epoch{'s' * (epochs != 1)}"
    return (
        f"the linear protocol of MoCo v2: frozen {subject.layer} in eval mode, {lasting}, "
        f"SGD lr {lr:g}{own}, momentum {MOMENTUM}, no weight decay, a tenth after epochs {drops}, "
        f"batch {BATCH}; trained on random crops of area .08 to 1 at {size} px and flips, tested "
        f"on: {CENTRE.describe(subject.spec)}; last epoch"
    )


def fit_paper(
    subject: FrozenModel,
    task: Task,
    *,
    seed: int,
    epochs: int = EPOCHS,
    lr: float = LR,
    workers: int = 0,
    tell: TellEpoch = lambda done, total, loss: None,
) -> Fitted:
    """Train the layer. Raises NonFiniteLoss, with a remedy, where it diverges.

    The subject's weights, running statistics included, are the same to the bit afterwards.
    """
    before, device, classes = subject.weights, subject.device, len(task.classes)
    layer = _first_layer(subject.width, classes, seed).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    spec = probe_spec(subject.spec)
    watch, losses, mean_square = FiniteWatch(device), list[float](), 0.0
    for epoch in range(epochs):
        rate = lr * 0.1 ** sum(epoch >= round(share * epochs) for share in DROPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, seen = torch.zeros((), device=device), 0
        batches = training_views(spec, task, device, seed, epoch, BATCH, workers)
        for step, (views, labels) in enumerate(batches):
            with evaluating(subject.network):
                features = subject.features(views)
            if epoch == 0 and step == 0:
                mean_square = float(features.square().sum(1).mean())
            value = F.cross_entropy(layer(features), labels)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            optimizer.step()
            watch.note(epoch * 10**6 + step, value)
            total += value.detach() * len(labels)
            seen += len(labels)
        _check(watch, epoch, lr, mean_square)
        losses.append(float(total) / max(seen, 1))
        tell(epoch + 1, epochs, losses[-1])
    if subject.weights != before:
        raise RuntimeError("the frozen network changed during a linear probe")
    details = {"epochs": epochs, "lr": lr, "batch_size": BATCH, "seed": seed}
    details |= {"train_loss": losses[-1], "square_length": mean_square}
    notes = _doubts(losses, classes, lr, mean_square)
    return Fitted(layer.weight.detach(), layer.bias.detach(), details, notes)


def test_features(task: Task, table: Table) -> tuple[Tensor, NDArray[np.int64]]:
    """Features and labels of the test images that can be read."""
    good = np.isin(task.test_numbers, table.good)
    return table.take(task.test_numbers[good]), task.test_labels[good]


def _first_layer(width: int, classes: int, seed: int) -> nn.Linear:
    layer = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(chance.library_seed(seed, 0, Slot.EVALUATION))
    with torch.no_grad():
        layer.weight.normal_(0.0, INIT_STD, generator=generator)
        layer.bias.zero_()
    return layer


def training_views(
    spec: ViewSpec,
    task: Task,
    device: torch.device,
    seed: int,
    epoch: int,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random views of the task's training images with their labels, batch after batch."""
    stream = chance.library_seed(seed, 1, Slot.EVALUATION)
    order = chance.Order(stream, epoch, len(task.train_numbers))
    numbers = task.train_numbers[order[np.arange(len(task.train_numbers))]]
    labels = task.train.labels
    assert labels is not None
    bound = canvas_bound(spec)
    for batch in read_batches(task.train, numbers, batch_size, bound, workers):
        if len(batch.index):
            sizes = batch.heights, batch.widths
            table = draw_table(spec, stream, epoch, batch.index, 0, *sizes)
            views = make_views(spec, table, batch.pixels, *sizes, device)
            yield views, torch.from_numpy(labels[batch.index]).to(device)


def _check(watch: FiniteWatch, epoch: int, lr: float, mean_square: float) -> None:
    try:
        watch.check()
    except NonFiniteLoss:
        raise NonFiniteLoss(
            f"the linear probe diverged in epoch {epoch + 1}: its loss is not finite; "
            + _remedy(lr, mean_square)
        ) from None


def _doubts(losses: list[float], classes: int, lr: float, mean_square: float) -> tuple[str, ...]:
    """Why the result should not be believed, if so."""
    chance_loss = math.log(classes)
    if losses[-1] > chance_loss:
        what = f"the probe did not converge: its last training loss, {losses[-1]:.3g}, is"
    elif (before := losses[max(0, round(DROPS[0] * len(losses)) - 1)]) > chance_loss:
        what = (
            f"lr {lr:g} is too large here: until it dropped, the training loss, {before:.3g}, was"
        )
    else:
        return ()
    return (f"{what} above that of guessing, {chance_loss:.3g}; {_remedy(lr, mean_square)}",)


def _remedy(lr: float, mean_square: float) -> str:
    """What to do. SGD with momentum m is stable for lr < 2 (1 + m) / L; for softmax L <= |x|^2 / 2.

    `mean_square` is the mean of |x|^2 over the features of a batch.
    """
    stable = 4 * (1 + MOMENTUM) / max(mean_square, 1e-12)
    tried = float(f"{min(stable, lr / 3):.1g}")
    return (
        f"the paper's 30 was found for a ResNet-50 on ImageNet, and these features have a mean "
        f"square length of {mean_square:.3g}; try --lr {tried:g}, or --protocol quick, which "
        "needs none"
    )
