"""A run's recorded numbers, judged in words: what is so, why, and what to do.

A pure function of the lines of metrics.jsonl. Every threshold stands here with its reason; where
"seen" is said, it was in the recorded runs of tests/traces (docs/log.md, 2026-11-24).
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# The effective rank of a head's outputs was seen at 16 % of their dimensions or more in healthy
# runs (5.9 % of a memory bank's after 46 steps), at 4.2 % or less in collapsed ones.
COLLAPSED_RANK = 0.05
# Unit vectors on the sphere have deviation 1. A head in its warm-up was seen at 0.4.
COLLAPSED_DEVIATION = 0.05
# Views are normalised, so photographs deviate by about 1; a level of 255 is 0.015.
ALIKE_IMAGES = 0.02
# Other groups took half of a leaking run's contrast, and nothing beyond chance of a healthy one's.
LEAK_SHARE = 0.75
LEAK_ERRORS = 3.0  # standard errors by which the two must differ
# MoCo v1, section 4.1 (ImageNet): 0 fails, 0.9 loses 4 points of 59.0, 0.99 loses 1.
LEAST_MOMENTUM = 0.5
# Healthy runs were seen above chance for up to 150 steps with a full queue, all in a warm-up
# of the learning rate, and not afterwards.
PATIENCE = 225  # steps with both behind it, before a loss at the level of chance means something
# A loss this far above chance cannot come from unit vectors at a temperature of 0.2, and was not
# seen at 0.07 (1.2 times chance at most). Where the level is unknown, only an absurd loss is told.
FAR_SHARE, FAR_LEAST = 2.0, 10.0
ABSURD, LARGEST = 1000.0, 1e6  # times the first loss, or 1; of any method
# Equal scores differ by more than two standard errors in one of 44 cases.
SCORE_ERRORS = 2.0
UNKNOWN_ERROR = 0.001  # of how many images is not recorded: what is shown alike is not a gain
DATA_BOUND = 0.1  # share of the time; the guide's figure too
SETTLED = 3  # lines after the first, before a share of the time means something
OWN_KEYS = 0.05  # share of queries that meet their image's older key; ImageNet has 0.1 %
RECENT = 20  # lines that speak for the present

Kind = Literal[
    "alike", "untrained", "pixels", "diverged", "collapsed", "leak", "momentum", "guessing",
    "filling", "data-bound", "own keys",
]  # fmt: skip
NOTICES = frozenset({"filling", "data-bound", "own keys"})  # these say nothing against the weights


Lines = Sequence[Mapping[str, Any]]
Health = Mapping[str, Any]
Found = tuple[Kind, str] | None


@dataclass(frozen=True)
class Verdict:
    """What was found, the gravest first; nothing found is healthy."""

    findings: tuple[tuple[Kind, str], ...]
    reason: str  # for calling it healthy

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(kind for kind, _ in self.findings)

    @property
    def healthy(self) -> bool:
        return all(kind in NOTICES for kind in self.kinds)

    @property
    def text(self) -> str:
        """One sentence for each finding; a run that is filling its queue is not yet called well."""
        sentences = [sentence for _, sentence in self.findings]
        if self.healthy and "filling" not in self.kinds:
            sentences.insert(0, f"healthy: {self.reason}")
        return ". ".join(sentences)


def verdict(lines: Lines) -> Verdict | None:
    """The judgement of metrics.jsonl up to its last line; None before the first."""
    # JSON has null for a loss that is not finite.
    steps = [{"loss": math.inf, **_numbers(line)} for line in lines if "loss" in line]
    steps = [line for line in steps if "step" in line]
    if not steps:
        return None
    measured: Health = next((line for line in reversed(lines) if "rankme_head" in line), {})
    health: dict[str, Any] = _numbers(measured) | _scores(lines)
    if isinstance(reason := measured.get("leak_unchecked"), str):
        health["leak_unchecked"] = reason
    judges: tuple[Callable[[Lines, Health], Found], ...]
    if steps[-1].get("queue_filled", 1.0) < 1:
        judges = (_alike, _untrained, _pixels, _diverged, _momentum, _filling, _data_bound)
    else:
        judges = (
            *(_alike, _untrained, _pixels, _diverged, _collapsed, _leak, _momentum, _guessing),
            *(_own_keys, _data_bound),
        )
    findings = [found for judge in judges if (found := judge(steps, health)) is not None]
    if findings and findings[0][0] == "alike":  # which explains all but the machine's part
        findings = [found for found in findings if found[0] in ("alike", "data-bound")]
    if "diverged" in dict(findings):
        findings = [found for found in findings if found[0] != "guessing"]
    return Verdict(tuple(findings), _well(steps, health))


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What a line measures: neither null nor NaN, which say nothing, nor what is no number."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    }


def _alike(steps: Lines, health: Health) -> Found:
    between = health.get("image_deviation")
    if between is None or between >= ALIKE_IMAGES:
        return None
    return "alike", (
        f"the images are all alike: their pixels deviate by {between:.2g} of a normalised level, "
        "so there is nothing to tell apart; look at views.png and at the data"
    )


def _scores(lines: Lines) -> dict[str, float]:
    """The latest kNN score of each kind, and the number of images that it was taken on."""
    names = ("knn_backbone", "knn_random_weights", "knn_raw_pixels", "scored_images")
    every = map(_numbers, lines)
    found = {name: line[name] for line in every for name in names if name in line}
    protocols = [line["protocol"] for line in lines if isinstance(line.get("protocol"), str)]
    if "scored_images" not in found and protocols:  # 0.1 recorded it in words alone
        words = re.search(r"([\d,]+) queries", protocols[-1])
        found |= {"scored_images": float(words[1].replace(",", ""))} if words else {}
    return found


def _untrained(steps: Lines, health: Health) -> Found:
    gain, error = _gain(health, "knn_random_weights")
    if gain is None or gain > error:
        return None
    word = "worse" if gain < -error else "no better"
    images = f" ({_told_apart(health, error)})" if word == "no better" else ""
    return "untrained", (
        f"{word} than random weights so far: kNN {health['knn_backbone']:.1%}, random weights "
        f"{health['knn_random_weights']:.1%}{images}; train longer, or look at views.png and at "
        "the data"
    )


def _pixels(steps: Lines, health: Health) -> Found:
    gain, error = _gain(health, "knn_raw_pixels")
    if gain is None or gain > 0:
        return None
    word = "better" if gain < -error else "as good so far"
    return "pixels", (
        f"raw pixels are {word}: {health['knn_raw_pixels']:.1%}, where the trained backbone has "
        f"{health['knn_backbone']:.1%}; too short a run, or views that destroy what matters"
    )


def _gain(health: Health, baseline: str) -> tuple[float | None, float]:
    """By how much the trained backbone exceeds a baseline, and what chance alone would explain.

    The error is that of two binomial shares of the same number of images, with a success and a
    failure added to each, so that few images or scores of 0 and 1 do not feign certainty (Agresti
    and Caffo 2000). Both are scored on the same images, which makes it too large, if anything.
    """
    if not {"knn_backbone", baseline} <= health.keys():
        return None, 0.0
    scores, images = (health["knn_backbone"], health[baseline]), health.get("scored_images")
    if min(scores) >= 1:  # so easy a task tells nothing of the weights
        return None, 0.0
    if not images:
        return scores[0] - scores[1], UNKNOWN_ERROR
    trained, other = ((images * score + 1) / (images + 2) for score in scores)
    variance = (trained * (1 - trained) + other * (1 - other)) / (images + 2)
    return trained - other, SCORE_ERRORS * math.sqrt(variance)


def _told_apart(health: Health, error: float) -> str:
    if not health.get("scored_images"):
        return "the number of images is not recorded"
    return f"{health['scored_images']:,.0f} images tell no less than {100 * error:.1f} points apart"


def _diverged(steps: Lines, health: Health) -> Found:
    level, loss = steps[-1].get("chance_loss"), max(_present(steps), steps[-1]["loss"], key=abs)
    if level is not None:
        limit, where = level + max(FAR_SHARE * level, FAR_LEAST), f"guessing costs {level:.2f}"
    else:
        first = next((line["loss"] for line in steps if math.isfinite(line["loss"])), 0.0)
        limit, where = min(ABSURD * max(abs(first), 1.0), LARGEST), f"it began at {first:.3g}"
    if abs(loss) <= limit:
        return None
    return "diverged", (
        f"the loss has diverged: {loss:.3g}, where {where}; start again with a lower optim.lr, or "
        "with engine.precision=float32"
    )


def _collapsed(steps: Lines, health: Health) -> Found:
    rank, of = health.get("rankme_head"), health.get("rankme_head_of")
    spread = health.get("deviation", 1.0)
    if rank is None or of is None:
        spread = _recent(steps, "feature_std", 1.0)
        if spread >= COLLAPSED_DEVIATION:
            return None
        what = f"queries deviate by {spread:.2g}, where 1 fills the sphere"
    elif rank >= COLLAPSED_RANK * of and spread >= COLLAPSED_DEVIATION:
        return None
    elif rank < COLLAPSED_RANK * of:
        what = f"effective rank {rank:.1f} of {of:.0f}"
    else:
        what = f"outputs deviate by {spread:.2g}, where 1 fills the sphere"
    rate = max(line.get("lr", 0.0) for line in steps)
    tried = f" (it reached {rate:.3g})" if rate else ""
    return "collapsed", (
        f"collapsed: {what}; start again with a lower optim.lr{tried}, or with optim.warmup_epochs"
    )


def _leak(steps: Lines, health: Health) -> Found:
    trained, other = health.get("contrast_trained"), health.get("contrast_regrouped")
    images = health.get("contrasted_images")
    if trained is None or other is None or not images:
        return None
    error = math.sqrt((trained * (1 - trained) + other * (1 - other)) / images)
    if other >= LEAK_SHARE * trained or trained - other <= LEAK_ERRORS * error:
        return None
    return "leak", (
        f"statistics leak: contrast accuracy drops from {trained:.0%} to {other:.0%} when groups "
        "are re-drawn, so batch norm gives the answer away; turn the key shuffle on "
        "(method.shuffle=true), with at least two groups (method.group_size)"
    )


def _momentum(steps: Lines, health: Health) -> Found:
    momentum = steps[-1].get("key_momentum")
    if momentum is None or momentum >= LEAST_MOMENTUM:
        return None
    return "momentum", (
        f"inconsistent keys: with key momentum {momentum:.3g} each step's keys come from another "
        "encoder, and the queue mixes them; MoCo v1 found that 0 fails; set method.momentum=0.99 "
        "or more"
    )


def _guessing(steps: Lines, health: Health) -> Found:
    level, under_way = steps[-1].get("chance_loss"), _under_way(steps)
    if level is None or steps[-1]["step"] - under_way[0]["step"] < PATIENCE:
        return None
    if "bank_seen" in steps[-1]:
        # A healthy memory bank costs more than chance for epochs: entries seen lately resemble
        # every query, while an image's own is an epoch old.
        return None
    middle = (under_way[0]["step"] + steps[-1]["step"]) / 2
    loss = _recent([line for line in under_way if line["step"] > middle], "loss", 0.0)
    if loss < level:
        return None
    return "guessing", (
        f"no better than guessing: the loss, {loss:.2f}, is at the level of chance, {level:.2f}, "
        f"after {steps[-1]['step']:,} steps; the usual cause is a learning rate too high, or else "
        "views that share nothing (views.png)"
    )


def _filling(steps: Lines, health: Health) -> Found:
    filled, step = steps[-1]["queue_filled"], steps[-1]["step"]
    until = math.ceil(round(step / filled, 6)) if filled else None
    when = f"until step {until:,}" if until else "at first"
    return "filling", f"still filling the queue: a rising loss is expected {when}"


def _data_bound(steps: Lines, health: Health) -> Found:
    later = steps[1:]  # the first line holds the start of the loading processes
    wait = _recent(later, "data_wait", 0.0)
    if wait <= DATA_BOUND or len(later) < SETTLED:
        return None
    return "data-bound", (
        f"data-bound: the device waits {wait:.0%} of the time; raise data.workers, or keep the "
        "images smaller or on a faster disk"
    )


def _own_keys(steps: Lines, health: Health) -> Found:
    share = health.get("positives_in_queue")
    if share is None or share <= OWN_KEYS:
        return None
    return "own keys", (
        f"the queue is long for so few images: {share:.0%} of queries meet their own image's older "
        "key among the negatives; lower method.queue_size"
    )


def _well(steps: Lines, health: Health) -> str:
    level = steps[-1].get("chance_loss")
    chance = f" (chance {level:.2f})" if level is not None else ""
    parts = ["its only loss so far was against random vectors"]
    if any(map(_full, steps)):
        parts = [f"loss {_present(steps):.2f}{chance}"]
    if "knn_backbone" in health and "knn_random_weights" not in health:
        parts.append(f"kNN {health['knn_backbone']:.1%}, not yet compared with random weights")
    elif "knn_backbone" in health:
        pixels = health.get("knn_raw_pixels")
        parts.append(
            f"kNN {health['knn_backbone']:.1%} (random weights {health['knn_random_weights']:.1%}"
            + (f", raw pixels {pixels:.1%})" if pixels is not None else ")")
        )
    if {"rankme_head", "rankme_head_of"} <= health.keys():
        parts.append(
            f"effective rank {health['rankme_head']:.0f} of {health['rankme_head_of']:.0f}"
        )
    if {"contrast_trained", "contrast_regrouped"} <= health.keys():
        trained, other = health["contrast_trained"], health["contrast_regrouped"]
        parts.append(f"contrast {trained:.0%}, and {other:.0%} in other groups")
    elif "leak_unchecked" in health:
        parts.append(f"statistics leak not checked: {health['leak_unchecked']}")
    return ", ".join(parts)


def _under_way(steps: Lines) -> Lines:
    """The lines with a full queue, from the highest learning rate on; at least the last one."""
    rates = [line.get("lr") or 0.0 for line in steps]
    peak = rates.index(max(rates))
    return [line for line in steps[peak:] if _full(line)] or steps[-1:]


def _full(line: Mapping[str, Any]) -> bool:
    """Whether the loss was against keys: the first step's keys come too late for its own loss."""
    return "queue_filled" not in line or (line["queue_filled"] >= 1 and line["step"] > 1)


def _present(steps: Lines) -> float:
    """The loss of late; against a queue of random vectors it says nothing, if there is another."""
    return _recent([line for line in steps if _full(line)] or steps, "loss", math.nan)


def _recent(steps: Lines, name: str, otherwise: float) -> float:
    """The median of the last lines, so that no single batch decides."""
    values = [line[name] for line in steps[-RECENT:] if line.get(name) is not None]
    return float(statistics.median(values)) if values else otherwise
