"""Verdicts on recorded runs: each failure gets its own, a healthy run none, at every moment.

The traces are lines of metrics.jsonl of real runs (docs/log.md, 2026-11-24), thinned to the numbers
that are judged.
"""

import json
import math
from pathlib import Path

import pytest

from mocokit.health.verdict import verdict

TRACES = Path(__file__).parent / "traces"


def trace(name):
    return [json.loads(line) for line in (TRACES / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["demo_healthy", "cifar_healthy"])
def test_a_healthy_run_is_never_faulted(name):
    lines = trace(name)
    assert len(lines) > 30
    for end in range(1, len(lines) + 1):
        found = verdict(lines[:end])
        assert found.healthy, (end, found.text)
    assert found.kinds == () and found.text.startswith("healthy: loss ")
    assert "effective rank" in found.text and "in other groups" in found.text


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("demo_m0", "momentum", "inconsistent keys: with key momentum 0 "),
        ("cifar_m0", "momentum", "set method.momentum=0.99 or more"),
        ("demo_leak", "leak", "when groups are re-drawn"),
        ("cifar_leak", "leak", "turn the key shuffle on (method.shuffle=true)"),
        ("demo_lr100", "collapsed", "a lower optim.lr (it reached 0.2)"),
        ("cifar_lr100", "collapsed", "a lower optim.lr (it reached "),
        ("constant_images", "alike", "the images are all alike"),
    ],
)
def test_each_failure_gets_its_verdict(name, kind, words):
    found = verdict(trace(name))
    assert found.kinds == (kind,) and words in found.text and not found.healthy
    assert "healthy" not in found.text


@pytest.mark.parametrize("name", ["demo_lr100", "cifar_lr100", "constant_images", "cifar_m0"])
def test_failures_show_after_the_first_epoch(name):
    lines = trace(name)
    first = next(at for at, line in enumerate(lines) if "rankme" in line)
    assert not verdict(lines[: first + 1]).healthy


def steps(count=30, **values):
    line = {"loss": 4.0, "chance_loss": 5.5, "queue_filled": 1.0, "key_momentum": 0.99, "lr": 0.03}
    line |= {"data_wait": 0.01, "feature_std": 0.8}
    return [line | {"step": 50 * (n + 1), "epoch": 0} | values for n in range(count)]


def health(**values):
    line = {"rankme_head": 40.0, "rankme_head_of": 128.0, "deviation": 0.8, "image_deviation": 1.0}
    line |= {"contrast_trained": 0.5, "contrast_regrouped": 0.49, "contrasted_images": 1024.0}
    return [line | {"positives_in_queue": 0.001} | values]


def test_nothing_is_said_before_the_first_line():
    assert verdict([]) is None and verdict(health()) is None


def test_filling_tells_the_step_at_which_the_queue_is_full():
    found = verdict(steps(1, queue_filled=50 * 32 / 8192, loss=7.0))
    assert found.text == "still filling the queue: a rising loss is expected until step 256"
    assert found.healthy and found.kinds == ("filling",)


def test_the_first_loss_is_never_quoted_though_a_short_queue_is_full_after_it():
    first = steps(1, step=1, loss=0.28)
    said = "healthy: its only loss so far was against random vectors, effective rank 40 of 128"
    assert verdict(first + health()).text.startswith(said)
    assert verdict(first + steps(1)).text == "healthy: loss 4.00 (chance 5.50)"


@pytest.mark.parametrize("value", [None, math.nan, "4.0", True, [1]])
@pytest.mark.parametrize(
    "name",
    ["lr", "key_momentum", "queue_filled", "data_wait", "feature_std", "chance_loss",
     "rankme_head", "rankme_head_of", "deviation", "contrast_trained", "contrast_regrouped",
     "image_deviation", "positives_in_queue", "knn_backbone", "knn_random_weights",
     "knn_raw_pixels", "scored_images", "protocol"],
)  # fmt: skip
def test_what_is_no_number_says_nothing(name, value):
    scores = {"knn_backbone": 0.9, "knn_random_weights": 0.1, "knn_raw_pixels": 0.2}
    whole = steps() + health(scored_images=500, **scores)
    assert verdict(whole).healthy
    found = verdict([line | {name: value} if name in line else line for line in whole])
    assert found.healthy and "nan" not in found.text


@pytest.mark.parametrize("loss", [None, math.nan, 6e23, -6e23, math.inf, -math.inf, "4.0", True])
@pytest.mark.parametrize("level", [5.5, None])
def test_an_absurd_loss_is_told_once(loss, level):
    found = verdict(steps(29) + steps(1, loss=loss, step=1500, chance_loss=level))
    assert found.kinds == ("diverged",)
    found = verdict(steps(30, loss=loss, chance_loss=level))
    assert found.kinds == ("diverged",) and len(found.text) < 200


def test_scores_that_are_shown_alike_are_no_gain():
    """A run of before did not record how many images it scored."""
    alike = health(knn_backbone=0.3004, knn_random_weights=0.2996)
    assert verdict(steps() + alike).kinds == ("untrained",)
    alike = health(knn_backbone=0.2996, knn_random_weights=0.3004)
    assert verdict(steps() + alike).text.startswith("no better than random weights")


def test_a_score_without_baselines_is_not_passed_over():
    """During a run there are none yet."""
    found = verdict(steps() + health(knn_backbone=0.092, knn_head=0.087, scored_images=500))
    assert "kNN 9.2%, not yet compared with random weights" in found.text


def test_a_full_queue_is_judged_by_its_loss_after_some_patience():
    assert verdict(steps(5, loss=5.6)).healthy
    found = verdict(steps(30, loss=5.6))
    assert found.kinds == ("guessing",) and "after 1,500 steps" in found.text
    assert verdict(steps(30, loss=5.4)).healthy


def test_a_memory_bank_may_cost_more_than_chance():
    """On CIFAR-10 it does for three epochs of a healthy run (docs/log.md)."""
    lines = [line | {"queue_filled": 1.0} for line in steps(150, loss=9.0, chance_loss=8.3)]
    assert verdict(lines).kinds == ("guessing",)
    for line in lines:
        del line["queue_filled"]
        line["bank_seen"] = 1.0
    assert "guessing" not in verdict(lines).kinds


def test_data_bound_is_a_notice_beside_health():
    found = verdict(steps(data_wait=0.43) + health())
    assert found.healthy and found.text.startswith("healthy: ")
    assert "data-bound: the device waits 43% of the time" in found.text
    one_slow = steps()
    one_slow[-1] = one_slow[-1] | {"data_wait": 0.9}
    assert verdict(one_slow).kinds == ()


def test_a_queue_of_own_keys_is_noticed():
    found = verdict(steps() + health(positives_in_queue=0.3))
    assert found.kinds == ("own keys",) and "30% of queries" in found.text and found.healthy


def test_the_leak_needs_a_difference_beyond_its_error():
    assert verdict(
        steps() + health(contrast_trained=0.99, contrast_regrouped=0.60)
    ).text.startswith("statistics leak: contrast accuracy drops from 99% to 60%")
    small = health(contrast_trained=0.05, contrast_regrouped=0.03, contrasted_images=100.0)
    assert verdict(steps() + small).healthy
    assert verdict(steps() + health(contrast_trained=0.5, contrast_regrouped=0.42)).healthy


def test_collapse_is_called_by_rank_by_spread_or_without_either_by_the_queries():
    assert "effective rank 1.3 of 128" in verdict(steps() + health(rankme_head=1.3)).text
    assert "deviate by 0.01" in verdict(steps() + health(deviation=0.01)).text
    assert verdict(steps(feature_std=0.01)).kinds == ("collapsed",)


def test_the_latest_health_counts():
    assert verdict(steps() + health(rankme_head=1.3) + health()).healthy


def test_methods_without_queue_or_groups_are_judged_by_what_they_have():
    lines = [{"step": 900, "epoch": 1, "loss": 3.0, "feature_std": 0.7, "data_wait": 0.0}]
    found = verdict(lines)
    assert found.healthy and found.text == "healthy: loss 3.00"
