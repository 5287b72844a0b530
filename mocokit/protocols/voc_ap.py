"""Average precision of detections by PASCAL VOC's two rules and by COCO's.

VOC's rules follow detectron2's PascalVOCDetectionEvaluator, whose numbers the MoCo papers quote.
VOC boxes are in VOC's coordinates: whole pixels counted from 1, with both ends inside the box.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Metric = Literal["voc07", "area", "coco"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
COCO_MOST = 100  # detections per image that COCO counts


class Detection(NamedTuple):
    """A detected box of one class."""

    image: Hashable
    score: float
    box: Box


class Truth(NamedTuple):
    """A true box of one class. A `difficult` one (COCO: a crowd) need not be detected."""

    image: Hashable
    box: Box
    difficult: bool = False


def average_precision(
    detections: Iterable[tuple[Hashable, float, Box]],
    ground_truth: Iterable[tuple[Any, ...]],
    iou: float,
    metric: Metric = "voc07",
) -> float:
    """The average precision in [0, 1] of one class at one overlap.

    Detections are (image, score, box), ground truths (image, box) or (image, box, difficult), and
    boxes (left, top, right, bottom). `voc07` is the mean precision at 11 recalls (VOC 2007). `area`
    is the area under the curve (since VOC 2010). For both, a detection is matched to the true box
    with the largest overlap. It is correct if that overlap is more than `iou` and no detection of
    higher score was matched to that box. Areas include the last pixel. `coco` is COCO's mean over
    101 recalls, with overlaps of at least `iou` and plain areas. Detections of equal score keep
    their order. The result is 0 if there is nothing to detect.
    """
    if metric not in ("voc07", "area", "coco"):
        raise ValueError(f"unknown metric {metric!r}; use voc07, area or coco")
    found = [Detection(*one) for one in detections]
    return _averages(found, [Truth(*one) for one in ground_truth], (iou,), metric)[0]


def _averages(
    detections: Sequence[Detection],
    ground_truth: Sequence[Truth],
    levels: Sequence[float],
    metric: Metric,
) -> list[float]:
    """The average precision of one class at each of these overlaps."""
    truths: dict[Hashable, list[Truth]] = defaultdict(list)
    for truth in ground_truth:
        truths[truth.image].append(truth)
    wanted = sum(not truth.difficult for truth in ground_truth)
    if not wanted:
        return [0.0] * len(levels)
    matches = (_CocoMatches if metric == "coco" else _VocMatches)(detections, truths)
    values = []
    for iou in levels:
        right, wrong = matches.judge(iou)
        hits, misses = np.cumsum(right), np.cumsum(wrong)
        precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
        values.append(float(_CURVES[metric](hits / wanted, precision)))
    return values


class _VocMatches:
    """The largest overlap of each detection, highest score first, and its true box."""

    def __init__(
        self, detections: Sequence[Detection], truths: Mapping[Hashable, list[Truth]]
    ) -> None:
        order = np.argsort([-one.score for one in detections], kind="stable")
        ranks: dict[Hashable, list[int]] = defaultdict(list)
        for rank, at in enumerate(order.tolist()):
            ranks[detections[at].image].append(rank)
        self.overlap = np.full(len(order), -1.0)
        self.box = np.zeros(len(order), np.int64)  # its number among the boxes of all images
        self.difficult = np.zeros(len(order), bool)
        first = 0
        for image, there in truths.items():
            rows = np.array(ranks.get(image, []), np.int64)
            if len(rows):
                found = np.array([detections[order[rank]].box for rank in rows], np.float64)
                shares = overlaps(found, np.array([one.box for one in there], np.float64), 1.0)
                best = shares.argmax(1)
                self.overlap[rows] = shares.max(1)
                self.box[rows] = first + best
                self.difficult[rows] = np.array([one.difficult for one in there])[best]
            first += len(there)

    def judge(self, iou: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which detections are correct and which wrong. On a difficult box they are neither."""
        hit = self.overlap > iou
        counted = np.flatnonzero(hit & ~self.difficult)
        surest = np.unique(self.box[counted], return_index=True)[1]
        right = np.zeros(len(hit), bool)
        right[counted[surest]] = True
        return right, ~hit | (~self.difficult & ~right)


class _CocoMatches:
    """The overlaps of the best detections of each image with its true boxes."""

    def __init__(
        self, detections: Sequence[Detection], truths: Mapping[Hashable, list[Truth]]
    ) -> None:
        of_image: dict[Hashable, list[int]] = defaultdict(list)
        for at in np.argsort([-one.score for one in detections], kind="stable").tolist():
            of_image[detections[at].image].append(at)
        kept = sorted(at for found in of_image.values() for at in found[:COCO_MOST])
        scores = np.array([detections[at].score for at in kept])
        # Of equal scores, the first in the input counts first.
        self.order = np.array(kept, np.int64)[np.argsort(-scores, kind="stable")]
        self.count = len(detections)
        self.images = []
        for image in of_image.keys() & truths.keys():
            found = of_image[image][:COCO_MOST]
            crowd = np.array([one.difficult for one in truths[image]], bool)
            boxes = np.array([one.box for one in truths[image]], np.float64)
            corners = np.array([detections[at].box for at in found], np.float64)
            self.images.append((found, crowd, overlaps(corners, boxes, 0.0, crowd)))

    def judge(self, iou: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which are correct and wrong by COCO's rule: a detection takes the best unmatched box."""
        right, wrong = np.zeros(self.count, bool), np.ones(self.count, bool)
        for found, crowd, shares in self.images:
            free = ~crowd
            for at, row in zip(found, shares, strict=True):
                fit = free & (row >= iou)
                if fit.any():
                    # Of equally good boxes the last, as in COCO's own code.
                    best = len(row) - 1 - int(np.where(fit, row, -1.0)[::-1].argmax())
                    free[best], right[at], wrong[at] = False, True, False
                elif (crowd & (row >= iou)).any():
                    wrong[at] = False
        return right[self.order], wrong[self.order]


def overlaps(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    pixel: float,
    crowd: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Intersection over union (N, M) of boxes (N, 4) and (M, 4), with `pixel` added to each side.

    For a crowd (M,) it is the share of the first box inside the second.
    """
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low + pixel, 0.0, None).prod(2)
    area = (first[:, 2:] - first[:, :2] + pixel).prod(1)[:, None]
    other = (second[:, 2:] - second[:, :2] + pixel).prod(1)[None]
    union = area + other - shared
    if crowd is not None:
        union = np.where(crowd[None], area, union)
    shares: NDArray[np.float64] = np.divide(
        shared, union, out=np.zeros_like(shared), where=union > 0
    )
    return shares


def _eleven_points(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    points = [precision[recall >= level].max(initial=0.0) for level in np.arange(0.0, 1.1, 0.1)]
    return float(np.sum(np.array(points) / 11.0))


def _area(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """The area under the curve, after precision is made to never rise with recall."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _hundred_points(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    places = np.searchsorted(recall, np.linspace(0.0, 1.0, 101), side="left")
    return float(envelope[places].mean())


_CURVES = {"voc07": _eleven_points, "area": _area, "coco": _hundred_points}


@dataclass(frozen=True)
class Precisions:
    """The average precision of each class at each overlap, (classes, overlaps) in [0, 1]."""

    classes: tuple[str, ...]
    values: NDArray[np.float64]
    wanted: tuple[int, ...]  # number of true boxes to detect, by class

    @property
    def _of_wanted(self) -> NDArray[np.float64]:
        """The values of all classes that have a box in the test images."""
        return self.values[np.array(self.wanted) > 0]

    @property
    def ap(self) -> float:
        """The mean over IoU .50:.05:.95 and over classes, as COCO defines AP."""
        return float(self._of_wanted.mean()) if sum(self.wanted) else 0.0

    def at(self, percent: int) -> float:
        """The mean over classes at an overlap of 50, 55, ... or 95 percent."""
        column = THRESHOLDS.index(percent / 100)
        return float(self._of_wanted[:, column].mean()) if sum(self.wanted) else 0.0


def precisions(
    detections: Sequence[Sequence[Detection]],
    truths: Sequence[Sequence[Truth]],
    classes: Sequence[str],
    metric: Metric,
) -> Precisions:
    """For each class, at IoU .50:.05:.95. Detections and truths are lists by class."""
    values = [
        _averages(found, there, THRESHOLDS, metric)
        for found, there in zip(detections, truths, strict=True)
    ]
    wanted = tuple(sum(not one.difficult for one in there) for there in truths)
    return Precisions(tuple(classes), np.array(values).reshape(len(classes), -1), wanted)


def as_written(detection: Detection) -> Detection:
    """A detection in pixels from 0, as detectron2 writes it for VOC: in pixels from 1, rounded."""
    # In float32, because detectron2's boxes are, and rounding depends on it.
    corners = np.array(detection.box, np.float32) + np.array([1, 1, 0, 0], np.float32)
    left, top, right, bottom = (float(f"{value:.1f}") for value in corners)
    score = float(f"{detection.score:.3f}")
    return Detection(detection.image, score, (left, top, right, bottom))
