"""Whether longer training pays: on curves whose answer is known."""

import json
from pathlib import Path

import numpy as np

from mocokit.health.advice import advise, curve

TRACES = Path(__file__).parent / "traces"


def lines(values, name="knn_backbone"):
    return [{"step": n, "epoch": n, name: float(v)} for n, v in enumerate(values, 1)]


def test_too_few_scores_say_why_there_is_no_advice():
    assert advise([]).startswith("no advice on the length of the run: RankMe was measured 0 times")
    assert advise(lines([0.1, 0.2, 0.3])).endswith("train for 4 epochs or more")
    once = [{"step": 900, "epoch": 90, "knn_backbone": 0.5, "rankme": 9.0}]
    assert "kNN was measured 1 time, " in advise(once)
    assert advise(once).endswith("set monitor.every_epochs=22 or less")


def test_a_rise_a_plateau_and_a_fall():
    noise = np.random.default_rng(0).normal(0, 0.001, 40)
    rising = advise(lines(0.3 + 0.01 * np.arange(40) + noise))
    assert rising.startswith("longer training still pays: kNN rose from 59.0 % at epoch 30 to 69")
    flat = advise(lines(0.6 - 0.3 * np.exp(-np.arange(40) / 4) + noise))
    assert flat.startswith("levelled off") and "unlikely to gain" in flat
    fallen = advise(lines(0.6 - 0.0005 * (np.arange(40) - 15) ** 2 + noise))
    assert fallen.startswith("stop earlier: kNN fell from") and "at epoch 16" in fallen


def test_noise_is_not_taken_for_a_gain():
    """Flat curves under noise of two points: their ends differ, by no more than they jitter."""
    told = []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.02, 20)
        told += [advise(lines(0.5 + noise[:end])) for end in range(8, 21)]
    assert np.mean(["still pays" in one for one in told]) < 0.05
    assert np.mean(["levelled off" in one for one in told]) > 0.4
    assert any("undecided" in one for one in told)


def test_without_labels_the_rank_speaks_with_less_weight():
    said = advise(lines([10, 15, 20, 25, 30], "rankme"))
    assert said.startswith("longer training still pays: RankMe rose from 20.0") and "weaker" in said


def test_recorded_runs():
    def told(name):
        text = (TRACES / f"{name}.jsonl").read_text()
        return advise([json.loads(line) for line in text.splitlines()])

    assert "still pays" in told("demo_healthy")  # 8 of 40 epochs
    assert "still pays" in told("demo_leak") and told("demo_m0").startswith("undecided")
    assert told("cifar_healthy").startswith("levelled off: kNN went from 39.0 % at epoch 8")
    assert "levelled off" in told("constant_images")


def test_of_an_epoch_the_last_score_counts():
    assert curve([*lines([0.1, 0.2]), {"epoch": 2, "knn_backbone": 0.3}], "knn_backbone") == [
        (1.0, 0.1),
        (2.0, 0.3),
    ]
