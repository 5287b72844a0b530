"""The kNN vote against a naive numpy version, and the monitor."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from mocokit import recipes
from mocokit.data.open import open_data
from mocokit.data.sources.arrays import ArraySource
from mocokit.engine.stop import Stopped, StopSignals
from mocokit.health import knn_monitor
from mocokit.health.knn_monitor import KnnMonitor, calibrated
from mocokit.nets.backbones import build_backbone
from mocokit.nets.heads import Encoder, build_head
from mocokit.protocols import knn
from mocokit.protocols.knn import knn_accuracy, knn_grid, knn_scores, nearest, vote
from mocokit.weights.encoder import view_spec


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


def test_a_search_ends_between_its_parts(monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", 10)  # two queries a part
    searched = []

    def search(*arguments):
        searched.append(1)
        if len(searched) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return nearest(*arguments)

    monkeypatch.setattr(knn, "nearest", search)
    with StopSignals() as stop, stop.interruptible(), pytest.raises(Stopped):
        labels = torch.zeros(9, dtype=torch.long)
        knn.knn_grid_of(torch.eye(9), labels, torch.eye(9), [5], [0.1], 1)
    assert len(searched) == 2 and stop.exit_code == 75


def test_accuracy_counts_the_highest_score():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    queries = torch.tensor([[1.0, 0.1, 0], [0, 1, 0.1], [1, 0, 0.2], [0, 0, 1]])
    got = knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 2, 2]), 1, 0.1)
    assert got == 0.75


def spec():
    return view_spec(recipes.demo())


def source(count, seed, labelled=True, only=None):
    """Two classes of images: dark and light, with noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, count) if only is None else np.full(count, only)
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


def test_random_weights_have_the_banks_statistics(monkeypatch):
    """In eval mode, with batch norm fitted to the images that vote: what is scored, by hand."""
    train, network, views, seen = source(100, 0), encoder(), torch.randn(4, 3, 32, 32), []
    ours = monitor(train, source(30, 1), bank=40)

    def scores(self, network, names):
        seen.append(network(views)[0])
        return iter([(names[0], 0.5)])

    monkeypatch.setattr(KnnMonitor, "_scores", scores)
    assert ours.random_weights(network) == 0.5
    device, backbone = torch.device("cpu"), encoder().backbone
    with torch.no_grad():
        raw = backbone.eval()(views)
        calibrated(backbone.train(), train, spec(), device, ours.bank_numbers)
        expected = backbone.eval()(views)
    assert torch.equal(seen[0], expected) and not torch.allclose(raw, expected)
    assert not seen[0].requires_grad and len(ours.bank_numbers) == 40


def test_raw_pixels_are_centred():
    """Off the mean all images point the same way, and dark and light differ in length alone."""
    ours = monitor(source(100, 0), source(30, 1), k=1)
    seen = []
    scores = ours._scores(lambda views: (seen.append(views) or views.flatten(1) + 100,), ("x",))
    assert dict(scores)["x"] < 1.0 and ours.raw_pixels() == 1.0
    for label in (0, 1):  # by the bank's mean: that of light queries would make them half dark
        alike = monitor(source(100, 0), source(30, 1, only=label), k=1)
        assert alike.raw_pixels() == 1.0


def test_raw_pixels_are_moved_by_the_mean_of_the_bank(monkeypatch):
    """All of them, so that no distance changes; other features are not moved at all."""
    ours, seen = monitor(source(100, 0), source(30, 1)), []
    monkeypatch.setattr(knn_monitor, "knn_accuracy", lambda *of: seen.append((of[0], of[2])) or 0.5)
    ours.raw_pixels()
    dict(ours._scores(lambda views: (views.flatten(1),), ("x",)))
    (bank, queries), (plain_bank, plain_queries) = seen
    mean = plain_bank.double().mean(0).float()
    assert mean.abs().max() > 0.1
    torch.testing.assert_close(bank, plain_bank - mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(queries, plain_queries - mean, atol=1e-5, rtol=0)


def test_without_validation_a_tenth_is_held_out_of_the_bank():
    ours = monitor(source(100, 0))
    assert len(ours.query_numbers) == 10 and len(ours.bank_numbers) == 90
    assert not set(ours.query_numbers) & set(ours.bank_numbers)
    assert "held-out tenth" in ours.protocol
    assert 0 <= dict(ours.run(encoder()))["knn_head"] <= 1


def test_the_protocol_counts_the_images_that_could_be_read(tmp_path):
    for number in range(40):
        path = tmp_path / "train" / f"{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * number).save(path)
        if number in (3, 8, 11):
            path.write_bytes(b"junk")
    ours = monitor(open_data(tmp_path).train)
    assert "36 training images as bank, 4 queries" in ours.protocol
    dict(ours.run(encoder()))
    bad = [f"{number % 2}/{number:02}.png" for number in (3, 8, 11)]
    names = [ours.train.describe(number) for number in ours.bank_numbers]
    lost = len(set(bad) & set(names))
    assert lost > 0 and f"{36 - lost} training images" in ours.protocol
    assert f"{4 - (3 - lost)} queries" in ours.protocol


def test_the_bank_is_bounded_and_its_choice_is_stable():
    one, two = monitor(source(100, 0), bank=20), monitor(source(100, 0), bank=20)
    assert len(one.bank_numbers) == 20 and list(one.bank_numbers) == list(two.bank_numbers)
    assert list(monitor(source(100, 0), bank=20, seed=1).bank_numbers) != list(one.bank_numbers)


def test_labels_are_needed():
    with pytest.raises(ValueError, match="labels"):
        monitor(source(100, 0, labelled=False))


def ranked(bank, queries, k, own=None):
    """Numbers of the k nearest in exact arithmetic; of equals the lower number, never oneself."""
    unit = [np.asarray(v, np.float64) / np.linalg.norm(v) for v in bank]
    found = []
    for at, query in enumerate(queries):
        cosines = [round(float(one @ query) / float(np.linalg.norm(query)), 6) for one in unit]
        others = [j for j in range(len(bank)) if own is None or j != own[at]]
        found.append(sorted(others, key=lambda j: (-cosines[j], j))[:k])
    return found


@pytest.mark.parametrize("k", [1, 3, 7, 12, 50])
@pytest.mark.parametrize("small", [False, True])
def test_ties_go_to_the_first_rows(k, small, monkeypatch):
    """Each row of the bank is there several times; in one block, and in many."""
    if small:
        monkeypatch.setattr(knn, "FACTORS", 12)
        monkeypatch.setattr(knn, "CHUNK", 8)
    draw = np.random.default_rng(k)
    bank = draw.normal(size=(6, 3))[draw.integers(0, 6, 40)]
    queries = draw.normal(size=(15, 3))
    found = nearest(torch.from_numpy(bank), torch.from_numpy(queries), k)
    assert found.index.tolist() == ranked(bank, queries, k)


@pytest.mark.parametrize("small", [False, True])
def test_leaving_one_out(small, monkeypatch):
    if small:
        monkeypatch.setattr(knn, "FACTORS", 24)
    bank = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    found = nearest(bank, bank, 5, own_rows=torch.arange(30))
    assert found.index.tolist() == ranked(bank.numpy(), bank.numpy(), 5, own=range(30))
    everyone = nearest(bank, bank, 99, own_rows=torch.arange(30))
    assert everyone.cosine.shape == (30, 30) and bool(everyone.cosine[:, -1].isneginf().all())
    labels = torch.arange(30) % 3
    scores = vote(everyone, labels, 99, 0.1, 3)
    without = knn_scores(bank[1:], labels[1:], bank[:1], 99, 0.1, 3)
    np.testing.assert_allclose(scores[:1].numpy(), without.numpy(), rtol=1e-5)


def test_one_search_serves_the_whole_grid():
    generator = torch.Generator().manual_seed(1)
    bank, queries = torch.randn(60, 5, generator=generator), torch.randn(20, 5, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    grid = list(knn_grid(nearest(bank, queries, 40), labels, [1, 10, 40], [0.05, 1.0], 4))
    assert [(k, t) for k, t, _ in grid] == [(k, t) for k in (1, 10, 40) for t in (0.05, 1.0)]
    for k, temperature, predicted in grid:
        alone = naive(bank.numpy(), labels.numpy(), queries.numpy(), k, temperature, 4)
        assert predicted.tolist() == alone.argmax(1).tolist()


def test_agrees_with_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(2)
    bank, queries = torch.randn(90, 6, generator=generator), torch.randn(30, 6, generator=generator)
    labels = torch.randint(0, 5, (90,), generator=generator)
    other = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1)
    ).fit(bank.numpy(), labels.numpy())
    ours = knn_scores(bank, labels, queries, 20, 0.1, 5)
    ours = (ours / ours.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(ours, other.predict_proba(queries.numpy()), rtol=1e-3, atol=1e-6)


def test_tiny_temperatures_do_not_overflow():
    bank, labels = torch.eye(3), torch.tensor([2, 1, 0])
    scores = knn_scores(bank, labels, torch.tensor([[1.0, 0.5, 0]]), 3, 1e-5, 3)
    assert bool(scores.isfinite().all()) and int(scores.argmax()) == 2


def test_missing_classes_and_equal_scores():
    scores = knn_scores(torch.eye(2), torch.tensor([3, 1]), torch.ones(1, 2), 2, 0.1, 6)
    assert scores.shape == (1, 6) and scores[0, [0, 2, 4, 5]].sum() == 0
    found = nearest(torch.eye(2), torch.ones(1, 2), 2)
    assert next(knn_grid(found, torch.tensor([3, 1]), [2], [0.1], 6))[2].item() == 1


@pytest.mark.gpu
def test_the_gpu_finds_the_same_neighbours():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(5000, 32, generator=generator)
    queries = torch.randn(300, 32, generator=generator)
    labels = torch.randint(0, 9, (5000,), generator=generator)
    here = knn_scores(bank, labels, queries, 200, 0.1, 9)
    there = vote(nearest(bank, queries, 200, None, torch.device("cuda")), labels, 200, 0.1, 9)
    np.testing.assert_allclose(here.numpy(), there.numpy(), rtol=1e-3)


def test_a_large_k_is_searched_for_some_queries_after_others(monkeypatch):
    draw = torch.Generator().manual_seed(3)
    bank, queries = torch.randn(50, 6, generator=draw), torch.randn(31, 6, generator=draw)
    labels, own = torch.arange(50) % 4, torch.arange(31)
    plain = knn.knn_grid(knn.nearest(bank, queries, 40, own), labels, [5, 40], [0.1, 1.0], 4)
    monkeypatch.setattr(knn, "CHUNK", 40 * 7)
    found = knn.knn_grid_of(bank, labels, queries, [5, 40], [0.1, 1.0], 4, own)
    for (k, t, predicted), (k2, t2, ours) in zip(plain, found, strict=True):
        assert (k, t) == (k2, t2) and torch.equal(predicted, ours)
