"""Average precision of detections: PASCAL VOC's two rules, and COCO's.

VOC's as detectron2's PascalVOCDetectionEvaluator has them, which is what the MoCo papers quote.
Boxes of VOC are in its own coordinates: whole pixels counted from 1, both ends inside the box.
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
COCO_MOST = 100  # detections of an image that COCO looks at


class Detection(NamedTuple):
    """A box of one class found in an image."""

    image: Hashable
    score: float
    box: Box


class Truth(NamedTuple):
    """A box of one class that is there. `difficult` (COCO: a crowd) need not be found."""

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

    Detections are (image, score, box), ground truths (image, box) or (image, box, difficult), boxes
    (left, top, right, bottom). `voc07` is the mean of precision at 11 recalls (VOC 2007), `area`
    the area under the curve (VOC 2010 on): a detection is right if its overlap with the box that it
    overlaps most is more than `iou` and no surer one took that box; areas count the last pixel.
    `coco` is COCO's mean over 101 recalls: overlaps of at least `iou`, plain areas. Equal scores
    keep the order in which they are given. 0 where there is nothing to find.
    """
    if metric not in ("voc07", "area", "coco"):
        raise ValueError(f"metric {metric!r} is not one; take voc07, area or coco")
    truths: dict[Hashable, list[Truth]] = defaultdict(list)
    for truth in ground_truth:
        truths[truth[0]].append(Truth(*truth))
    wanted = sum(not truth.difficult for some in truths.values() for truth in some)
    if not wanted:
        return 0.0
    judge = _judge_coco if metric == "coco" else _judge_voc
    right, wrong = judge([Detection(*one) for one in detections], truths, iou)
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    recall = hits / wanted
    precision = hits / np.maximum(hits + misses, np.finfo(np.float64).eps)
    return float(_CURVES[metric](recall, precision))


def _judge_voc(
    detections: list[Detection], truths: Mapping[Hashable, list[Truth]], iou: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which detections, the surest first, are right, and which are wrong; the rest do not count."""
    order = np.argsort([-one.score for one in detections], kind="stable")
    right, wrong = np.zeros(len(order), bool), np.zeros(len(order), bool)
    known = {
        image: (np.array([one.box for one in some], np.float64), [False] * len(some))
        for image, some in truths.items()
    }
    for rank, at in enumerate(order.tolist()):
        found = detections[at]
        if found.image not in known:
            wrong[rank] = True
            continue
        boxes, taken = known[found.image]
        overlap = overlaps(np.array([found.box], np.float64), boxes, 1.0)[0]
        best = int(overlap.argmax())
        if not overlap[best] > iou:
            wrong[rank] = True
        elif not truths[found.image][best].difficult:
            (wrong if taken[best] else right)[rank] = True
            taken[best] = True
    return right, wrong


def _judge_coco(
    detections: list[Detection], truths: Mapping[Hashable, list[Truth]], iou: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The same by COCO's rule: a detection takes the best box that is still free."""
    of_image: dict[Hashable, list[int]] = defaultdict(list)
    for at in np.argsort([-one.score for one in detections], kind="stable").tolist():
        of_image[detections[at].image].append(at)
    kept: list[int] = []
    right, wrong = np.zeros(len(detections), bool), np.zeros(len(detections), bool)
    for image, found in of_image.items():
        found = found[:COCO_MOST]
        kept += found
        known = truths.get(image, [])
        crowd = np.array([one.difficult for one in known], bool)
        boxes = np.array([one.box for one in known], np.float64).reshape(-1, 4)
        own = np.array([detections[at].box for at in found], np.float64)
        overlap, free = overlaps(own, boxes, 0.0, crowd), np.ones(len(known), bool)
        for at, row in zip(found, overlap, strict=True):
            real = np.where(free & ~crowd & (row >= iou), row, -1.0)
            if real.size and real.max() >= 0:
                # Of equally good boxes the last, as COCO's own code takes.
                best = len(real) - 1 - int(real[::-1].argmax())
                free[best], right[at] = False, True
            else:
                wrong[at] = not bool((crowd & (row >= iou)).any())
    kept.sort()  # of equal scores the first given counts first
    scores = np.array([detections[at].score for at in kept])
    order = np.array(kept, np.int64)[np.argsort(-scores, kind="stable")]
    return right[order], wrong[order]


def overlaps(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    pixel: float,
    crowd: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """Intersection over union (N, M) of boxes (N, 4) and (M, 4), `pixel` added to every side.

    Over a crowd (M,), it is the share of the first box that lies in the second.
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
    """Under the curve whose precision never rises with recall."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _hundred_points(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    places = np.searchsorted(recall, np.linspace(0.0, 1.0, 101), side="left")
    return float(envelope[places].mean())


_CURVES = {"voc07": _eleven_points, "area": _area, "coco": _hundred_points}


@dataclass(frozen=True)
class Precisions:
    """Average precision of every class at every overlap, (classes, overlaps) in [0, 1]."""

    classes: tuple[str, ...]
    values: NDArray[np.float64]
    wanted: tuple[int, ...]  # boxes to find, by class

    @property
    def _of_wanted(self) -> NDArray[np.float64]:
        """A class of which there is no box in the test images says nothing."""
        return self.values[np.array(self.wanted) > 0]

    @property
    def ap(self) -> float:
        """COCO-style: the mean over IoU .50:.05:.95, and over classes."""
        return float(self._of_wanted.mean()) if sum(self.wanted) else 0.0

    def at(self, percent: int) -> float:
        """The mean over classes at an overlap of 50, 55, ... 95 percent."""
        column = THRESHOLDS.index(percent / 100)
        return float(self._of_wanted[:, column].mean()) if sum(self.wanted) else 0.0


def precisions(
    detections: Sequence[Sequence[Detection]],
    truths: Sequence[Sequence[Truth]],
    classes: Sequence[str],
    metric: Metric,
) -> Precisions:
    """Of every class, at IoU .50:.05:.95; detections and truths are lists by class."""
    values = [
        [average_precision(found, there, iou, metric) for iou in THRESHOLDS]
        for found, there in zip(detections, truths, strict=True)
    ]
    wanted = tuple(sum(not one.difficult for one in there) for there in truths)
    return Precisions(tuple(classes), np.array(values).reshape(len(classes), -1), wanted)


def as_written(detection: Detection) -> Detection:
    """A detection in coordinates from 0, as detectron2 writes it for VOC: from 1, and rounded."""
    # float32, as its boxes are.
    corners = np.array(detection.box, np.float32) + np.array([1, 1, 0, 0], np.float32)
    left, top, right, bottom = (float(f"{value:.1f}") for value in corners)
    score = float(f"{detection.score:.3f}")
    return Detection(detection.image, score, (left, top, right, bottom))
