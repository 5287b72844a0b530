"""Accuracies and confusions against scikit-learn; splits of labels against their definition."""

import numpy as np
import pytest
from sklearn import metrics

from mocokit.chance import Slot
from mocokit.data.sources.arrays import ArraySource
from mocokit.protocols.labelled import labelled_split
from mocokit.protocols.scores import Scores
from mocokit.protocols.split import hold_out, stratified


def some(seed=0, count=300, classes=7):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes - 1, count)  # the last class never occurs
    predicted = np.where(draw.random(count) < 0.6, labels, draw.integers(0, classes, count))
    return predicted, labels, classes


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_scikit_learns():
    predicted, labels, classes = some()
    scores = Scores.of(predicted, labels, classes)
    assert scores.accuracy == metrics.accuracy_score(labels, predicted)
    assert scores.balanced == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    expected = metrics.confusion_matrix(labels, predicted, labels=range(classes))
    np.testing.assert_array_equal(scores.confusion, expected)
    recall = metrics.recall_score(
        labels, predicted, labels=range(classes), average=None, zero_division=np.nan
    )
    np.testing.assert_allclose(scores.per_class, recall)
    written = scores.as_dict()  # with six digits
    assert written["accuracy"] == round(metrics.accuracy_score(labels, predicted), 6)
    balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert written["balanced_accuracy"] == round(balanced, 6) != written["accuracy"]
    assert written["images"] == len(labels) and written["confusion"] == expected.tolist()
    assert written["per_class"] == [None if np.isnan(one) else round(one, 6) for one in recall]
    assert set(written) == {"accuracy", "balanced_accuracy", "images", "per_class", "confusion"}


def test_a_class_without_images_has_no_accuracy():
    scores = Scores.of(*some())
    assert np.isnan(scores.per_class[-1]) and scores.as_dict()["per_class"][-1] is None
    assert np.isnan(Scores.of([], [], 3).accuracy) and Scores.of([], [], 3).count == 0


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_a_share_of_the_labels_is_a_share_of_each_class(share):
    labels = np.repeat([0, 1, 2, 4], [1000, 300, 5, 1])
    np.random.default_rng(0).shuffle(labels)
    kept = stratified(labels, share, 0, Slot.LABELS)
    assert (np.diff(kept) > 0).all()
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert (labels[kept] == label).sum() == max(1, round(share * count))
    assert (kept == stratified(labels, share, 0, Slot.LABELS)).all()
    if share < 1:
        assert set(kept) != set(stratified(labels, share, 1, Slot.LABELS))
        assert set(kept) <= set(stratified(labels, 2 * share, 0, Slot.LABELS))


def test_what_is_held_out_follows_the_seed():
    images = ArraySource(np.zeros((60, 2, 2, 3), np.uint8), np.arange(60) % 3, "toy")
    tested = [labelled_split(images, None, seed=seed).test_numbers for seed in (0, 1)]
    assert tested[0].tolist() != tested[1].tolist()
    for seed, numbers in enumerate(tested):
        np.testing.assert_array_equal(numbers, hold_out(images.labels, 0.2, seed, Slot.TEST)[1])


def test_holding_out_leaves_something_of_every_class():
    labels = np.repeat([0, 1, 2], [50, 2, 1])
    kept, held = hold_out(labels, 0.1, 0, Slot.TEST)
    assert sorted([*kept, *held]) == list(range(53))
    assert set(labels[kept]) == {0, 1, 2} and set(labels[held]) == {0, 1}
