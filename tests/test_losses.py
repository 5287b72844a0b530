"""The losses against their formulas, written out in float64."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mocokit.methods.losses import LOSSES, DualTemperature, info_nce, nce, nt_xent
from mocokit.methods.similarity import Negatives
from mocokit.settings.methods import LossName


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 7), (5, 300)])
def test_info_nce_is_equation_1(n, k, temperature):
    query, key, negatives = unit(n, 8), unit(n, 8, seed=1), unit(k, 8, seed=2)
    query.requires_grad_()
    loss = info_nce(query, key, negatives, temperature)
    q, keys, bank = query.detach().numpy(), key.numpy(), negatives.numpy()
    expected, gradient = 0.0, np.zeros_like(q)
    for i in range(n):
        positive = math.exp(q[i] @ keys[i] / temperature)
        others = np.exp(q[i] @ bank.T / temperature)
        total = positive + others.sum()
        expected -= math.log(positive / total) / n
        softmax_mean = (positive * keys[i] + others @ bank) / total
        gradient[i] = (softmax_mean - keys[i]) / temperature / n
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    loss.backward()
    np.testing.assert_allclose(query.grad.numpy(), gradient, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_nt_xent_is_simclrs_equation_1(n, temperature):
    a, b = unit(n, 8), unit(n, 8, seed=1)
    z = torch.cat([a, b]).numpy()
    expected = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        total = sum(math.exp(z[i] @ z[j] / temperature) for j in range(2 * n) if j != i)
        expected -= math.log(math.exp(z[i] @ z[partner] / temperature) / total) / (2 * n)
    assert float(nt_xent(a, b, temperature)) == pytest.approx(expected, abs=1e-12)


def transcribed(name, q, k, bank, t):
    """The other losses as their papers write them, per query, in plain Python."""
    n = len(q)
    s = [float(q[i] @ k[i]) for i in range(n)]
    others = [[float(q[i] @ row) for row in bank] for i in range(n)]
    if name == "dcl":
        return (
            sum(-s[i] / t + math.log(sum(math.exp(o / t) for o in others[i])) for i in range(n)) / n
        )
    if name == "dclw":
        mean = sum(math.exp(x / 0.5) for x in s) / n
        w = [2 - math.exp(x / 0.5) / mean for x in s]
        return (
            sum(
                -w[i] * s[i] / t + math.log(sum(math.exp(o / t) for o in others[i]))
                for i in range(n)
            )
            / n
        )
    if name == "align_uniform":
        align = sum(float(((q[i] - k[i]) ** 2).sum()) for i in range(n)) / n
        pairs = [math.exp(-3 * float(((x - y) ** 2).sum())) for x in q for y in bank]
        return 3 * align + math.log(sum(pairs) / len(pairs))
    p = [[math.exp(s[i] / u) for u in (t, 10 * t)] for i in range(n)]
    total = [
        [p[i][j] + sum(math.exp(o / u) for o in others[i]) for j, u in enumerate((t, 10 * t))]
        for i in range(n)
    ]
    share = [[p[i][j] / total[i][j] for j in (0, 1)] for i in range(n)]
    return sum((1 - b) / (1 - a) * -math.log(a) for a, b in share) / n


def value(name, query, key, bank, t):
    loss = LOSSES[name](t)
    compared = Negatives(bank).compare(query, loss.temperatures)
    return loss((query * key).sum(1), compared.log_sums, compared.number)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("name", ["dcl", "dclw", "align_uniform", "dual_temperature"])
def test_other_losses_are_their_papers(name, temperature):
    query, key, bank = unit(5, 6), unit(5, 6, seed=1), unit(9, 6, seed=2)
    expected = transcribed(name, query.numpy(), key.numpy(), bank.numpy(), temperature)
    assert float(value(name, query, key, bank, temperature)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["dclw", "align_uniform", "dcl", "info_nce"])
def test_gradients_are_those_of_the_formula(name):
    query, key, bank = unit(4, 5).requires_grad_(), unit(4, 5, seed=1), unit(6, 5, seed=2)
    assert torch.autograd.gradcheck(lambda q: value(name, q, key, bank, 0.3), (query,))


def test_dual_temperature_weighs_without_gradient():
    query, key, bank = unit(4, 5), unit(4, 5, seed=1), unit(6, 5, seed=2)
    weights, t = [], 0.3
    for q, k in zip(query, key, strict=True):
        p = [
            float((q @ k / u).exp() / ((q @ k / u).exp() + (bank @ q / u).exp().sum()))
            for u in (t, 10 * t)
        ]
        weights.append((1 - p[1]) / (1 - p[0]))
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(value("dual_temperature", query, key, bank, t), query)
    (plain,) = torch.autograd.grad(info_nce(query, key, bank, t), query)
    torch.testing.assert_close(gradient, plain * torch.tensor(weights)[:, None])
    assert DualTemperature(t).temperatures == (t, 10 * t)


def test_the_decoupled_loss_is_info_nce_without_its_positive():
    query, key, bank = unit(4, 5), unit(4, 5, seed=1), unit(6, 5, seed=2)
    s = (query * key).sum(1) / 0.2
    lse = (query @ bank.T / 0.2).logsumexp(1)
    difference = info_nce(query, key, bank, 0.2) - value("dcl", query, key, bank, 0.2)
    torch.testing.assert_close(difference, (torch.logaddexp(s, lse) - lse).mean())


def test_nce_is_instdiscs_equation_7():
    positive, others = unit(3, 4)[:, 0], unit(3, 4, seed=1)
    n, m, t, z = 50, 4, 0.07, 30.0
    expected = 0.0
    for s, row in zip(positive.tolist(), others.tolist(), strict=True):
        p = math.exp(s / t) / z
        expected -= math.log(p / (p + m / n)) / 3
        for other in row:
            p = math.exp(other / t) / z
            expected -= math.log(1 - p / (p + m / n)) / 3
    actual = nce(positive, others, n, t, torch.tensor(z, dtype=torch.float64))
    assert float(actual) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("info_nce", math.log(1 + 100)),
        ("dcl", math.log(100)),
        ("dclw", math.log(100)),
        ("align_uniform", 0.0),
        ("dual_temperature", math.log(1 + 100)),
    ],
)
def test_the_level_of_chance(name, level):
    """Vectors that are all the same tell nothing apart, and cost exactly that."""
    loss = LOSSES[name](0.2)
    assert loss.by_chance(100) == pytest.approx(level if name != "align_uniform" else 0.0, abs=1e-9)
    same = F.normalize(torch.ones(3, 4, dtype=torch.float64), dim=1)
    actual = float(value(name, same, same, same[:1].expand(100, 4), 0.2))
    assert actual == pytest.approx(level, abs=1e-9)


def test_losses_leave_autocast():
    a, b = unit(4, 8).float(), unit(4, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(a, b, b, 0.07), nt_xent(a, b, 0.1)
    assert inside == (info_nce(a, b, b, 0.07), nt_xent(a, b, 0.1))
    assert all(loss.dtype == torch.float32 for loss in inside)


def test_every_loss_can_be_named_in_the_settings():
    assert set(LOSSES) == set(get_args(LossName))
