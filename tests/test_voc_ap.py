"""Average precision against a slow transcription of the devkit, by hand, and against COCO."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mocokit.protocols.voc_ap import (
    THRESHOLDS,
    Detection,
    Truth,
    as_written,
    average_precision,
    precisions,
)

ONE = (10, 10, 20, 20)


def slow_overlap(a, b):
    wide = min(a[2], b[2]) - max(a[0], b[0]) + 1
    tall = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if wide <= 0 or tall <= 0:
        return 0.0
    own = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return wide * tall / (own[0] + own[1] - wide * tall)


def slow_ap(detections, truths, iou, metric):
    """VOC devkit's VOCevaldet and VOCap, in plain Python: one detection after another."""
    wanted = sum(not one[2] for one in truths)
    found, hits, misses, curve = set(), 0, 0, []
    for image, _, box in sorted(detections, key=lambda one: -one[1]):
        best, best_overlap = None, -1.0
        for number, (where, there, _) in enumerate(truths):
            if where == image and slow_overlap(box, there) > best_overlap:
                best, best_overlap = number, slow_overlap(box, there)
        if best is None or best_overlap <= iou:
            misses += 1
        elif not truths[best][2]:
            if best in found:
                misses += 1
            else:
                hits += 1
            found.add(best)
        curve.append((hits / wanted if wanted else 0.0, hits / max(hits + misses, 1e-9)))
    if not wanted:
        return 0.0
    if metric == "voc07":
        levels = [level * 0.1 for level in range(11)]  # 6 x 0.1 is a hair above 3/5, as there
        return sum(max((p for r, p in curve if r >= level), default=0.0) for level in levels) / 11
    total, before = 0.0, 0.0
    for at, (recall, _) in enumerate(curve):
        total += (recall - before) * max(p for _, p in curve[at:])
        before = recall
    return total


# Boxes that mostly overlap, or nothing would be found.
corner = st.integers(0, 3)
box = st.tuples(corner, corner, st.integers(6, 10), st.integers(6, 10)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
image = st.integers(0, 1)
detections_of = st.lists(st.tuples(image, st.sampled_from([0.1, 0.5, 0.7, 0.9]), box), max_size=12)
truths_of = st.lists(st.tuples(image, box, st.booleans()), max_size=8)


@given(detections_of, truths_of, st.sampled_from(THRESHOLDS), st.sampled_from(["voc07", "area"]))
def test_equals_the_transcription(detections, truths, iou, metric):
    ours = average_precision(detections, truths, iou, metric)
    assert ours == pytest.approx(slow_ap(detections, truths, iou, metric), abs=1e-9)


def test_a_perfect_detector_and_none():
    truths = [(0, ONE), (1, ONE)]
    for metric in ("voc07", "area", "coco"):
        assert average_precision([(0, 0.9, ONE), (1, 0.8, ONE)], truths, 0.5, metric) == (
            pytest.approx(1.0)
        )
        assert average_precision([], truths, 0.5, metric) == 0.0
        assert average_precision([(0, 0.9, ONE)], [], 0.5, metric) == 0.0


def test_a_duplicate_is_wrong():
    """Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1."""
    found = [(0, 0.9, ONE), (0, 0.8, ONE), (1, 0.7, ONE)]
    truths = [(0, ONE), (1, ONE)]
    assert average_precision(found, truths, 0.5, "area") == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(found, truths, 0.5, "voc07") == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_a_duplicate_of_a_box_with_a_neighbour_stays_wrong_for_voc_but_not_for_coco():
    """VOC judges by the best box alone, COCO by the best that is free."""
    near = (12, 10, 22, 20)
    found, truths = [(0, 0.9, ONE), (0, 0.8, ONE)], [(0, ONE), (0, near)]
    assert average_precision(found, truths, 0.5, "area") == pytest.approx(0.5)
    assert average_precision(found, truths, 0.5, "coco") == pytest.approx(1.0)


def test_three_of_five_miss_the_recall_of_six_tenths():
    """As detectron2's levels, numpy's arange: the sixth is .6000000000000001."""
    truths = [(number, ONE) for number in range(5)]
    found = [(number, 0.9, ONE) for number in range(3)]
    assert average_precision(found, truths, 0.5, "voc07") == pytest.approx(6 / 11)


def test_difficult_boxes_are_neither_wanted_nor_wrong():
    truths = [(0, ONE, True), (1, ONE, False)]
    for found in ([(0, 0.9, ONE), (1, 0.8, ONE)], [(0, 0.9, ONE), (0, 0.85, ONE), (1, 0.8, ONE)]):
        assert average_precision(found, truths, 0.5, "area") == pytest.approx(1.0)
    assert average_precision([(0, 0.9, ONE)], [(0, ONE, True)], 0.5, "area") == 0.0


def test_the_overlap_must_be_more_and_areas_count_the_last_pixel():
    """(1..10) and (1..20) overlap in 10 of 20 pixels: exactly .5 with areas of whole pixels."""
    found, truths = [(0, 0.9, (1, 1, 10, 10))], [(0, (1, 1, 20, 10))]
    assert average_precision(found, truths, 0.5, "voc07") == 0.0
    assert average_precision(found, truths, 0.49, "voc07") == pytest.approx(1.0)
    # COCO takes an overlap of exactly the threshold, and plain areas: 9 of 19 columns are less.
    assert average_precision([(0, 0.9, (0, 0, 10, 10))], [(0, (0, 0, 20, 10))], 0.5, "coco") == 1.0
    assert average_precision(found, truths, 0.5, "coco") == 0.0


def test_ties_keep_their_order():
    right, wrong, truths = (0, 0.5, ONE), (0, 0.5, (50, 50, 60, 60)), [(0, ONE)]
    assert average_precision([right, wrong], truths, 0.5, "area") == pytest.approx(1.0)
    assert average_precision([wrong, right], truths, 0.5, "area") == pytest.approx(0.5)


def test_what_is_written_is_rounded_and_counted_from_one():
    found = as_written(Detection("a", 0.12345, (0.04, 9.96, 20.26, 30.0)))
    assert found == Detection("a", 0.123, (1.0, 11.0, 20.3, 30.0))


def test_a_class_without_boxes_says_nothing():
    truths = [[Truth(0, ONE)], [], [Truth(0, ONE, True)]]
    found = [[Detection(0, 0.9, ONE)], [Detection(0, 0.9, ONE)], []]
    scores = precisions(found, truths, ("a", "b", "c"), "voc07")
    assert scores.wanted == (1, 0, 0) and scores.ap == pytest.approx(1.0)
    assert scores.at(50) == scores.at(75) == pytest.approx(1.0)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="voc07, area or coco"):
        average_precision([], [], 0.5, "voc12")


def test_equals_pycocotools_on_thousands_of_boxes():
    """Five classes, 200 images, crowds, near misses and ties, to 3 decimals at every overlap."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    draw = np.random.default_rng(5)
    images, classes = 200, 5
    truths = [[] for _ in range(classes)]
    found = [[] for _ in range(classes)]
    for where in range(images):
        for _ in range(draw.integers(0, 12)):
            label = int(draw.integers(classes))
            left, top, wide, tall = (
                float(v) for v in (*draw.uniform(0, 80, 2), *draw.uniform(8, 60, 2))
            )
            there = (left, top, left + wide, top + tall)
            truths[label].append(Truth(where, there, bool(draw.random() < 0.1)))
            for _ in range(draw.integers(0, 3)):
                moved = np.array(there) + draw.normal(0, 4, 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 1)
                score = round(float(draw.random()), 2)
                found[label].append(Detection(where, score, tuple(float(v) for v in moved)))
        for _ in range(3):
            left, top, wide, tall = (
                float(v) for v in (*draw.uniform(0, 80, 2), *draw.uniform(8, 60, 2))
            )
            label = int(draw.integers(classes))
            box = (left, top, left + wide, top + tall)
            found[label].append(Detection(where, round(float(draw.random()), 2), box))
    assert sum(map(len, found)) > 1500 and sum(map(len, truths)) > 1000

    def plain(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    flat = [(label, one) for label, some in enumerate(truths) for one in some]
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": number} for number in range(images)],
            "categories": [{"id": number} for number in range(classes)],
            "annotations": [
                {
                    "id": number + 1,
                    "image_id": one.image,
                    "category_id": label,
                    "bbox": plain(one.box),
                    "area": plain(one.box)[2] * plain(one.box)[3],
                    "iscrowd": int(one.difficult),
                }
                for number, (label, one) in enumerate(flat)
            ],
        }
        known.createIndex()
        results = known.loadRes(
            [
                {"image_id": o.image, "category_id": c, "bbox": plain(o.box), "score": o.score}
                for c, some in enumerate(found)
                for o in some
            ]
        )
        judge = COCOeval(known, results, "bbox")
        judge.evaluate()
        judge.accumulate()
    theirs = judge.eval["precision"][:, :, :, 0, 2].mean(1)  # overlaps x classes
    ours = precisions(found, truths, "abcde", "coco")
    assert np.abs(ours.values.T - theirs).max() < 5e-4
    assert 0.05 < ours.ap < 0.9
