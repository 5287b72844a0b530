"""A linear probe in a minute: multinomial logistic regression on cached features.

All penalties are solved together. The curvature of softmax is at most half that of least squares
(Böhning 1992, "Multinomial logistic regression algorithm"). One eigendecomposition of the
correlation of the features therefore gives a step for each penalty that never overshoots, without
a learning rate. Nesterov's momentum needs few of these steps; it restarts if it points uphill. Each
penalty starts at its ridge regression, which the same decomposition gives in closed form.

Features are standardised, so that one range of penalties suits every network.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mocokit.chance import Slot
from mocokit.engine.stop import raise_if_interrupted
from mocokit.errors import NonFiniteLoss
from mocokit.protocols.labelled import LabelledSplit, check_classes
from mocokit.protocols.linear_paper import Fitted
from mocokit.protocols.split import hold_out, stratified
from mocokit.protocols.table import CENTRE, Table, Transform
from mocokit.weights.subject import FrozenModel

PENALTIES = tuple(10.0**power for power in (-5, -4, -3, -2, -1, 0))  # relative to the mean loss
CHOICE_SHARE = 0.1  # of the training images, held out to choose the penalty
CHOICE_WORK = 1e9  # limit on images x features x classes while the penalty is chosen
CHOICE_IMAGES = 50  # average images per class that are used in spite of this limit
STEPS, CHOICE_STEPS = 100, 50
TOLERANCE = 1e-5  # stop once no mean loss changes by this share or more
ROWS = 16384  # rows of features on the device at once
OUTPUTS = 2**25  # scores on the device at once: 128 MiB in float32


class Moments(NamedTuple):
    """Mean and standard deviation of each feature, and the eigenvectors of the correlation."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    values: Tensor  # (D,) eigenvalues, ascending
    vectors: Tensor  # (D, D), one eigenvector per column


@dataclass(frozen=True)
class Data:
    """Features (N, D), which may lie on disk, with labels (N,) in [0, classes)."""

    features: Tensor
    labels: Tensor
    classes: int
    device: torch.device

    def rows(self, numbers: NDArray[np.int64]) -> "Data":
        """The data of these images."""
        index = torch.from_numpy(numbers)
        return Data(self.features[index], self.labels[index], self.classes, self.device)

    def parts(self, outputs: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Blocks of rows, not yet on the device, small enough for `outputs` scores per row."""
        rows = max(1, min(ROWS, OUTPUTS // outputs))
        return list(
            zip(torch.split(self.features, rows), torch.split(self.labels, rows), strict=True)
        )


def protocol(subject: FrozenModel, transform: Transform, seed: int) -> str:
    """A description of `fit_quick`."""
    low, high = PENALTIES[0], PENALTIES[-1]
    return (
        f"quick linear probe (not the paper's protocol): logistic regression on standardised "
        f"{subject.layer} features, L2 penalty of {low:g} to {high:g} chosen on a tenth of the "
        f"training images (seed {seed}) and refitted on all; trained on one view an image: "
        f"{transform.describe(subject.spec)}; tested on: {CENTRE.describe(subject.spec)}"
    )


def fit_quick(
    split: LabelledSplit,
    table: Table,
    device: torch.device,
    *,
    seed: int,
    penalties: tuple[float, ...] = (),
) -> Fitted:
    """Choose a penalty on held-out training images, then fit all training images.

    `table` holds the features of split.train. Raises UserError for fewer than two classes.
    """
    if device.type == "mps":
        device = torch.device("cpu")  # MPS has no doubles
    penalties = penalties or PENALTIES
    good = np.isin(split.train_numbers, table.good)
    numbers, labels = split.train_numbers[good], split.train_labels[good]
    check_classes(labels, split.train.name)
    classes = len(split.classes)
    everything = Data(table.take(numbers), torch.from_numpy(labels), classes, device)
    moments = compute_moments(everything)
    chosen, shares = _choose(everything, moments, penalties, seed)
    (layer,) = solve(everything, (chosen,), STEPS, moments)
    details = {
        "penalty": chosen,
        "penalties": list(penalties),
        "held_out_accuracy": [round(share, 6) for share in shares],
        "seed": seed,
        **layer.details,
    }
    notes: tuple[str, ...] = ()
    if shares and chosen == max(penalties) and shares[-1] > max(shares[:-1]):
        notes = (f"the best penalty, {chosen:g}, is the strongest of those tried",)
    return Fitted(layer.weight, layer.bias, details, notes)


def _choose(
    data: Data, moments: Moments, penalties: tuple[float, ...], seed: int
) -> tuple[float, list[float]]:
    """The penalty with the best accuracy on held-out images, and the accuracy of each."""
    labels = data.labels.numpy()
    kept, held_out = hold_out(labels, CHOICE_SHARE, seed, Slot.CHOICE)
    if not len(held_out) or len(penalties) == 1:
        return penalties[len(penalties) // 2], []
    slack = len(labels) / len(kept)
    few = max(CHOICE_WORK / (data.features.shape[1] * data.classes), CHOICE_IMAGES * data.classes)
    if few < len(kept):
        kept = kept[stratified(labels[kept], few / len(kept), seed, Slot.LABELS)]
        moments, slack = compute_moments(data.rows(kept)), 1.0
    solved = solve(data.rows(kept), penalties, CHOICE_STEPS, moments, slack)
    unseen = data.rows(held_out)
    shares = [
        float((one.predict(unseen.features) == unseen.labels).float().mean()) for one in solved
    ]
    # Of equally good penalties the strongest, because it gives the simplest layer.
    best = max(range(len(shares)), key=lambda at: (shares[at], penalties[at]))
    return penalties[best], shares


def compute_moments(data: Data) -> Moments:
    """One pass for the mean, one for the correlation. Constant features become zero."""
    count, width = data.features.shape
    mean = torch.zeros(width, dtype=torch.double, device=data.device)
    for part, _ in data.parts():
        mean += part.to(data.device).double().sum(0) / count
    shift = mean.float()
    second = torch.zeros(width, width, dtype=torch.double, device=data.device)
    for part, _ in data.parts():
        centred = part.to(data.device) - shift
        second += (centred.T @ centred).double()
    second /= count
    if not bool(second.isfinite().all()):
        raise NonFiniteLoss(
            "the features are not finite, or too large to be squared in float32, so they allow no "
            "linear probe; check the weights, or use --layer head"
        )
    std = second.diagonal().sqrt().float()
    std = torch.where(std > 1e-6 * std.max().clamp_min(1e-30), std, torch.inf)
    correlation = second / std.double() / std.double()[:, None]
    values, vectors = torch.linalg.eigh(correlation)
    return Moments(shift, std, values.clamp_min(0).float(), vectors.float())


def ridge(data: Data, penalties: tuple[float, ...], moments: Moments) -> tuple[Tensor, Tensor]:
    """Least squares on one-hot labels for each penalty: W (R, D, C), b (C,).

    Minimises the mean of |Wx + b - y|^2 / 2 plus penalty |W|^2 / 2, on standardised features.
    """
    cross = torch.zeros(len(moments.std), data.classes, device=data.device)
    counts = torch.bincount(data.labels, minlength=data.classes).to(data.device).float()
    for part, labels in data.parts():
        centred = (part.to(data.device) - moments.mean) / moments.std
        cross.index_add_(1, labels.to(data.device), centred.T.contiguous())
    rotated = moments.vectors.T @ (cross / len(data.labels))  # (D, C); centring y changes nothing
    scale = 1 / (moments.values + torch.tensor(penalties, device=data.device)[:, None])  # (R, D)
    return moments.vectors @ (scale[:, :, None] * rotated), counts / counts.sum()


def solve(
    data: Data, penalties: tuple[float, ...], steps: int, moments: Moments, slack: float = 1.0
) -> list[Fitted]:
    """Logistic regression for every penalty, as layers on features that are not standardised.

    `moments` are those of these features, or of `slack` times as many features that include them.
    The curvature of these features is then at most `slack` times as large.
    """
    penalty = torch.tensor(penalties, device=data.device)[:, None, None]
    start, prior = ridge(data, penalties, moments)
    weight = start * min(4.0, float(data.classes))  # log-odds are larger than one-hot targets
    bias = (prior.clamp_min(1e-8).log()).expand(len(penalties), 1, -1).clone()
    # Böhning's bound: along each eigenvector the curvature is at most slack x value / 2 + penalty,
    # at every point. Its inverse is a step that never overshoots.
    inverse_curvature = 1 / (
        slack * moments.values / 2 + torch.tensor(penalties, device=data.device)[:, None]
    )
    position, fast_weight, fast_bias = torch.ones(len(penalties), device=data.device), weight, bias
    losses = torch.full((len(penalties),), torch.inf, device=data.device)
    best_weight, best_bias, taken = weight, bias, 0
    for taken in range(1, steps + 1):
        raise_if_interrupted()
        loss, slope, slope_bias = _gradient(data, moments, fast_weight, fast_bias)
        loss = loss + (penalty * fast_weight.square()).sum((1, 2)) / 2
        slope = slope + penalty * fast_weight
        better = loss < losses
        best_weight = torch.where(better[:, None, None], fast_weight, best_weight)
        best_bias = torch.where(better[:, None, None], fast_bias, best_bias)
        gain = (losses - loss) / losses.abs().clamp_min(1e-12)
        finished = taken > 5 and bool((gain.abs() < TOLERANCE).all())
        losses = torch.minimum(loss, losses)
        if finished:
            break
        rotated = moments.vectors.T @ slope
        after = fast_weight - moments.vectors @ (inverse_curvature[:, :, None] * rotated)
        after_bias = fast_bias - 2 / slack * slope_bias  # its curvature is at most slack / 2
        # Adaptive restart (O'Donoghue and Candès 2015): reset momentum that points uphill.
        uphill = ((after - weight) * slope).sum((1, 2)) + ((after_bias - bias) * slope_bias).sum(
            (1, 2)
        ) > 0
        position = torch.where(uphill, 1.0, position)
        later = (1 + (1 + 4 * position.square()).sqrt()) / 2
        momentum = ((position - 1) / later)[:, None, None]
        fast_weight = after + momentum * (after - weight)
        fast_bias = after_bias + momentum * (after_bias - bias)
        weight, bias, position = after, after_bias, later
    return [
        _on_raw_features(moments, best_weight[at], best_bias[at, 0], float(losses[at]), taken)
        for at in range(len(penalties))
    ]


def _gradient(
    data: Data, moments: Moments, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean cross-entropy (R,), and its gradients by weight (R, D, C) and bias (R, 1, C)."""
    count, width = data.features.shape
    runs, _, classes = weight.shape
    # Standardising is folded into the weights, because a copy of the features may not fit.
    scaled = weight / moments.std[:, None]  # (R, D, C)
    shift = bias - (moments.mean @ scaled)[:, None]  # (R, 1, C)
    flat = scaled.permute(1, 0, 2).reshape(width, runs * classes)
    loss = torch.zeros(runs, device=data.device)
    slope = torch.zeros(width, runs * classes, device=data.device)
    excess = torch.zeros(runs * classes, device=data.device)
    for part, labels in data.parts(runs * classes):
        part, labels = part.to(data.device), labels.to(data.device)
        logits = (part @ flat + shift.reshape(-1)).view(len(part), runs, classes)
        chances = F.log_softmax(logits, dim=2)
        one = labels[:, None, None].expand(-1, runs, 1)
        loss -= chances.gather(2, one).sum((0, 2))
        wrong = chances.exp_()
        wrong.scatter_add_(2, one, -torch.ones_like(one, dtype=wrong.dtype))
        flat_wrong = wrong.view(len(part), -1)
        slope += part.T @ flat_wrong
        excess += flat_wrong.sum(0)
    slope -= moments.mean[:, None] * excess
    slope = slope.view(width, runs, classes).permute(1, 0, 2) / moments.std[:, None]
    return loss / count, slope / count, excess.view(runs, 1, classes) / count


def _on_raw_features(
    moments: Moments, weight: Tensor, bias: Tensor, loss: float, steps: int
) -> Fitted:
    scaled = (weight / moments.std[:, None]).T.contiguous()  # (C, D)
    details = {"train_loss": loss, "steps": steps}
    return Fitted(scaled, bias - scaled @ moments.mean, details)
