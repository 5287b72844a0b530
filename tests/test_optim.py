"""The learning rate of every epoch against the authors' formulas, and the optimisers."""

import itertools
import math

import pytest
import torch
from torch import nn

from mocokit import recipes
from mocokit.engine.optim import build_optimizer, check_fits, set_lr
from mocokit.run.build import build_parts, build_schedule
from mocokit.settings import replace
from mocokit.settings.sizes import resolve


def schedule(recipe, images=None, **changes):
    settings = replace(recipe, {k.replace("__", "."): v for k, v in changes.items()})
    return build_schedule(settings, resolve(settings, images or settings.train.batch_size * 10))


def test_v1_drops_at_epochs_120_and_160():
    lr = schedule(recipes.mocov1())
    for epoch in range(200):
        expected = 0.03 * (0.1 if epoch >= 120 else 1) * (0.1 if epoch >= 160 else 1)
        for step in (10 * epoch, 10 * epoch + 9):
            assert lr(step) == pytest.approx(expected, rel=1e-12)


def test_v2_is_a_cosine_by_epoch_from_0():
    lr = schedule(recipes.mocov2())
    for epoch in range(200):
        expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
        for step in (10 * epoch, 10 * epoch + 9):
            assert lr(step) == pytest.approx(expected, rel=1e-12)
    assert lr(1999) == pytest.approx(1.85e-6, rel=1e-2)  # the authors' last rate, never 0


def test_the_notebooks_cosine_counts_from_1_and_ends_at_0():
    lr = schedule(recipes.mocov2_cifar10())
    assert lr(0) == pytest.approx(0.059996, abs=1e-6)
    assert lr(1999) == 0.0


def test_smooth_cosine_with_warm_up():
    lr = schedule(recipes.mocov2(), optim__per="step", optim__warmup_epochs=2.0, train__epochs=10)
    rates = [lr(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.03 / 21) and rates[19] == pytest.approx(0.03 * 20 / 21)
    assert max(rates) == rates[20] == pytest.approx(0.03)
    assert rates[60] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert all(a > b for a, b in itertools.pairwise(rates[20:])) and rates[-1] > 0


@pytest.mark.parametrize(
    ("epochs", "shares"),
    [
        (0.0, []),
        (0.05, [1]),  # half a step
        (0.1, [1 / 2]),
        (0.25, [1 / 3, 2 / 3, 1]),
        (0.29, [1 / 3, 2 / 3, 1]),
        (0.3, [1 / 4, 2 / 4, 3 / 4]),
        (1.05, [n / 11 for n in range(1, 12)]),
    ],
)
@pytest.mark.parametrize("kind", ["steps", "cosine"])
def test_a_warm_up_of_any_length_rises_in_even_steps_to_the_peak(epochs, shares, kind):
    """Of ten steps an epoch: every step that the warm-up has begun before, and then the peak."""
    changes = {"optim__warmup_epochs": epochs, "train__epochs": 100}
    lr = schedule(recipes.mocov2(), optim__schedule=kind, optim__per="step", **changes)
    for step, share in enumerate(shares):
        assert lr(step) == pytest.approx(0.03 * share, rel=1e-12), step
    after = len(shares)
    slow = 0.5 * (1 + math.cos(math.pi * (after - 10 * epochs) / (1000 - 10 * epochs)))
    factor = slow if kind == "cosine" else 1
    assert lr(after) == pytest.approx(0.03 * factor, rel=1e-12)
    assert max(lr(step) for step in range(100)) > 0.03 * 0.99999


@pytest.mark.parametrize("epochs", [7, 33, 100])
def test_drops_are_shares_of_the_run(epochs):
    lr = schedule(recipes.mocov1(), train__epochs=epochs)
    first = next(s for s in range(epochs * 10) if lr(s) < 0.02)
    assert first == 10 * math.ceil(round(0.6 * epochs, 9))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_all_parameters_decay_alike(name):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(name, [{"params": [*net.parameters()]}], 0.1, 0.9, 3e-2)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 4
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 3e-2))
    set_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("share", "first"), [(0.6666666667, 6), (0.6666666666, 6), (0.667, 7)])
def test_a_share_that_a_person_rounded_is_the_epoch_they_meant(share, first):
    lr = schedule(recipes.mocov1(), train__epochs=9, optim__drops=(share,))
    assert [lr(10 * epoch) < 0.01 for epoch in range(9)] == [epoch >= first for epoch in range(9)]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_groups_have_what_they_state_and_the_rest_from_the_settings(name):
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(4)]
    stated = [{}, {"lr_scale": 0.5}, {"fixed_lr": True, "lr_scale": 3.0}, {"weight_decay": 0.25}]
    groups = [{"params": [p], **more} for p, more in zip(parameters, stated, strict=True)]
    optimizer = build_optimizer(name, groups, 0.1, 0.8, 1e-3, 0.02)
    assert type(optimizer).__name__.lower() == name
    found = [
        (group["lr"], group["weight_decay"], group.get("momentum"), group.get("trust"))
        for group in optimizer.param_groups
    ]
    momentum, trust = (None if name == "adamw" else 0.8), (0.02 if name == "lars" else None)
    assert found == [
        (0.1, 1e-3, momentum, trust),
        (0.05, 1e-3, momentum, trust),
        (pytest.approx(0.3), 1e-3, momentum, trust),
        (0.1, 0.25, momentum, trust),
    ]
    set_lr(optimizer, 0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01, 0.005, 0.3, 0.01])
    set_lr(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.02, 0.01, 0.3, 0.02]
    )


def test_sgd_is_the_textbooks_without_nesterov():
    net = nn.Linear(2, 1, bias=False)
    weight, velocity = net.weight.detach().clone(), torch.zeros(1, 2)
    optimizer = build_optimizer("sgd", [{"params": [*net.parameters()]}], 0.1, 0.9, 0.01)
    for step in range(4):
        gradient = torch.tensor([[1.0, -2.0]]) * (step + 1)
        net.weight.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.01 * weight
        weight = weight - 0.1 * velocity
    torch.testing.assert_close(net.weight.detach(), weight)


def test_only_the_query_encoder_is_optimised():
    settings = replace(
        recipes.demo(),
        {
            "engine.precision": "float32",
            "engine.memory_format": "contiguous",
            "engine.compile": False,
        },
    )
    parts = build_parts(settings, resolve(settings, 6000), torch.device("cpu"))
    optimised = {id(p) for p in parts.optimizer.param_groups[0]["params"]}
    assert optimised == {id(p) for p in parts.method.encoder.parameters()}
    for p, q in zip(
        parts.method.encoder.parameters(), parts.method.key_encoder.parameters(), strict=True
    ):
        assert torch.equal(p, q)


def test_channels_last_is_applied():
    changes = {"engine.memory_format": "channels_last", "engine.compile": False}
    settings = replace(recipes.demo(), changes | {"engine.precision": "float32"})
    method = build_parts(settings, resolve(settings, 6000), torch.device("cpu")).method
    for encoder in (method.encoder, method.key_encoder):
        weight = encoder.backbone.stages[1].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(3, 2).T, True),
        (torch.tensor(5.0), True),  # a count of steps
        (None, True),  # momentum before the first step
        (7, True),
        (0.5, True),
        (torch.zeros(3, 2), False),
        (torch.zeros(6), False),
        (torch.zeros(1, 2, 3), False),
        (torch.zeros(2, 1), False),
        (torch.zeros(1), False),
        (torch.zeros(0), False),
        (torch.zeros(2, 4), False),
        ([0.0], False),
        ("0", False),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_a_buffer_of_another_shape_is_refused(value, fits, at):
    """Also in the second of two parameters, and beside a buffer that fits."""
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(2)]
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for parameter in parameters:
        sgd.state[parameter] = {"step": 3, "momentum_buffer": torch.zeros(2, 3)}
    sgd.state[parameters[at]]["momentum_buffer"] = value
    if fits:
        check_fits(sgd)
        return
    with pytest.raises(ValueError, match="optimiser's momentum_buffer is not of its parameter's"):
        check_fits(sgd)
