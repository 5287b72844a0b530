"""The losses against their formulas, written out in float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mocokit.methods.losses import info_nce, nt_xent


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


def test_losses_leave_autocast():
    a, b = unit(4, 8).float(), unit(4, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(a, b, b, 0.07), nt_xent(a, b, 0.1)
    assert inside == (info_nce(a, b, b, 0.07), nt_xent(a, b, 0.1))
    assert all(loss.dtype == torch.float32 for loss in inside)
