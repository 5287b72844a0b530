"""Pinned values: what a change of any kind must not move. tests/golden.py tells how they arose."""

import json
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from torch import nn

from mocokit import recipes
from mocokit.methods.losses import info_nce, nt_xent
from mocokit.methods.parts import follow
from mocokit.run.build import build_schedule
from mocokit.settings.sizes import resolve

PINNED = json.loads(Path(__file__).with_name("golden.json").read_text())


def tensor(rows):
    return torch.from_numpy(rows)


@pytest.mark.parametrize("case", PINNED["contrast"], ids=lambda c: f"{c['n']}-{c['k']}-{c['t']}")
def test_losses_and_gradients(case):
    n, k, t = case["n"], case["k"], case["t"]
    query = tensor(golden.unit(n, 0)).requires_grad_()
    loss = info_nce(query, tensor(golden.unit(n, 1)), tensor(golden.unit(k, 2)), t)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-10)
    np.testing.assert_allclose(query.grad.numpy(), case["gradient"], rtol=1e-9, atol=1e-12)
    views = nt_xent(tensor(golden.unit(n + 1, 0)), tensor(golden.unit(n + 1, 1)), t)
    assert float(views) == pytest.approx(case["nt_xent"], rel=1e-10)


@pytest.mark.parametrize(
    ("momentum", "value"), list(zip(golden.MOMENTA, PINNED["follow"], strict=True))
)
def test_following(momentum, value):
    key, query = (nn.Linear(1, 1, bias=False).double().requires_grad_(False) for _ in range(2))
    key.weight.fill_(10.0)
    for number in (1.0, 2.0, 3.0):
        query.weight.fill_(number)
        follow(key, query, momentum)
    assert float(key.weight) == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("recipe", sorted(PINNED["lr"]))
def test_learning_rates_of_every_epoch(recipe):
    settings = recipes.by_name(recipe)
    schedule = build_schedule(settings, resolve(settings, 10 * settings.train.batch_size))
    rates = [schedule(10 * epoch + 9) for epoch in range(200)]
    assert rates == pytest.approx(PINNED["lr"][recipe], rel=1e-12, abs=1e-18)


def test_the_file_is_what_the_transcription_gives():
    again = golden.values()
    for a, b in zip(PINNED["contrast"], again["contrast"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
        assert a["nt_xent"] == pytest.approx(b["nt_xent"], rel=1e-12)
        np.testing.assert_allclose(a["gradient"], b["gradient"], rtol=1e-10, atol=1e-15)
    assert PINNED["follow"] == pytest.approx(again["follow"])
    for recipe, rates in again["lr"].items():
        assert PINNED["lr"][recipe] == pytest.approx(rates, rel=1e-12, abs=1e-18)
