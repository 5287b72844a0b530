"""Every value of the detection protocol (MoCo v1, arXiv 1911.05722, appendix; MoCo v2's 24k)."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mocokit.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
IMAGES = 16  # a step, which the learning rate and the number of iterations belong to
ITERATIONS = {"07+12": 24_000, "07": 9_000}


class Plan(BaseModel):
    """The defaults are the authors' 24k configuration on detectron2's defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    iterations: int = Field(ITERATIONS["07+12"], ge=0, description="steps of the optimiser")
    ims_per_step: Count = Field(IMAGES, description="images a step")
    lr: float = Field(0.02, gt=0, description="learning rate after warm-up")
    momentum: Share = Field(0.9, description="of SGD, without Nesterov")
    weight_decay: float = Field(1e-4, ge=0, description="not on scales and shifts of norms")
    drops: tuple[int, ...] = Field((18_000, 22_000), description="steps where lr falls")
    gamma: Share = Field(0.1, description="what the learning rate is multiplied with at a drop")
    warmup: int = Field(100, ge=0, description="steps from warmup_factor of the rate to all of it")
    warmup_factor: Share = Field(0.001, description="share of the rate at the first step")
    sides: tuple[Count, ...] = Field(tuple(range(480, 801, 32)), description="short sides drawn")
    max_side: Count = Field(1333, description="cap of the long side, training and test")
    test_side: Count = Field(800, description="short side at test")
    flip: Share = Field(0.5, description="probability of a mirrored training image")
    anchor_sizes: tuple[float, ...] = Field((32, 64, 128, 256, 512), description="sqrt of area")
    anchor_ratios: tuple[float, ...] = Field((0.5, 1, 2), description="height over width")
    rpn_batch: Count = Field(256, description="anchors an image that the RPN learns from")
    rpn_positive: Share = Field(0.5, description="at most this share of them on objects")
    rpn_low: Share = Field(0.3, description="an anchor below this overlap is background")
    rpn_high: Share = Field(0.7, description="an anchor from this overlap on is an object")
    rpn_nms: Share = Field(0.7, description="proposals overlapping a better one more are dropped")
    pre_nms_train: Count = Field(12_000, description="proposals an image before NMS, training")
    post_nms_train: Count = Field(2_000, description="and after it")
    pre_nms_test: Count = Field(6_000, description="proposals an image before NMS, test")
    post_nms_test: Count = Field(1_000, description="and after it")
    roi_batch: Count = Field(512, description="proposals an image that the head learns from")
    roi_positive: Share = Field(0.25, description="at most this share of them on objects")
    roi_overlap: Share = Field(0.5, description="a proposal from this overlap on is an object")
    pooled: Count = Field(14, description="side of what RoIAlign gives the head")
    score: Share = Field(0.05, description="detections must be surer than this")
    nms: Share = Field(0.5, description="detections overlapping a better one more are dropped")
    detections: Count = Field(100, description="of an image, at most")
    precise_bn: int = Field(200, ge=0, description="batches for statistics before a test; 0: none")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.lr * self.gamma ** sum(step >= drop for drop in self.drops)
        if step >= self.warmup:
            return rate
        share = step / self.warmup
        return rate * (self.warmup_factor * (1 - share) + share)


def plan_for(
    split: str,
    iterations: int | None = None,
    ims_per_step: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """The protocol of a split; iterations, images a step and the learning rate scale together.

    Fewer images a step take a rate as much lower and as many more iterations, unless they are
    stated; drops stay at 3/4 and 11/12 of the way, and warm-up below a tenth of it. `settings` are
    last, and change nothing else. Raises UserError.
    """
    stated = dict(settings or {})
    images = stated.get("ims_per_step", ims_per_step)
    images = IMAGES if images is None else images
    if not isinstance(images, int) or images < 1:
        raise UserError(f"ims_per_step {images!r} must be a number of images, at least 1")
    steps = stated.get("iterations", iterations)
    if steps is None:
        steps = round(ITERATIONS[split] * IMAGES / images)
    if not isinstance(steps, int) or steps < 0:
        raise UserError(f"iterations {steps!r} must be a number of steps, at least 0")
    warmup = round(100 * IMAGES / images)
    values: dict[str, Any] = {
        "iterations": steps,
        "ims_per_step": images,
        "lr": 0.02 * images / IMAGES,
        "drops": (round(steps * 3 / 4), round(steps * 11 / 12)),
        "warmup": min(warmup, steps // 10) if steps < ITERATIONS["07"] else warmup,
    }
    try:
        return Plan(**values | stated)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, Plan.model_fields, n=1)
            hint = f"did you mean {close[0]}?" if close else "the guide lists them"
            raise UserError(f"--set {name}: the protocol has no such value; {hint}") from None
        raise UserError(f"--set {name}={first['input']!r}: {first['msg'].lower()}") from None
