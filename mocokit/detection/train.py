"""Fine-tuning of a detector: the training loop, precise batch norm, and the test.

A trial has one seed. Every random number follows from the seed and the step, so a resumed trial
equals an uninterrupted one, bit for bit on a CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mocokit import chance
from mocokit.chance import Slot
from mocokit.data.decode import BadImage
from mocokit.detection.c4 import Detections, Detector
from mocokit.detection.dataset import BoxDataset
from mocokit.detection.protocol import Plan
from mocokit.detection.views import View, ViewSampler, ahead, pairs, view
from mocokit.engine.finite import FiniteWatch, check_weights
from mocokit.engine.runtime import autocast, seed_libraries
from mocokit.errors import NonFiniteLoss
from mocokit.nets.batchnorm import GroupedBatchNorm2d
from mocokit.protocols.voc_ap import (
    Box,
    Detection,
    Metric,
    Precisions,
    Truth,
    as_written,
    precisions,
)


@dataclass
class Trainer:
    """A detector in training, with everything that the next step needs."""

    detector: Detector
    plan: Plan
    data: BoxDataset
    seed: int
    device: torch.device
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str = "float32"
    threads: int = 1
    step: int = 0
    optimizer: torch.optim.SGD = field(init=False)
    views: ViewSampler = field(init=False)

    def __post_init__(self) -> None:
        layout = torch.channels_last
        self.detector.to(self.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.detector, self.plan.weight_decay),
            lr=self.plan.lr,
            momentum=self.plan.momentum,
        )
        self.views = ViewSampler(self.data.samples, self.plan, self.seed)
        self._watch = FiniteWatch(self.device)
        self._stream = chance.library_seed(self.seed, 1, Slot.DETECTION_DRAW)

    def state(self) -> dict[str, Any]:
        """Everything needed to resume. Raises NonFiniteLoss if the weights are not finite."""
        self.check()
        check_weights(self.detector, self.step)
        model, optimizer = self.detector.state_dict(), self.optimizer.state_dict()
        return {"detector": model, "optimizer": optimizer, "bad": dict(self.views.bad)}

    def load(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.views.bad.update(state["bad"])
        self.step = int(state["step"])

    def check(self) -> None:
        """Raises NonFiniteLoss, with a remedy, if a loss was not finite."""
        try:
            self._watch.check()
        except NonFiniteLoss as error:
            rate = self.plan.lr / 10
            raise NonFiniteLoss(f"{error}; try --set lr={rate:g}, or a longer warm-up") from None

    def steps(self) -> Iterator[dict[str, Tensor]]:
        """Train to the last step. After each step, yield its losses as scalars on the device."""
        todo = range(self.step, self.plan.steps)
        for views in ahead(self.views.step, todo, self.threads):
            self.detector.train()
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.rate(self.step)
            losses = self._losses(views, self._stream, self.step)
            total = torch.stack([*losses.values()]).sum()
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            self.optimizer.step()
            self.step += 1
            self._watch.note(self.step, total)
            yield {"loss": total.detach(), **{k: v.detach() for k, v in losses.items()}}

    def _losses(self, views: list[View], stream: int, step: int) -> dict[str, Tensor]:
        seed_libraries(stream, step)
        groups, targets = pairs(views, self.mean, self.std, self.device)
        with autocast(self.device, self.precision):
            return self.detector.losses(groups, targets)

    @contextmanager
    def precise(self, progress: Callable[[int, int], None]) -> Iterator[None]:
        """While entered, batch norms have the average statistics of `plan.precise_bn` batches.

        Like fvcore's update_bn_stats, the batches pass the whole detector in training mode.
        Afterwards the old statistics are restored, so a test does not change the training.
        """
        layers = [m for m in self.detector.modules() if isinstance(m, GroupedBatchNorm2d)]
        before = [{k: v.clone() for k, v in layer.named_buffers()} for layer in layers]
        momenta = [layer.momentum for layer in layers]
        try:
            if self.plan.precise_bn:
                self._average(layers, progress)
            yield
        finally:
            for layer, buffers, momentum in zip(layers, before, momenta, strict=True):
                layer.momentum = momentum
                for name, value in buffers.items():
                    layer.get_buffer(name).copy_(value)

    @torch.no_grad()
    def _average(
        self, layers: list[GroupedBatchNorm2d], progress: Callable[[int, int], None]
    ) -> None:
        for layer in layers:
            layer.momentum = None  # a plain average over batches
            layer.num_batches_tracked.zero_()
        stream = chance.library_seed(self.seed, 2, Slot.DETECTION_DRAW)
        sampler = ViewSampler(self.data.samples, self.plan, stream)
        count = self.plan.precise_bn
        self.detector.train()
        for number, views in enumerate(ahead(sampler.step, range(count), self.threads)):
            self._losses(views, stream, number)
            progress(number + 1, count)


def parameter_groups(detector: nn.Module, decay: float) -> list[dict[str, Any]]:
    """detectron2's rule: no weight decay on scales and shifts of batch norms, but on biases."""
    norms = {
        id(parameter)
        for module in detector.modules()
        if isinstance(module, GroupedBatchNorm2d)
        for parameter in module.parameters()
    }
    every = list(detector.parameters())
    return [
        {"params": [p for p in every if id(p) not in norms], "weight_decay": decay},
        {"params": [p for p in every if id(p) in norms], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Outcome:
    """The detections in the test images, in pixels of the files from 0, and unreadable images."""

    detections: list[list[Detection]]  # by class; `image` is the sample's number
    bad: dict[int, str]

    def truths(self, data: BoxDataset) -> list[list[Truth]]:
        """The true boxes of all readable images, by class; for VOC in its pixels from 1."""
        shift = 1.0 if data.style == "voc" else 0.0
        truths: list[list[Truth]] = [[] for _ in data.classes]
        for number, sample in enumerate(data.samples):
            if number in self.bad:
                continue
            for box, label, difficult in zip(
                sample.boxes.tolist(), sample.labels, sample.difficult, strict=True
            ):
                left, top, right, bottom = box
                corners = (left + shift, top + shift, right, bottom)
                truths[label].append(Truth(number, corners, bool(difficult)))
        return truths

    def scores(self, data: BoxDataset) -> dict[Metric, Precisions]:
        """The scores by metric, the main one first: COCO's for its json, otherwise both of VOC."""
        truths = self.truths(data)
        if data.style == "coco":
            return {"coco": precisions(self.detections, truths, data.classes, "coco")}
        found = [[as_written(one) for one in some] for some in self.detections]
        return {
            "voc07": precisions(found, truths, data.classes, "voc07"),
            "area": precisions(found, truths, data.classes, "area"),
        }


def detect_in(trainer: Trainer, data: BoxDataset, progress: Callable[[int, int], None]) -> Outcome:
    """Detect objects in each test image, one image at a time, at the size of the test."""
    plan, detector = trainer.plan, trainer.detector.eval()
    found: list[list[Detection]] = [[] for _ in data.classes]
    bad: dict[int, str] = {}
    read = partial(_test_view, data, plan)
    for number, seen in enumerate(ahead(read, range(len(data.samples)), trainer.threads)):
        progress(number + 1, len(data.samples))
        if isinstance(seen, str):
            bad[number] = seen
            continue
        groups, _ = pairs([seen], trainer.mean, trainer.std, trainer.device)
        with torch.no_grad(), autocast(trainer.device, trainer.precision):
            result = detector.detect(groups[0])[0]
        for box, score, label in _in_the_file(result, seen):
            found[label].append(Detection(number, score, box))
    return Outcome(found, bad)


def _in_the_file(found: Detections, seen: View) -> Iterator[tuple[Box, float, int]]:
    """Detections in pixels of the file. Boxes that are empty there are left out."""
    (right, down), (height, width) = seen.scale, seen.size
    scale = torch.tensor([right, down, right, down], dtype=torch.float64)
    limits = torch.tensor([width, height, width, height], dtype=torch.float64)
    boxes = torch.minimum((found.boxes.cpu() / scale).clamp(min=0), limits)
    for (left, top, end, bottom), score, label in zip(
        boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True
    ):
        if end > left and bottom > top:
            yield (left, top, end, bottom), score, label


def _test_view(data: BoxDataset, plan: Plan, number: int) -> View | str:
    try:
        return view(data.samples[number], plan.test_side, plan.max_side, False)
    except BadImage as error:
        return str(error)
