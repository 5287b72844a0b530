"""Geometry of features against the formulas, written once more in numpy."""

import math

import numpy as np
import pytest
import torch

from mocokit import chance
from mocokit.health import measures


def features(rows, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width))).float()


@pytest.mark.parametrize("shape", [(200, 16), (16, 200), (50, 50)])
def test_rankme_is_its_formula(shape):
    table = features(*shape) * torch.logspace(0, -4, shape[1])
    singular = np.linalg.svd(table.double().numpy(), compute_uv=False)
    share = singular / np.abs(singular).sum() + 1e-7
    expected = math.exp(-(share * np.log(share)).sum())
    assert measures.rankme(table) == pytest.approx(expected, rel=1e-5)


def test_rankme_counts_directions():
    orthogonal = torch.linalg.qr(features(64, 8)).Q
    assert measures.rankme(orthogonal) == pytest.approx(8, rel=1e-4)
    assert measures.rankme(features(64, 1) @ torch.ones(1, 8)) == pytest.approx(1, abs=1e-3)
    assert measures.rankme(torch.zeros(4, 3)) == 0


def test_alignment_and_uniformity_are_their_formulas():
    a, b = features(30, 5), features(30, 5, seed=1)
    x, y = (v.numpy() / np.linalg.norm(v.numpy(), axis=1, keepdims=True) for v in (a, b))
    assert measures.alignment(a, b) == pytest.approx(((x - y) ** 2).sum(1).mean(), rel=1e-5)
    assert measures.alignment(a, 3 * a) == pytest.approx(0, abs=1e-6)
    pairs = [math.exp(-2 * ((p - q) ** 2).sum()) for i, p in enumerate(x) for q in x[:i]]
    assert measures.uniformity(a) == pytest.approx(math.log(np.mean(pairs)), rel=1e-4)
    assert measures.uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-5)


def test_deviation_is_one_on_the_sphere_and_zero_at_a_point():
    assert measures.deviation(features(4000, 32)) == pytest.approx(1, abs=0.02)
    assert measures.deviation(torch.ones(10, 32)) == pytest.approx(0, abs=1e-6)


def test_dead_dimensions_say_the_same_of_every_image():
    table = features(50, 8)
    table[:, :2] = torch.tensor([0.0, 7.0])
    assert measures.dead_share(table) == 0.25
    assert measures.dead_share(torch.ones(5, 4)) == 1


@pytest.mark.parametrize(("queue", "views"), [(50, 1), (250, 1), (250, 2), (700, 1), (1500, 1)])
def test_positives_in_the_queue_are_as_often_as_in_simulated_epochs(queue, views):
    """Against the orders that training would take, image by image."""
    images, epochs = 500, 12
    visits = np.concatenate(
        [chance.Order(3, epoch, images)[np.arange(images)] for epoch in range(epochs)]
    )
    reach, met, asked, last = queue / views, 0, 0, {}
    for position, image in enumerate(visits.tolist()):
        if position >= 4 * images:
            asked += 1
            met += position - last[image] <= reach
        last[image] = position
    expected = measures.positives_in_queue(images, queue, views)
    assert met / asked == pytest.approx(expected, abs=0.03)
