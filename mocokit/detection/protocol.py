"""Every value of the detection protocol (MoCo v1, arXiv 1911.05722, appendix; MoCo v2's 24k)."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mocokit.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
BATCH_SIZE = 16  # the learning rate and the number of steps belong to it
STEPS = {"07+12": 24_000, "07": 9_000}
# Names that mocokit 0.1 wrote into its files; they are still understood.
OLD_NAMES = {
    "iterations": "steps",
    "ims_per_step": "batch_size",
    "drops": "drop_steps",
    "gamma": "drop_factor",
}
# The keys of a detectron2 config, for those who copy one.
DETECTRON2_NAMES = {
    "SOLVER.MAX_ITER": "steps",
    "SOLVER.IMS_PER_BATCH": "batch_size",
    "SOLVER.STEPS": "drop_steps",
    "SOLVER.GAMMA": "drop_factor",
}
ALIASES = OLD_NAMES | DETECTRON2_NAMES


class Plan(BaseModel):
    """The defaults are the authors' 24k configuration on detectron2's defaults."""

    # strict: true is no number, and a text none either.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    steps: int = Field(STEPS["07+12"], ge=0, description="optimiser steps (SOLVER.MAX_ITER)")
    batch_size: Count = Field(BATCH_SIZE, description="images per step (SOLVER.IMS_PER_BATCH)")
    lr: float = Field(0.02, gt=0, description="learning rate after warm-up")
    momentum: Share = Field(0.9, description="momentum of SGD, without Nesterov")
    weight_decay: float = Field(1e-4, ge=0, description="none on scales and shifts of norms")
    drop_steps: tuple[int, ...] = Field(
        (18_000, 22_000), description="steps at which the learning rate drops (SOLVER.STEPS)"
    )
    drop_factor: Share = Field(
        0.1, description="factor of the learning rate at each drop (SOLVER.GAMMA)"
    )
    warmup: int = Field(
        100, ge=0, description="steps from warmup_factor of the rate to the full rate"
    )
    warmup_factor: Share = Field(0.001, description="share of the learning rate at the first step")
    sides: tuple[Count, ...] = Field(
        tuple(range(480, 801, 32)), description="short sides in training, chosen at random"
    )
    max_side: Count = Field(1333, description="limit of the long side, in training and test")
    test_side: Count = Field(800, description="short side in the test")
    flip: Share = Field(0.5, description="probability of a mirrored training image")
    anchor_sizes: tuple[float, ...] = Field(
        (32, 64, 128, 256, 512), description="square roots of areas"
    )
    anchor_ratios: tuple[float, ...] = Field((0.5, 1, 2), description="height over width")
    rpn_batch: Count = Field(256, description="anchors per image that train the RPN")
    rpn_positive: Share = Field(0.5, description="largest share of objects among them")
    rpn_low: Share = Field(0.3, description="an anchor below this overlap is background")
    rpn_high: Share = Field(0.7, description="an anchor from this overlap on is an object")
    rpn_nms: Share = Field(0.7, description="proposals that overlap a better one more are removed")
    pre_nms_train: Count = Field(12_000, description="proposals per image before NMS, in training")
    post_nms_train: Count = Field(2_000, description="proposals per image after NMS, in training")
    pre_nms_test: Count = Field(6_000, description="proposals per image before NMS, in the test")
    post_nms_test: Count = Field(1_000, description="proposals per image after NMS, in the test")
    roi_batch: Count = Field(512, description="proposals per image that train the head")
    roi_positive: Share = Field(0.25, description="largest share of objects among them")
    roi_overlap: Share = Field(0.5, description="a proposal from this overlap on is an object")
    pooled: Count = Field(14, description="side of the maps from RoIAlign")
    score: Share = Field(0.05, description="lowest score of a detection")
    nms: Share = Field(0.5, description="detections that overlap a better one more are removed")
    detections: Count = Field(100, description="most detections per image")
    precise_bn: int = Field(
        200, ge=0, description="batches for precise statistics before a test; 0: none"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.lr * self.drop_factor ** sum(step >= drop for drop in self.drop_steps)
        if step >= self.warmup:
            return rate
        share = step / self.warmup
        return rate * (self.warmup_factor * (1 - share) + share)


def renamed(values: Mapping[str, Any], aliases: Mapping[str, str] = ALIASES) -> dict[str, Any]:
    """The same values under today's names. Raises UserError if two names mean one value."""
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = aliases.get(given, given)
        if name in found:
            raise UserError(f"{given}: {name} is given twice; leave out one of its names")
        found[name] = value
    return found


def plan_for(
    split: str,
    steps: int | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """The protocol of a split, scaled to the batch size.

    With fewer images per step the learning rate falls and the number of steps grows in the same
    proportion, unless they are given. Drops stay at 3/4 and 11/12 of the steps. In a run shorter
    than the published ones, warm-up takes at most a tenth of the steps. `settings` are applied
    last and change nothing else; old names and detectron2's are understood. Raises UserError.
    """
    stated = renamed(settings or {})
    images = stated.get("batch_size", batch_size)
    images = BATCH_SIZE if images is None else images
    if type(images) is not int or images < 1:  # True is one of Python's ints
        raise UserError(f"batch_size {images!r} must be a number of images, at least 1")
    steps = stated.get("steps", steps)
    if steps is None:
        steps = round(STEPS[split] * BATCH_SIZE / images)
    if type(steps) is not int or steps < 0:
        raise UserError(f"steps {steps!r} must be a number of steps, at least 0")
    warmup = round(100 * BATCH_SIZE / images)
    values: dict[str, Any] = {
        "steps": steps,
        "batch_size": images,
        "lr": 0.02 * images / BATCH_SIZE,
        "drop_steps": (round(steps * 3 / 4), round(steps * 11 / 12)),
        "warmup": min(warmup, steps // 10) if steps < STEPS["07"] else warmup,
    }
    try:
        return Plan(**values | stated)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, [*Plan.model_fields, *DETECTRON2_NAMES], n=1)
            hint = f"did you mean {close[0]}?" if close else "the guide says where they are listed"
            raise UserError(f"--set {name}: the protocol has no such value; {hint}") from None
        raise UserError(f"--set {name}={first['input']!r}: {first['msg'].lower()}") from None
