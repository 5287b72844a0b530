"""A run's recorded numbers, judged in words: what is so, why, and what to do.

A pure function of the lines of metrics.jsonl. Every threshold stands here with its reason; where
"seen" is said, it was in the recorded runs of tests/traces (docs/log.md, 2026-11-24).
"""

import math
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
# In a warm-up the loss stands above chance for a while (in the demo for 150 steps); in a healthy
# run it was not seen there afterwards.
PATIENCE = 500  # steps with a full queue, before a loss at the level of chance means something
DATA_BOUND = 0.1  # share of the time; the guide's figure too
SETTLED = 3  # lines after the first, before a share of the time means something
OWN_KEYS = 0.05  # share of queries that meet their image's older key; ImageNet has 0.1 %
RECENT = 20  # lines that speak for the present

Kind = Literal[
    "alike", "collapsed", "leak", "momentum", "guessing", "filling", "data-bound", "own keys"
]
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
    steps = [line for line in lines if line.get("loss") is not None]
    if not steps:
        return None
    measured: Health = next((line for line in reversed(lines) if "rankme_head" in line), {})
    health = {name: value for name, value in measured.items() if value is not None}
    judges: tuple[Callable[[Lines, Health], Found], ...]
    if steps[-1].get("queue_filled", 1.0) < 1:
        judges = (_alike, _momentum, _filling, _data_bound)
    else:
        judges = (_alike, _collapsed, _leak, _momentum, _guessing, _own_keys, _data_bound)
    findings = [found for judge in judges if (found := judge(steps, health)) is not None]
    if findings and findings[0][0] == "alike":  # which explains all but the machine's part
        findings = [found for found in findings if found[0] in ("alike", "data-bound")]
    return Verdict(tuple(findings), _well(steps, health))


def _alike(steps: Lines, health: Health) -> Found:
    between = health.get("image_deviation")
    if between is None or between >= ALIKE_IMAGES:
        return None
    return "alike", (
        f"the images are all alike: their pixels deviate by {between:.2g} of a normalised level, "
        "so there is nothing to tell apart; look at views.png and at the data"
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
    full = next((line["step"] for line in steps if line.get("queue_filled", 1.0) >= 1), None)
    level = steps[-1].get("chance_loss")
    if full is None or level is None or steps[-1]["step"] - full < PATIENCE:
        return None
    if "bank_seen" in steps[-1]:
        # A healthy memory bank costs more than chance for epochs: entries seen lately resemble
        # every query, while an image's own is an epoch old.
        return None
    loss = _recent(steps, "loss", 0.0)
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
    loss, level = _recent(steps, "loss", math.nan), steps[-1].get("chance_loss")
    parts = [f"loss {loss:.2f}" + (f" (chance {level:.2f})" if level is not None else "")]
    if "rankme_head" in health:
        parts.append(
            f"effective rank {health['rankme_head']:.0f} of {health['rankme_head_of']:.0f}"
        )
    if "contrast_regrouped" in health:
        trained, other = health["contrast_trained"], health["contrast_regrouped"]
        parts.append(f"contrast {trained:.0%}, and {other:.0%} in other groups")
    elif "leak_unchecked" in health:
        parts.append(f"statistics leak not checked: {health['leak_unchecked']}")
    return ", ".join(parts)


def _recent(steps: Lines, name: str, otherwise: float) -> float:
    """The median of the last lines, so that no single batch decides."""
    values = [line[name] for line in steps[-RECENT:] if line.get(name) is not None]
    return float(statistics.median(values)) if values else otherwise
