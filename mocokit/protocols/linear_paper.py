"""The linear classifier of MoCo v1 and v2, exactly as in the authors' main_lincls.py.

The backbone is frozen and in eval mode. One linear layer, with weights N(0, .01) and biases 0, is
trained on random crops for 100 epochs. SGD has no weight decay and the learning rate 30, which the
authors found by grid search; it drops to a tenth after epochs 60 and 80. The authors report the
best epoch on the test set; here the last epoch is reported.
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
from mocokit.protocols.labelled import LabelledSplit
from mocokit.protocols.table import CENTRE, Table
from mocokit.views.params import ViewSpec, draw_table, scoring_bound
from mocokit.views.views import make_views
from mocokit.weights.subject import FrozenModel

LR, MOMENTUM, EPOCHS, BATCH = Linear.lr, 0.9, Linear.epochs, 256
DROPS = (0.6, 0.8)  # shares of the epochs: 60 and 80 of 100
INIT_STD = 0.01
EpochProgress = Callable[[int, int, float], None]  # epochs done, total epochs, mean loss


@dataclass(frozen=True)
class Fitted:
    """A linear layer (C, D), (C,) on features that are not standardised, and how it was trained."""

    weight: Tensor
    bias: Tensor
    details: dict[str, Any]
    notes: tuple[str, ...] = ()

    def predict(self, features: Tensor) -> Tensor:
        """The predicted classes (N,), on the host."""
        device = self.weight.device
        parts = torch.split(features, 16384)
        scores = [F.linear(part.to(device), self.weight, self.bias).argmax(1) for part in parts]
        return torch.cat(scores).cpu()


def protocol(subject: FrozenModel, epochs: int, lr: float) -> str:
    """A description of `fit_paper`."""
    drops = " and ".join(f"{share * epochs:.0f}" for share in DROPS)
    changed = "" if (epochs, lr) == (EPOCHS, LR) else " (the paper's are 100 and 30)"
    size, lasting = subject.spec.size, f"{epochs} epoch{'s' * (epochs != 1)}"
    return (
        f"the linear protocol of MoCo v2: frozen {subject.layer} in eval mode, {lasting}, "
        f"SGD lr {lr:g}{changed}, momentum {MOMENTUM}, no weight decay, "
        f"a tenth after epochs {drops}, batch {BATCH}; trained on random crops of area .08 to 1 "
        f"at {size} px and flips, tested on: {CENTRE.describe(subject.spec)}; last epoch"
    )


def fit_paper(
    subject: FrozenModel,
    split: LabelledSplit,
    *,
    seed: int,
    epochs: int = EPOCHS,
    lr: float = LR,
    workers: int = 0,
    progress: EpochProgress = lambda done, total, loss: None,
) -> Fitted:
    """Train the layer. Raises NonFiniteLoss, with a remedy, if it diverges.

    The weights and running statistics of the subject are bit for bit the same afterwards.
    """
    before, device, classes = subject.weights, subject.device, len(split.classes)
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
        batches = training_views(spec, split, device, seed, epoch, BATCH, workers)
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
        progress(epoch + 1, epochs, losses[-1])
    if subject.weights != before:
        raise RuntimeError("the frozen network changed during a linear probe")
    details = {"epochs": epochs, "lr": lr, "batch_size": BATCH, "seed": seed}
    details |= {"train_loss": losses[-1], "square_length": mean_square}
    notes = _doubts(losses, classes, lr, mean_square)
    return Fitted(layer.weight.detach(), layer.bias.detach(), details, notes)


def test_features(split: LabelledSplit, table: Table) -> tuple[Tensor, NDArray[np.int64]]:
    """Features and labels of all test images that can be read."""
    good = np.isin(split.test_numbers, table.good)
    return table.take(split.test_numbers[good]), split.test_labels[good]


def _first_layer(width: int, classes: int, seed: int) -> nn.Linear:
    layer = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(chance.library_seed(seed, 0, Slot.EVALUATION))
    with torch.no_grad():
        layer.weight.normal_(0.0, INIT_STD, generator=generator)
        layer.bias.zero_()
    return layer


def training_views(
    spec: ViewSpec,
    split: LabelledSplit,
    device: torch.device,
    seed: int,
    epoch: int,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random views of the training images, with their labels."""
    stream = chance.library_seed(seed, 1, Slot.EVALUATION)
    order = chance.Order(stream, epoch, len(split.train_numbers))
    numbers = split.train_numbers[order[np.arange(len(split.train_numbers))]]
    labels = split.train.labels
    assert labels is not None
    bound = scoring_bound(spec)
    for batch in read_batches(split.train, numbers, batch_size, bound, workers):
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
    """Notes on why the result should not be trusted; none if it should."""
    chance_loss = math.log(classes)
    if losses[-1] > chance_loss:
        what = f"the probe did not converge: its last training loss, {losses[-1]:.3g}, is"
    elif (before := losses[max(0, round(DROPS[0] * len(losses)) - 1)]) > chance_loss:
        what = f"lr {lr:g} is too large: until its first drop, the training loss, {before:.3g}, was"
    else:
        return ()
    return (f"{what} above that of guessing, {chance_loss:.3g}; {_remedy(lr, mean_square)}",)


def _remedy(lr: float, mean_square: float) -> str:
    """The remedy: a learning rate for which SGD is stable, or the quick protocol.

    SGD with momentum m is stable for lr < 2 (1 + m) / L, and for softmax L <= |x|^2 / 2.
    `mean_square` is the mean of |x|^2 over the features of a batch.
    """
    stable = 4 * (1 + MOMENTUM) / max(mean_square, 1e-12)
    tried = float(f"{min(stable, lr / 3):.1g}")
    return (
        f"the paper's 30 was found for a ResNet-50 on ImageNet, and these features have a mean "
        f"square length of {mean_square:.3g}; try --lr {tried:g}, or --protocol quick, which "
        "needs none"
    )
