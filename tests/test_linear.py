"""Linear probes: the quick one against scikit-learn, the paper's against its protocol."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn import functional as F

from mocokit import recipes
from mocokit.data.sources.arrays import ArraySource
from mocokit.errors import NonFiniteLoss, UserError
from mocokit.nets.backbones import build_backbone
from mocokit.protocols import linear_paper, linear_quick
from mocokit.protocols.labelled import labelled_split
from mocokit.protocols.linear_quick import Data, compute_moments, fit_quick, ridge, solve
from mocokit.protocols.table import Table, features_of
from mocokit.protocols.training import TrainingViews
from mocokit.weights.encoder import view_spec
from mocokit.weights.subject import FrozenModel, weights_hash

CPU = torch.device("cpu")


def data(count=400, width=12, classes=4, seed=0):
    """Overlapping classes, on features of very different scale, one of which never moves."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = centres[labels] + 1.5 * torch.randn(count, width, generator=generator)
    features = features * torch.logspace(-2, 2, width) + 3
    features[:, 0] = 7.0
    return Data(features, labels, classes, CPU)


def standardised(moments, features):
    return ((features - moments.mean) / moments.std).double().numpy()


@pytest.fixture(autouse=True)
def _pieces(monkeypatch):
    monkeypatch.setattr(linear_quick, "ROWS", 150)  # several pieces, the last one short
    monkeypatch.setattr(linear_quick, "TOLERANCE", 0.0)


def test_ridge_is_scikit_learns():
    some, penalties = data(), (1e-3, 0.1, 10.0)
    moments = compute_moments(some)
    weight, bias = ridge(some, penalties, moments)
    inputs, targets = standardised(moments, some.features), np.eye(4)[some.labels.numpy()]
    for at, penalty in enumerate(penalties):
        # Theirs sums over the images where ours takes the mean.
        other = Ridge(alpha=penalty * len(inputs), solver="cholesky").fit(inputs, targets)
        np.testing.assert_allclose(weight[at].numpy(), other.coef_.T, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(bias.numpy(), other.intercept_, rtol=1e-4)


def test_logistic_regression_is_scikit_learns():
    some, penalties = data(), (1e-3, 1e-2, 1.0)
    moments = compute_moments(some)
    inputs = standardised(moments, some.features)
    fresh = data(300, seed=0).features.flip(0)
    for penalty, layer in zip(penalties, solve(some, penalties, 500, moments), strict=True):
        other = LogisticRegression(C=1 / (penalty * len(inputs)), max_iter=5000, tol=1e-10)
        other.fit(inputs, some.labels.numpy())
        ours = fresh @ layer.weight.T + layer.bias
        theirs = other.predict_log_proba(standardised(moments, fresh))
        np.testing.assert_allclose(ours.log_softmax(1).numpy(), theirs, atol=0.03)
        assert (ours.argmax(1).numpy() == theirs.argmax(1)).mean() > 0.99
        assert bool((layer.weight[:, 0] == 0).all())  # of a feature that never moves


def test_all_penalties_at_once_are_each_alone():
    some, penalties = data(), (1e-4, 1e-2, 1.0)
    for one, penalty in zip(
        solve(some, penalties, 300, compute_moments(some)), penalties, strict=True
    ):
        (alone,) = solve(some, (penalty,), 300, compute_moments(some))
        np.testing.assert_allclose(one.weight.numpy(), alone.weight.numpy(), rtol=1e-3, atol=1e-4)


def test_every_step_goes_down_whatever_the_features():
    """Nearly collinear features: the bound on the curvature is what keeps the step safe."""
    some = data()
    twisted = some.features[:, 1:2] + 1e-3 * some.features
    hard = dataclasses.replace(some, features=torch.cat([some.features, twisted], 1))
    losses = [
        float(solve(hard, (1e-4,), steps, compute_moments(hard))[0].details["train_loss"])
        for steps in (1, 3, 9, 60)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < math.log(4)


def spec(size=32):
    return dataclasses.replace(view_spec(recipes.demo()), size=size, resize=size)


def source(count, seed, classes=3, noise=30):
    """Classes by colour, under noise."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    colours = np.linspace(40, 210, classes)
    images = colours[labels][:, None, None, None] + draw.normal(0, noise, (count, 32, 32, 3))
    return ArraySource(images.clip(0, 255).astype(np.uint8), labels, "toy")


def subject(network=None):
    torch.manual_seed(0)
    network = (network or build_backbone("resnet_tiny")).eval().requires_grad_(False)
    return FrozenModel("toy", network, 64, spec(), "resnet_tiny")


class Colours(nn.Module):
    """(N, 3, H, W) -> (N, 64): mean colours, times `scale`."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.weight = scale, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.mean((2, 3)).repeat(1, 22)[:, :64] * self.scale


def test_quick_chooses_on_training_images_and_never_looks_at_the_test():
    train, test = source(120, 0), source(60, 1)
    split, judged = labelled_split(train, test, seed=0), subject()
    table = features_of(judged, train)
    fitted = fit_quick(split, table, CPU, seed=0)
    assert fitted.details["penalty"] in linear_quick.PENALTIES
    assert len(fitted.details["held_out_accuracy"]) == len(linear_quick.PENALTIES)
    other = labelled_split(train, source(60, 9, classes=3), seed=0)
    again = fit_quick(other, table, CPU, seed=0)
    assert torch.equal(fitted.weight, again.weight)
    features, labels = linear_paper.test_features(split, features_of(judged, test))
    assert (fitted.predict(features).numpy() == labels).mean() > 0.9


@pytest.mark.parametrize("penalties", [(1e-5,), (1e-4,), (1e-2, 1e-4)])
def test_the_quick_probe_is_the_optimum_over_all_training_images(penalties):
    """The last layer is not of the images and steps that chose its penalty."""
    some = data()
    images = ArraySource(np.zeros((400, 1, 1, 3), np.uint8), some.labels.numpy(), "toy")
    split = labelled_split(images, images, seed=0)
    fitted = fit_quick(split, Table(some.features.numpy()), CPU, seed=0, penalties=penalties)
    penalty = fitted.details["penalty"]
    varied = some.features[:, 1:].double()  # all but the one that never moves
    std = varied.std(0, correction=0)
    inputs = (varied - varied.mean(0)) / std

    def loss(scores, weight):
        return float(F.cross_entropy(scores, some.labels) + penalty * weight.square().sum() / 2)

    other = LogisticRegression(C=1 / (penalty * 400), max_iter=20_000, tol=1e-10)
    other.fit(inputs.numpy(), some.labels.numpy())
    weight, bias = torch.from_numpy(other.coef_), torch.from_numpy(other.intercept_)
    scores = (some.features @ fitted.weight.T + fitted.bias).double()
    ours = loss(scores, fitted.weight[:, 1:].double() * std)
    assert abs(ours - loss(inputs @ weight.T + bias, weight)) < 1e-5


def test_of_much_data_a_part_chooses(monkeypatch):
    monkeypatch.setattr(linear_quick, "CHOICE_WORK", 1.0)
    monkeypatch.setattr(linear_quick, "CHOICE_IMAGES", 6)
    seen, plain = [], linear_quick.solve
    monkeypatch.setattr(
        linear_quick,
        "solve",
        lambda data, *rest: seen.append((len(data.labels), *rest[3:])) or plain(data, *rest),
    )
    split = labelled_split(source(300, 0), source(60, 1), seed=0)
    table = features_of(subject(), split.train)
    fitted = fit_quick(split, table, CPU, seed=0)
    # The slack: 1 where the moments are of these images, else how many more they are of.
    assert seen == [(18, 1.0), (300,)] and fitted.details["train_loss"] < 0.5
    monkeypatch.undo()
    monkeypatch.setattr(
        linear_quick, "solve", lambda data, *rest: seen.append(rest[3:]) or plain(data, *rest)
    )
    fit_quick(split, table, CPU, seed=0)
    assert seen[2:] == [(300 / 270,), ()]


@pytest.mark.parametrize("work", [1.0, 1e9], ids=["much", "little"])
def test_the_penalty_is_chosen_on_images_it_is_not_fitted_to(monkeypatch, work):
    monkeypatch.setattr(linear_quick, "CHOICE_WORK", work)
    monkeypatch.setattr(linear_quick, "CHOICE_IMAGES", 6)
    fitted, judged, plain, predict = [], [], linear_quick.solve, linear_paper.Fitted.predict

    def rows(features):
        return {*map(tuple, features.tolist())}

    def solved(part, penalties, steps, moments, slack):
        fitted.append(rows(part.features))
        of = part if work == 1.0 else some  # whose moments are there
        torch.testing.assert_close(moments.mean, of.features.mean(0), rtol=1e-4, atol=1e-4)
        return plain(part, penalties, steps, moments, slack)

    def predicted(self, features):
        judged.append(rows(features))
        return predict(self, features)

    monkeypatch.setattr(linear_quick, "solve", solved)
    monkeypatch.setattr(linear_paper.Fitted, "predict", predicted)
    some = data(300)
    for seed in range(3):
        linear_quick._choose(some, compute_moments(some), (1e-3, 1e-1), seed)
    assert len(fitted) == 3 and len(judged) == 6 and len({*map(frozenset, judged)}) == 3
    for chosen, held_out in zip(fitted, judged[::2], strict=True):
        most = 26 if work == 1.0 else 300 - len(held_out)  # six of each class, rounded
        assert most - 4 <= len(chosen) <= most
        assert 25 < len(held_out) < 35 and not chosen & held_out
        assert chosen | held_out <= rows(some.features)


@pytest.mark.parametrize(
    ("chosen", "shares", "told"),
    [
        (9.0, [0.5, 0.6, 0.7], True),
        (9.0, [0.5, 0.7, 0.7], False),
        (1.0, [0.7, 0.6, 0.5], False),
        (1.0, [], False),
    ],
)
def test_a_best_penalty_that_is_the_strongest_is_told(monkeypatch, chosen, shares, told):
    seen = []
    monkeypatch.setattr(linear_quick, "_choose", lambda *of: seen.append(of[2]) or (chosen, shares))
    split = labelled_split(source(60, 0), source(20, 1), seed=0)
    table = features_of(subject(), split.train)
    fitted = fit_quick(split, table, CPU, seed=0, penalties=(1.0, 3.0, 9.0))
    assert seen == [(1.0, 3.0, 9.0)] and fitted.details["penalties"] == [1.0, 3.0, 9.0]
    assert fitted.notes == (
        ("the best penalty, 9, is the strongest of those tried",) if told else ()
    )


def test_of_equally_good_penalties_the_strongest_is_chosen():
    """Classes far apart: every penalty is right about every image held out."""
    labels = torch.arange(200) % 2
    apart = 100.0 * labels[:, None] + torch.randn(
        200, 4, generator=torch.Generator().manual_seed(0)
    )
    some = Data(apart, labels, 2, CPU)
    for penalties in (linear_quick.PENALTIES, linear_quick.PENALTIES[::-1]):
        chosen, shares = linear_quick._choose(some, compute_moments(some), penalties, 0)
        assert set(shares) == {1.0} and chosen == max(penalties)


@pytest.mark.parametrize(
    ("lr", "mean_square", "tried"),
    [
        (30.0, 0.01, 10),  # a third, where even more would be stable
        (30.0, 76.0, 0.1),  # 4 (1 + .9) / 76
        (0.3, 0.01, 0.1),
        (30.0, 0.0, 10),
    ],
)
def test_the_rate_to_try_is_stable_and_lower(lr, mean_square, tried):
    """SGD with momentum m is stable below 2 (1 + m) / L, and L is at most half the energy."""
    assert f"try --lr {tried:g}, or" in linear_paper._remedy(lr, mean_square)


def test_quick_needs_two_classes():
    """Of images that can be read."""
    split = labelled_split(source(40, 0, classes=2), source(10, 1, classes=2), seed=0)
    rows = np.ones((40, 5), np.float32)
    rows[split.train_labels == 1] = np.nan
    with pytest.raises(UserError, match="two classes"):
        fit_quick(split, Table(rows), CPU, seed=0)


def test_features_beyond_floats_are_refused():
    split = labelled_split(source(60, 0), source(20, 1), seed=0)
    rows = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32) * 1e30
    with pytest.raises(NonFiniteLoss, match="too large to be squared"):
        fit_quick(split, Table(rows), CPU, seed=0)


def test_images_that_cannot_be_read_are_left_out():
    split = labelled_split(source(60, 0), source(20, 1), seed=0)
    rows = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    rows[::7] = np.nan
    fitted = fit_quick(split, Table(rows), CPU, seed=0)
    assert bool(fitted.weight.isfinite().all())
    rows = rows[:20]
    features, labels = linear_paper.test_features(split, Table(rows))
    assert len(features) == len(labels) == 17 and bool(features.isfinite().all())


def test_paper_is_the_authors_protocol(monkeypatch):
    """What reaches the optimiser, and when; the network and its statistics stay, bit for bit."""
    seen, made = [], []
    plain = torch.optim.SGD

    class Watched(plain):
        def __init__(self, parameters, **options):
            super().__init__(list(parameters), **options)
            made.append([p.detach().clone() for g in self.param_groups for p in g["params"]])

        def step(self, closure=None):
            (group,) = self.param_groups
            seen.append((group["lr"], group["momentum"], group["weight_decay"]))
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    judged, train = subject(), source(300, 0)
    batches = []
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, x: batches.append((self, len(x))) or self.forward(x)
    )
    before = weights_hash(judged.network)
    linear_paper.fit_paper(judged, labelled_split(train, source(20, 1), seed=0), seed=0, epochs=10)
    assert weights_hash(judged.network) == before and not judged.network.training
    assert len(seen) == 20  # 300 images in batches of 256: the last partial batch counts
    assert {(m, w) for _, m, w in seen} == {(0.9, 0.0)}
    rates = [rate for rate, _, _ in seen[::2]]
    assert rates == pytest.approx([30.0] * 6 + [3.0] * 2 + [0.3] * 2)
    ((weight, bias),) = made
    assert weight.shape == (3, 64) and bool((bias == 0).all())
    assert float(weight.std()) == pytest.approx(0.01, rel=0.2) and abs(float(weight.mean())) < 0.003


def test_the_papers_own_numbers():
    assert (linear_paper.EPOCHS, linear_paper.LR, linear_paper.BATCH) == (100, 30.0, 256)
    words = linear_paper.protocol(subject(), 100, 30.0)
    assert "after epochs 60 and 80" in words and "the paper's are" not in words
    assert "(the paper's are 100 and 30)" in linear_paper.protocol(subject(), 100, 1.0)


def test_training_views_are_random_crops_and_flips_and_orders_differ():
    judged, train = subject(), source(64, 0)
    split = labelled_split(train, source(8, 1), seed=0)
    from mocokit.protocols.features import probe_spec

    random = probe_spec(judged.spec)
    assert random.crop_area == (0.08, 1.0) and random.order == ("crop", "flip")
    assert random.flip_probability == 0.5 and random.crop_ratio == (3 / 4, 4 / 3)

    def epoch(number, seed=0):
        views, labels = zip(*TrainingViews(random, split, CPU, seed, number, 16, 0), strict=True)
        return torch.cat(views), torch.cat(labels)

    (a, first), (b, second) = epoch(0), epoch(1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(train.labels.tolist())
    assert not torch.equal(first, second) and not torch.equal(a, b)
    again, _ = epoch(0)
    assert torch.equal(a, again) and not torch.equal(a, epoch(0, seed=1)[0])


def test_paper_learns_what_is_there_to_learn():
    judged, train = subject(Colours()), source(300, 0, noise=10)
    split = labelled_split(train, source(60, 1, noise=10), seed=0)
    fitted = linear_paper.fit_paper(judged, split, seed=0, epochs=20, lr=1.0)
    features, labels = linear_paper.test_features(split, features_of(judged, split.test))
    assert (fitted.predict(features).numpy() == labels).mean() == 1.0 and fitted.notes == ()


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_square_length_is_of_the_first_batch(epochs):
    """Which is drawn anew in each epoch, so that a later one, or all of them, have another."""
    train, judged = source(300, 0), subject(Colours(2.0))
    split = labelled_split(train, source(20, 1), seed=0)
    views = TrainingViews(linear_paper.probe_spec(judged.spec), split, CPU, 7, 0, 256, 0)
    images, _ = next(iter(views))
    assert len(images) == 256
    rows = 2 * images.double().mean((2, 3)).repeat(1, 22)[:, :64]
    expected = float((rows**2).sum(1).mean())
    fitted = linear_paper.fit_paper(judged, split, seed=7, epochs=epochs)
    assert fitted.details["square_length"] == pytest.approx(expected, rel=1e-5)


def test_a_diverging_probe_says_so_and_what_to_do():
    split = labelled_split(source(300, 0), source(20, 1), seed=0)
    with pytest.raises(NonFiniteLoss, match=r"diverged in epoch 1: .* try --lr .*--protocol quick"):
        linear_paper.fit_paper(subject(Colours(1e30)), split, seed=0, epochs=5)
    fitted = linear_paper.fit_paper(subject(Colours(100.0)), split, seed=0, epochs=5)
    assert "above that of guessing" in fitted.notes[0] and "try --lr" in fitted.notes[0]


def test_a_network_that_changes_is_found_out():
    class Restless(Colours):
        def forward(self, images):
            with torch.no_grad():
                self.weight += 1
            return super().forward(images)

    split = labelled_split(source(20, 0), source(8, 1), seed=0)
    with pytest.raises(RuntimeError, match="frozen network changed"):
        linear_paper.fit_paper(subject(Restless()), split, seed=0, epochs=1)
