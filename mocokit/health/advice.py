"""Whether longer training still pays: the curve of kNN, or else of RankMe, in a sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LAST = 0.25  # the share of the epochs whose gain is looked at
LEAST_POINTS = 4
KNN_GAIN = 0.005  # half a point: below, no longer run is worth its time
RANK_GAIN = 0.03  # of the rank
NOISE = 3.0  # deviations of a single score that a gain must exceed

SILENT = "no advice on the length of the run"

Point = tuple[float, float]


def advise(lines: Sequence[Mapping[str, Any]]) -> str:
    """The advice that metrics.jsonl gives, by its kNN scores if there are enough, else by RankMe.

    Where neither was scored often enough, why there is none.
    """
    knn = curve(lines, "knn_backbone")
    if len(knn) >= LEAST_POINTS:
        return _sentence(knn, "kNN", KNN_GAIN, lambda value: f"{100 * value:.1f} %")
    rank = curve(lines, "rankme")
    if len(rank) >= LEAST_POINTS:
        least = RANK_GAIN * max(value for _, value in rank)
        weak = " (without labels only the rank speaks, which is a weaker sign)"
        return _sentence(rank, "RankMe", least, lambda value: f"{value:.1f}") + weak
    return _silent(knn or rank, "kNN" if knn else "RankMe")


def _silent(points: list[Point], what: str) -> str:
    last = points[-1][0] if points else 0
    remedy = (
        f"set monitor.every_epochs={last // LEAST_POINTS:.0f} or less"
        if last >= LEAST_POINTS
        else f"train for {LEAST_POINTS} epochs or more"
    )
    times = f"{len(points)} time{'s' * (len(points) != 1)}"
    return (
        f"{SILENT}: {what} was measured {times}, and a curve takes {LEAST_POINTS} points; {remedy}"
    )


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """(epoch, value) of every line that has one; of an epoch the last."""
    points = {line["epoch"]: line[name] for line in lines if line.get(name) is not None}
    return sorted((float(epoch), float(value)) for epoch, value in points.items())


def _sentence(points: list[Point], what: str, least: float, shown: Any) -> str:
    (last, end) = points[-1]
    before = max((p for p in points[:-1] if p[0] <= last * (1 - LAST)), default=points[0])
    gain, jitter = end - before[1], NOISE * _jitter(points)
    since = f"from {shown(before[1])} at epoch {before[0]:.0f} to {shown(end)} at epoch {last:.0f}"
    best = max(points, key=lambda point: point[1])
    if gain > max(least, jitter):
        return f"longer training still pays: {what} rose {since}"
    if best[1] - end > max(2 * least, jitter):
        return (
            f"stop earlier: {what} fell from {shown(best[1])} at epoch {best[0]:.0f} to "
            f"{shown(end)} at epoch {last:.0f}"
        )
    if gain > least:
        return f"undecided: {what} rose {since}, which is within its jitter; score more often"
    return f"levelled off: {what} went {since}; a longer run is unlikely to gain much"


def _jitter(points: list[Point]) -> float:
    """Deviation of a score, from how far each lies off the middle of its neighbours.

    A trend does not move that, and a bend moves the median of many little.
    """
    values = [value for _, value in points]
    bends = [
        abs(middle - (left + right) / 2)
        for left, middle, right in zip(values, values[1:], values[2:], strict=False)
    ]
    # Of normal noise with deviation s the median is 0.674 * s * sqrt(1.5).
    return statistics.median(bends) / (0.674 * math.sqrt(1.5))
