"""The kNN vote against a naive numpy version, and the monitor."""

import math

import numpy as np
import pytest
import torch

from mocokit import recipes
from mocokit.data.arrays import ArraySource
from mocokit.evaluate import knn
from mocokit.evaluate.knn import knn_accuracy, knn_scores
from mocokit.evaluate.monitor import KnnMonitor
from mocokit.nets.backbones import build_backbone
from mocokit.nets.heads import Encoder, build_head
from mocokit.views.params import ViewSpec


def naive(bank, labels, queries, k, temperature, classes):
    scores = np.zeros((len(queries), classes))
    for i, query in enumerate(queries):
        cosines = [q @ query / np.linalg.norm(q) / np.linalg.norm(query) for q in bank]
        for j in sorted(range(len(bank)), key=lambda j: -cosines[j])[:k]:
            scores[i, labels[j]] += math.exp(cosines[j] / temperature)
    return scores


@pytest.mark.parametrize("k", [1, 5, 30, 200])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_equals_the_naive_vote(k, temperature, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", 100)  # several chunks
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 6, generator=generator), torch.randn(9, 6, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    scores = knn_scores(bank, labels, queries, k, temperature, 5)
    expected = naive(bank.numpy(), labels.numpy(), queries.numpy(), k, temperature, 5)
    assert scores.shape == (9, 5)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4)


def test_accuracy_counts_the_highest_score():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    queries = torch.tensor([[1.0, 0.1, 0], [0, 1, 0.1], [1, 0, 0.2], [0, 0, 1]])
    got = knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 2, 2]), 1, 0.1)
    assert got == 0.75


def spec():
    return ViewSpec(**recipes.demo().views.model_dump())


def source(count, seed, labelled=True):
    """Two classes of images: dark and light, with noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count)
    images = draw.integers(0, 80, (count, 32, 32, 3)) + 120 * labels[:, None, None, None]
    return ArraySource(
        images.astype(np.uint8), labels if labelled else None, "toy", ("dark", "light")
    )


def monitor(train, validation=None, **options):
    defaults = {"k": 5, "temperature": 0.1, "bank": 1000, "seed": 0}
    return KnnMonitor(train, validation, spec(), torch.device("cpu"), **(defaults | options))


def encoder():
    torch.manual_seed(0)
    return Encoder(build_backbone("resnet_tiny"), build_head("mlp", 64, None, 16))


def test_monitor_scores_backbone_head_pixels_and_random_weights():
    ours = monitor(source(100, 0), source(30, 1))
    network = encoder()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    scores = dict(ours.run(network))
    assert set(scores) == {"knn_backbone", "knn_head"}
    assert ours.raw_pixels() == 1.0
    assert ours.random_weights(network) > 0.8  # light and dark survive random weights
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert "30 queries (validation images)" in ours.protocol


def test_raw_pixels_are_centred():
    """Off the mean all images point the same way, and dark and light differ in length alone."""
    ours = monitor(source(100, 0), source(30, 1), k=1)
    seen = []
    scores = ours._scores(lambda views: (seen.append(views) or views.flatten(1) + 100,), ("x",))
    assert dict(scores)["x"] < 1.0 and ours.raw_pixels() == 1.0


def test_without_validation_a_tenth_is_held_out_of_the_bank():
    ours = monitor(source(100, 0))
    assert len(ours.query_numbers) == 10 and len(ours.bank_numbers) == 90
    assert not set(ours.query_numbers) & set(ours.bank_numbers)
    assert "held-out tenth" in ours.protocol
    assert 0 <= dict(ours.run(encoder()))["knn_head"] <= 1


def test_the_bank_is_bounded_and_its_choice_is_stable():
    one, two = monitor(source(100, 0), bank=20), monitor(source(100, 0), bank=20)
    assert len(one.bank_numbers) == 20 and list(one.bank_numbers) == list(two.bank_numbers)
    assert list(monitor(source(100, 0), bank=20, seed=1).bank_numbers) != list(one.bank_numbers)


def test_labels_are_needed():
    with pytest.raises(ValueError, match="labels"):
        monitor(source(100, 0, labelled=False))
