"""The linear classifier of MoCo v1 and v2, exactly as in the authors' main_lincls.py.

The backbone is frozen and in eval mode. One linear layer, with weights N(0, .01) and biases 0, is
trained on random crops for 100 epochs. SGD has no weight decay and the learning rate 30, which the
authors found by grid search; it drops to a tenth after epochs 60 and 80. The authors report the
best epoch on the test set; here the last epoch is reported.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mocokit import chance
from mocokit.chance import Slot
from mocokit.engine.finite import FiniteWatch, check_weights
from mocokit.errors import NonFiniteLoss
from mocokit.nets.modes import evaluating
from mocokit.protocols.defaults import Linear
from mocokit.protocols.features import probe_spec
from mocokit.protocols.labelled import LabelledSplit
from mocokit.protocols.states import EndOf, State, States
from mocokit.protocols.table import CENTRE, Table
from mocokit.protocols.training import Epoch, TrainingViews
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
    states: States | None = None,
) -> Fitted:
    """Train the layer, from where an earlier attempt left its state in `states`.

    The weights and running statistics of the subject are bit for bit the same afterwards. Raises
    NonFiniteLoss, with a remedy, if it diverges; Stopped, once its state is saved, after a signal;
    MocokitError where the state cannot be saved then.
    """
    values = {"probe": "linear paper", "seed": seed, "epochs": epochs, "lr": lr, "batch": BATCH}
    with (states or States()).of(subject.name, subject, split, values) as state:
        return _Fit(subject, split, seed, epochs, lr, workers, state).run(progress)


class _Fit:
    """A layer in training, with everything that its next step needs."""

    def __init__(
        self,
        subject: FrozenModel,
        split: LabelledSplit,
        seed: int,
        epochs: int,
        lr: float,
        workers: int,
        state: State,
    ) -> None:
        self.subject, self.split, self.seed, self.workers = subject, split, seed, workers
        self.epochs, self.lr, self.state = epochs, lr, state
        self.device = subject.device
        self.layer = _first_layer(subject.width, len(split.classes), seed).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.layer.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=0.0
        )
        assert sum(len(group["params"]) for group in self.optimizer.param_groups) == 2
        self.watch, self.losses, self.mean_square = FiniteWatch(self.device), list[float](), 0.0
        self.epoch = Epoch.first(self.device)
        if (found := state.found) is not None:
            self.layer.load_state_dict(found["layer"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.losses, self.mean_square = list(found["losses"]), found["mean_square"]
            self.epoch.load(found["epoch"])

    def content(self) -> dict[str, Any]:
        """Raises NonFiniteLoss rather than let a broken layer be saved."""
        self._check()
        return {
            "layer": self.layer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "mean_square": self.mean_square,
            "epoch": self.epoch.state(),
        }

    def run(self, progress: EpochProgress) -> Fitted:
        before = self.subject.weights
        while self.epoch.number < self.epochs:
            self._train_epoch(progress)
        if self.subject.weights != before:
            raise RuntimeError("the frozen network changed during a linear probe")
        details = {"epochs": self.epochs, "lr": self.lr, "batch_size": BATCH, "seed": self.seed}
        details |= {"train_loss": self.losses[-1], "square_length": self.mean_square}
        notes = _doubts(self.losses, len(self.split.classes), self.lr, self.mean_square)
        return Fitted(self.layer.weight.detach(), self.layer.bias.detach(), details, notes)

    def _train_epoch(self, progress: EpochProgress) -> None:
        epoch, at = self.epoch, self.epoch.number
        drops = sum(at >= round(share * self.epochs) for share in DROPS)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * 0.1**drops
        batches = TrainingViews(
            probe_spec(self.subject.spec),
            self.split,
            self.device,
            self.seed,
            at,
            BATCH,
            self.workers,
            epoch.batches,
        )
        for views, labels in batches:
            with evaluating(self.subject.network):
                features = self.subject.features(views)
            if at == 0 and epoch.seen == 0:
                self.mean_square = float(features.square().sum(1).mean())
            value = F.cross_entropy(self.layer(features), labels)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            self.optimizer.step()
            self.watch.note(at * 10**6 + batches.done - 1, value)
            epoch.add(value, len(labels))
            epoch.batches = batches.done
            if batches.done < len(batches):
                self._reached(len(batches), "step")
        self._check()
        self.losses.append(epoch.end())
        self._reached(len(batches), "epoch" if epoch.number < self.epochs else "end")
        progress(epoch.number, self.epochs, self.losses[-1])

    def _reached(self, batches: int, end_of: EndOf) -> None:
        step, words = self.epoch.place(batches, self.epochs)
        self.state.reached(step, words, self.content, end_of)

    def _check(self) -> None:
        try:
            self.watch.check()
            check_weights(self.layer, self.epoch.number)
        except NonFiniteLoss:
            raise NonFiniteLoss(
                f"the linear probe diverged in epoch {self.epoch.number + 1}: its loss or its "
                f"weights are not finite; {_remedy(self.lr, self.mean_square)}"
            ) from None


def test_features(split: LabelledSplit, table: Table) -> tuple[Tensor, NDArray[np.int64]]:
    """Features and labels of all test images that can be read. Raises UserError if none can."""
    good = np.isin(split.test_numbers, table.good)
    if not good.any():
        raise split.unreadable_test()
    return table.take(split.test_numbers[good]), split.test_labels[good]


def _first_layer(width: int, classes: int, seed: int) -> nn.Linear:
    layer = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(chance.library_seed(seed, 0, Slot.EVALUATION))
    with torch.no_grad():
        layer.weight.normal_(0.0, INIT_STD, generator=generator)
        layer.bias.zero_()
    return layer


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
