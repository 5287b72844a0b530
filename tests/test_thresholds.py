"""Every threshold and window of verdict and advice, from both sides.

Each row is a pair of traces as near as their numbers allow: on one side the finding, on the other
not. The values are written out, so that a threshold that moves is seen.
"""

import math

import hypothesis
import pytest
from hypothesis import given, strategies as st

from mocokit.health.advice import advise
from mocokit.health.verdict import verdict

CHANCE = 5.5


def steps(losses, every=10, **values):
    """Lines of training steps, one for each loss."""
    line = {"chance_loss": CHANCE, "queue_filled": 1.0, "key_momentum": 0.99, "lr": 0.03}
    line |= {"data_wait": 0.01, "feature_std": 0.8}
    return [
        line | {"step": every * (n + 1), "epoch": 0, "loss": loss} | values
        for n, loss in enumerate(losses)
    ]


def with_(lines, name, values):
    """The same lines with a value each."""
    return [line | {name: value} for line, value in zip(lines, values, strict=True)]


def health(**values):
    line = {"rankme_head": 40.0, "rankme_head_of": 100.0, "deviation": 0.8, "image_deviation": 1.0}
    line |= {"contrast_trained": 0.5, "contrast_regrouped": 0.49, "contrasted_images": 1024.0}
    return [line | {"positives_in_queue": 0.001} | values]


def scored(trained, random=None, pixels=None, images=None, **more):
    line = {"knn_backbone": trained, "knn_random_weights": random, "knn_raw_pixels": pixels}
    line |= {"scored_images": images} | more
    return [{name: value for name, value in line.items() if value is not None}]


def kinds(lines):
    return verdict(lines).kinds


well = steps([4.0] * 30)

MEASURES = [  # a finding, a measure, its value with the finding, and without it
    ("alike", {"image_deviation": 0.0199}, {"image_deviation": 0.02}),
    ("collapsed", {"rankme_head": 4.99}, {"rankme_head": 5.0}),
    ("collapsed", {"deviation": 0.0499}, {"deviation": 0.05}),
    ("own keys", {"positives_in_queue": 0.0501}, {"positives_in_queue": 0.05}),
    # A share of the contrast, where the number of images leaves no doubt.
    (
        "leak",
        {"contrast_regrouped": 0.374, "contrasted_images": 1e6},
        {"contrast_regrouped": 0.375, "contrasted_images": 1e6},
    ),
    # Three standard errors of .20 and .10 of 100 images are .15: .09 apart for sure at 306.
    (
        "leak",
        {"contrast_trained": 0.2, "contrast_regrouped": 0.1, "contrasted_images": 226},
        {"contrast_trained": 0.2, "contrast_regrouped": 0.1, "contrasted_images": 224},
    ),
    (
        "leak",
        {"contrast_trained": 0.2, "contrast_regrouped": 0.04, "contrasted_images": 100},
        {"contrast_trained": 0.2, "contrast_regrouped": 0.12, "contrasted_images": 100},
    ),
]


@pytest.mark.parametrize(("kind", "found", "not_found"), MEASURES)
def test_a_measure_on_both_sides_of_its_threshold(kind, found, not_found):
    assert kinds(well + health(**found)) == (kind,)
    assert kinds(well + health(**not_found)) == ()


def test_without_ranks_the_queries_deviation_speaks():
    assert kinds(steps([4.0] * 30, feature_std=0.0499)) == ("collapsed",)
    assert kinds(steps([4.0] * 30, feature_std=0.05)) == ()
    assert kinds(steps([4.0] * 30, feature_std=0.01) + health()) == ()  # a rank is better evidence


def test_key_momentum():
    assert kinds(steps([4.0] * 30, key_momentum=0.499)) == ("momentum",)
    assert kinds(steps([4.0] * 30, key_momentum=0.5)) == ()
    rising = with_(well, "key_momentum", [0.1] * 29 + [0.99])
    assert kinds(rising) == () and kinds(rising[:-1]) == ("momentum",)  # the last line counts


def test_the_loss_is_at_chance_or_below():
    assert kinds(steps([5.5] * 30)) == ("guessing",)
    assert kinds(steps([5.499] * 30)) == ()


def test_patience_is_225_steps_with_a_full_queue():
    assert kinds(steps([5.6] * 2, every=225)) == ("guessing",)
    assert kinds(steps([5.6] * 2, every=224)) == ()
    late = with_(steps([5.6] * 9, every=75), "queue_filled", [0.5] * 5 + [1.0] * 4)
    assert kinds(late) == ("guessing",) and kinds(late[:-1]) == ()
    whole = steps([5.6] * 29)[:-1] + steps([5.6], queue_filled=1.0, step=285)
    assert kinds(whole) == ("guessing",)  # a run of 285 steps


def test_patience_begins_at_the_highest_learning_rate():
    rates = [0.01 * n for n in range(1, 11)] + [0.1] * 3 + [0.09] * 10
    rising = with_(steps([5.6] * 23, every=25), "lr", rates)
    assert kinds(rising[:18]) == ()  # step 450, of which 250 are a warm-up
    assert kinds(rising[:19]) == ("guessing",)
    assert kinds(with_(rising, "lr", [0.01 * n for n in range(23)])) == ()


def test_the_loss_is_that_of_the_second_half_of_what_counts():
    assert kinds(steps([5.9] * 15 + [5.4] * 15)) == ()
    assert kinds(steps([5.4] * 15 + [5.6] * 15)) == ("guessing",)
    assert kinds(steps([5.9] * 14 + [5.4] * 10)) == ()  # the last 20 lines are half above


def test_no_single_batch_decides():
    """The median, not the mean, of the last 20 lines."""
    assert kinds(steps([5.0] * 27 + [9.0] * 3)) == ()  # of their second half the mean is 5.8
    assert kinds(steps([5.6] * 27 + [1.0] * 3)) == ("guessing",)
    waits = [0.01] * 27 + [0.95] * 3
    assert kinds(with_(well, "data_wait", waits)) == ()  # the mean is 0.15
    assert kinds(with_(well, "data_wait", [0.95] * 3 + [0.12] * 27)) == ("data-bound",)


def test_the_last_twenty_lines_are_the_present():
    assert kinds(steps([5.6] * 100 + [4.0] * 30)) == ()
    assert kinds(steps([4.0] * 100 + [5.6] * 30)) == ("guessing",)
    # 11 of 20 decide; of 19 or 21 lines they would not be the half and more.
    for late, found in ((11, ("data-bound",)), (9, ())):
        waits = [0.0] * (60 - late) + [0.5] * late
        assert kinds(with_(steps([4.0] * 60), "data_wait", waits)) == found
    early = [0.5] * 40 + [0.0] * 20
    assert kinds(with_(steps([4.0] * 60), "data_wait", early)) == ()


def test_waiting_for_images():
    assert kinds(steps([4.0] * 30, data_wait=0.101)) == ("data-bound",)
    assert kinds(steps([4.0] * 30, data_wait=0.1)) == ()
    for count, found in ((4, ("data-bound",)), (3, ())):  # three lines after the first
        assert kinds(steps([4.0] * count, data_wait=0.5)) == found
    first = with_(steps([4.0] * 5), "data_wait", [0.9, 0.0, 0.05, 0.12, 0.9])
    assert kinds(first) == ()  # the median of the last four is 0.085, of all five 0.12


def test_the_latest_measurement_counts():
    assert kinds(well + health(rankme_head=1.0) + health()) == ()
    assert kinds(well + health() + health(rankme_head=1.0)) == ("collapsed",)


def test_a_filling_queue_is_not_judged_by_its_loss():
    filling = steps([9.0] * 30, queue_filled=0.999)
    assert kinds(filling) == ("filling",) and "healthy" not in verdict(filling).text
    assert kinds(filling + health(rankme_head=1.0)) == ("filling",)
    assert kinds(steps([5.0] * 30, queue_filled=1.0)) == ()


FAR = [  # level of chance, loss that has diverged, loss that has not
    (5.5, 16.6, 16.5),
    (1.1, 11.2, 11.1),
    (11.09, 33.3, 33.2),
]


@pytest.mark.parametrize(("level", "far", "near"), FAR)
def test_a_loss_far_above_chance_is_a_finding_of_its_own(level, far, near):
    for filled in (0.5, 1.0):
        values = {"chance_loss": level, "queue_filled": filled}
        assert "diverged" in kinds(steps([far] * 5, **values))
        assert "diverged" not in kinds(steps([near] * 5, **values))


@given(st.sampled_from([6e23, 1e4, 1e300, math.inf, None]), st.integers(0, 40), st.booleans())
def test_an_absurd_loss_is_never_healthy(loss, before, known):
    """Whatever came before it, with and without a level of chance, finite or not."""
    lines = steps([4.0] * before + [loss])
    if not known:
        hypothesis.assume(before or loss != 1e4)  # it may be a sum, if it begins so
        lines = [{k: v for k, v in line.items() if k != "chance_loss"} for line in lines]
    for more in ([], health(), scored(0.9, 0.1, 0.1, 1000)):
        found = verdict(lines + more)
        assert "diverged" in found.kinds and "healthy" not in found.text, found.text


def test_a_loss_that_came_back_is_told_while_it_is_of_late():
    assert kinds(steps([40.0] * 11 + [5.0] * 9)) == ("diverged",)
    assert kinds(steps([40.0] * 9 + [5.0] * 11)) == ()


def test_without_a_level_the_first_loss_is_the_measure():
    bare = {"step": 1, "epoch": 0}
    for losses, found in (
        ([0.4, 22.0, 22.0], False),  # against a queue of random vectors at first
        ([-1.0, 999.0], False),
        ([0.4, 999.0], False),
        ([-1.0, 1001.0], True),
        ([5.0, 4999.0], False),
        ([5.0, 5001.0], True),
        ([9e3, 0.99e6], False),
        ([9e3, 1.01e6], True),
    ):
        lines = [bare | {"loss": loss} for loss in losses]
        assert (verdict(lines).kinds == ("diverged",)) == found


BASELINES = [  # trained, random weights, raw pixels, images; what is found
    (0.092, 0.087, 0.156, 557, ("untrained", "pixels")),
    (0.092, 0.087, None, 557, ("untrained",)),
    (0.30, 0.20, 0.15, 1000, ()),
    # Two standard errors of .25 and .20 are .05 of 558 images or so.
    (0.25, 0.20, None, 570, ()),
    (0.25, 0.20, None, 540, ("untrained",)),
    (0.10, 0.30, None, 1000, ("untrained",)),
    (0.20, 0.21, None, 100, ("untrained",)),
    (0.20, 0.20, None, 10**6, ("untrained",)),
    # Raw pixels: as good is a finding, a little worse is none.
    (0.30, 0.10, 0.30, 1000, ("pixels",)),
    (0.30, 0.10, 0.299, 1000, ()),
    (0.30, 0.10, 0.301, 1000, ("pixels",)),
    (0.30, 0.10, 0.40, 1000, ("pixels",)),
    # Few images, and scores of 0 and 1, are no certainty.
    (1.0, 0.5, None, 4, ("untrained",)),
    (1.0, 0.25, None, 4, ()),
    (1.0, 0.0, None, 2, ("untrained",)),
    (1.0, 0.0, None, 8, ()),
    (0.0, 0.0, 0.0, 30, ("untrained", "pixels")),
    (1.0, 1.0, 1.0, 40, ()),  # nothing could be better
    (0.99, 1.0, None, 10**4, ("untrained",)),
    (0.6, 0.3, 0.2, None, ()),
    (0.3, 0.3, 0.2, None, ("untrained",)),
]


@pytest.mark.parametrize(("trained", "random", "pixels", "images", "found"), BASELINES)
@pytest.mark.parametrize("filled", [0.5, 1.0])
def test_scores_speak_first(trained, random, pixels, images, found, filled):
    lines = steps([4.0] * 30, queue_filled=filled)
    said = verdict(lines + health() + scored(trained, random, pixels, images))
    others = ("filling",) if filled < 1 else ()
    assert said.kinds == found + others
    assert ("healthy" in said.text) == (not found and not others)
    if "untrained" in found:
        word = "worse" if (trained, random) in ((0.10, 0.30), (0.99, 1.0)) else "no better"
        assert said.text.startswith(f"{word} than random weights so far: kNN {trained:.1%}, ")
    elif not found and not others:
        assert f"kNN {trained:.1%} (random weights {random:.1%}" in said.text


def test_what_raw_pixels_say():
    for pixels, words in ((0.40, "raw pixels are better: 40.0%"), (0.301, "as good so far: 30.1%")):
        said = verdict(well + scored(0.3, 0.1, pixels, 1000)).text
        assert words in said and said.endswith(
            "too short a run, or views that destroy what matters"
        )


def test_scores_are_the_latest_and_may_come_in_several_lines():
    """Baselines are taken once; 0.1 recorded the number of images in words."""
    lines = well + scored(0.1, 0.1, 0.05, 1000) + well + scored(0.4)
    assert kinds(lines) == () and "kNN 40.0%" in verdict(lines).text
    assert kinds(well + scored(0.4, 0.1, 0.1, 1000) + well + scored(0.1)) == ("untrained", "pixels")
    protocol = "kNN, k 200, temperature 0.1, 5,000 training images as bank, {} queries (validation)"
    for images, found in (("1,200", ()), ("120", ("untrained",))):
        lines = well + scored(0.25, 0.2, None, None, protocol=protocol.format(images))
        assert kinds(lines) == found


def test_a_sick_run_is_not_called_so_for_its_scores_alone():
    found = verdict(well + health(rankme_head=1.0) + scored(0.1, 0.1, 0.2, 1000))
    assert found.kinds == ("untrained", "pixels", "collapsed")
    alike = verdict(well + health(image_deviation=0.0) + scored(0.1, 0.1, 0.1, 1000))
    assert alike.kinds == ("alike",)  # which explains the scores
    waiting = steps([4.0] * 30, data_wait=0.5) + health(image_deviation=0.0, rankme_head=1.0)
    assert kinds(waiting) == ("alike", "data-bound")  # and not the machine's part


def test_the_loss_quoted_is_not_that_against_a_queue_of_random_vectors():
    lines = with_(steps([0.2] * 8 + [4.0] * 3), "queue_filled", [0.5] * 8 + [1.0] * 3)
    assert verdict(lines).text == "healthy: loss 4.00 (chance 5.50)"
    assert verdict(steps([1.0] * 50 + [3.0] * 11)).text.startswith("healthy: loss 3.00")
    assert verdict(steps([1.0] * 50 + [3.0] * 9)).text.startswith("healthy: loss 1.00")


# ------------------------------------------------------------------ advice


def curve(values, epochs=None, name="knn_backbone"):
    epochs = epochs or range(1, len(values) + 1)
    return [{"epoch": e, name: v} for e, v in zip(epochs, values, strict=True)]


STEADY = [0.5] * 8  # no jitter


def said(values, **more):
    return advise(curve(values, **more)).partition(":")[0]


def test_a_gain_of_half_a_point_pays():
    assert said([*STEADY, 0.5051]) == "longer training still pays"
    assert said([*STEADY, 0.5049]) == "levelled off"


def test_a_fall_of_a_whole_point_is_one():
    assert said([0.5, 0.5101, *STEADY]) == "stop earlier"
    assert said([0.5, 0.5099, *STEADY]) == "levelled off"
    assert said([0.5, 0.5060, *STEADY]) == "levelled off"  # over half a point


def test_the_gain_is_that_of_the_last_quarter_of_the_epochs():
    early = [0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert said(early) == "levelled off"  # since epoch 6
    # Of 8 epochs a quarter is 2: from epoch 6, not 7 or 5.
    assert "at epoch 6 to" in advise(curve([*early[:5], 0.5, 0.506, 0.506]))
    assert said([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.506, 0.506]) == "longer training still pays"
    assert said([0.5, 0.5, 0.5, 0.5, 0.5, 0.506, 0.506, 0.506]) == "levelled off"
    assert "from 30.0 % at epoch 7" in advise(curve([0.3, 0.4, 0.5, 0.6], epochs=[7, 8, 9, 9.2]))


def test_four_points_are_a_curve():
    assert said([0.1, 0.2, 0.3, 0.4]) == "longer training still pays"
    assert said([0.1, 0.2, 0.3]).startswith("no advice")
    assert said([10, 20, 30, 40], name="rankme") == "longer training still pays"
    assert advise(curve([0.1], epochs=[4])).endswith("set monitor.every_epochs=1 or less")
    assert advise(curve([0.1], epochs=[3])).endswith("train for 4 epochs or more")


def test_a_gain_must_exceed_three_deviations():
    """Points that alternate by 2 d about a line: each lies 2 d off the middle of its neighbours."""
    for d, expected in ((0.0020, "longer training still pays"), (0.0023, "undecided")):
        values = [0.5 + d * (-1) ** n for n in range(9)] + [0.5 + d * (-1) ** 9 + 0.02]
        gain, deviation = 0.02 - 2 * d, 2 * d / (0.674 * math.sqrt(1.5))  # since epoch 7
        assert (gain > 3 * deviation) == (expected != "undecided")
        assert said(values) == expected


def test_a_fall_must_exceed_the_jitter_too():
    for d, expected in ((0.0030, "stop earlier"), (0.0034, "levelled off")):
        values = [0.5, 0.52] + [0.5 + d * (-1) ** n for n in range(8)]
        assert said(values) == expected


def test_a_gain_of_rank_is_a_share_of_the_largest():
    ranks = [100.0] * 8
    assert said([*ranks, 103.2], name="rankme") == "longer training still pays"
    assert said([*ranks, 103.0], name="rankme") == "levelled off"
    assert advise(curve([*ranks, 103.2], name="rankme")).endswith("which is a weaker sign)")


def test_knn_speaks_before_the_rank_if_it_can():
    ranks = curve([10, 20, 30, 40, 50], name="rankme")
    knn = curve(STEADY[:5])
    assert "kNN" in advise(ranks + knn) and "RankMe" in advise(ranks + knn[:3])
