"""LARS against SimCLR's formula, layer by layer, and against timm's where the two agree."""

import pytest
import torch
from timm.optim import Lars
from torch import nn

from mocokit.engine.optim import LARS


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)).double()


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    model(inputs).square().sum().backward()


def transcribed(parameters, velocities, lr, momentum, decay, trust):
    """google-research/simclr's lars_optimizer.py in words: classic momentum, two exclusions."""
    with torch.no_grad():
        for number, p in enumerate(parameters):
            gradient, rate = p.grad.clone(), lr
            if p.ndim > 1:  # neither batch norm nor bias
                gradient += decay * p
                w, g = float(p.norm()), float(gradient.norm())
                rate = lr * (trust * w / g if w > 0 and g > 0 else 1.0)
            velocities[number] = momentum * velocities[number] + rate * gradient
            p -= velocities[number]


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_equals_the_formula_under_a_changing_rate(decay):
    ours, theirs = net(), net()
    optimizer = LARS(ours.parameters(), lr=0.5, momentum=0.9, weight_decay=decay)
    velocities = [torch.zeros_like(p) for p in theirs.parameters()]
    for step in range(8):
        lr = 0.5 / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        for model in (ours, theirs):
            model.zero_grad()
            backward(model, step)
        optimizer.step()
        transcribed(list(theirs.parameters()), velocities, lr, 0.9, decay, 0.001)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)


def test_equals_timms_at_a_constant_rate_without_decay():
    ours, theirs = net(), net()
    layers = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": layers, "always_adapt": True}, {"params": others, "always_adapt": False}]
    a = LARS(ours.parameters(), lr=0.5, momentum=0.9)
    b = Lars(groups, lr=0.5, momentum=0.9, weight_decay=0, trust_coeff=0.001)
    for step in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            model.zero_grad()
            backward(model, step)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


def test_layers_without_weights_or_gradient_take_plain_steps():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([weight, nn.Parameter(torch.ones(2, 2))], lr=1.0, momentum=0.0)
    weight.grad = torch.ones(2, 2)
    optimizer.step()  # the second has no gradient at all
    torch.testing.assert_close(weight.detach(), -torch.ones(2, 2))


def test_velocities_are_saved():
    model = net()
    optimizer = LARS(model.parameters(), lr=0.1)
    backward(model, 0)
    optimizer.step()
    other = LARS(net().parameters(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert torch.equal(a["velocity"], b["velocity"])
