"""Faster R-CNN with a ResNet of type C4: conv4 gives the map, conv5 and a batch norm are the head.

Faster R-CNN is arXiv 1506.01497. The extra batch norm, and fine-tuning of all layers with
synchronised batch norm, follow MoCo v1 (arXiv 1911.05722, appendix).
"""

import copy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.ops import roi_align

from mocokit.detection.anchors import (
    Size,
    anchor_cells,
    anchors_of,
    coder,
    draw,
    match,
    propose,
    select,
)
from mocokit.detection.joint_norm import cut_resnet, joint, whole_norm
from mocokit.detection.protocol import Plan


class Images(NamedTuple):
    """Images of similar shape, padded to one shape: normalised pixels (n, 3, H, W), and sizes."""

    pixels: Tensor
    sizes: list[Size]


class Target(NamedTuple):
    """The true boxes (k, 4) and classes (k,) of an image."""

    boxes: Tensor
    classes: Tensor


class Detections(NamedTuple):
    """The detections of an image, highest score first: (k, 4), (k,), (k,)."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor


class Detector(nn.Module):
    """The network. Its body and its head are made of a copy of the backbone."""

    cells: Tensor

    def __init__(self, backbone: nn.Module, classes: int, plan: Plan) -> None:
        super().__init__()
        self.plan, self.classes = plan, classes
        self.body, last = cut_resnet(copy.deepcopy(backbone).requires_grad_(True))
        self.stride, channels, width = _shape(self.body, last)
        # Features of MoCo have other magnitudes than supervised ones, and the extra norm calibrates
        # them (MoCo v1, section 4.2).
        self.head = nn.Sequential(*last, whole_norm(width))
        anchors = anchor_cells(plan.anchor_sizes, plan.anchor_ratios)
        self.register_buffer("cells", anchors, persistent=False)
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_object = nn.Conv2d(channels, len(anchors), 1)
        self.rpn_change = nn.Conv2d(channels, 4 * len(anchors), 1)
        self.score, self.change = nn.Linear(width, classes + 1), nn.Linear(width, 4 * classes)
        for layer in (self.rpn_conv, self.rpn_object, self.rpn_change, self.score, self.change):
            nn.init.normal_(layer.weight, std=0.001 if layer is self.change else 0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.rpn_coder, self.head_coder = coder((1, 1, 1, 1)), coder((10, 10, 5, 5))
        self.rpn_matcher = Matcher(plan.rpn_high, plan.rpn_low, allow_low_quality_matches=True)
        self.head_matcher = Matcher(plan.roi_overlap, plan.roi_overlap)

    def losses(self, groups: list[Images], targets: list[list[Target]]) -> dict[str, Tensor]:
        """The four losses of a step over all groups, as float32 scalars; uses torch's generator."""
        maps = joint(self.body, [group.pixels for group in groups])
        images = sum(len(group.sizes) for group in groups)
        sums = {"rpn_object": torch.zeros((), device=self.cells.device)}
        sums["rpn_box"] = torch.zeros_like(sums["rpn_object"])
        pooled, labels, changes = [], [], []
        for group, group_maps, group_targets in zip(groups, maps, targets, strict=True):
            logits, deltas, anchors = self._rpn(group_maps)
            for at, target in enumerate(group_targets):
                object_loss, box_loss = self._rpn_losses(logits[at], deltas[at], anchors, target)
                sums["rpn_object"] = sums["rpn_object"] + object_loss
                sums["rpn_box"] = sums["rpn_box"] + box_loss
            with torch.no_grad():
                proposals = self._proposals(logits, deltas, anchors, group.sizes)
                drawn = [self._draw(*pair) for pair in zip(proposals, group_targets, strict=True)]
            pooled.append(self._pool(group_maps, [boxes for boxes, _, _ in drawn]))
            labels += [label for _, label, _ in drawn]
            changes += [change for _, _, change in drawn]
        # As in detectron2, the divisors are 256 anchors per image and, for boxes, all sampled
        # regions. Every object then has the same weight, however many an image has.
        counted = images * self.plan.rpn_batch
        scores, predicted = self._judge(torch.cat(pooled))
        label, change = torch.cat(labels), torch.cat(changes)
        objects = (label < self.classes).nonzero()[:, 0]
        of_class = predicted.view(len(label), self.classes, 4)[objects, label[objects]]
        return {
            "rpn_object": sums["rpn_object"] / counted,
            "rpn_box": sums["rpn_box"] / counted,
            "class": F.cross_entropy(scores, label),
            "box": F.l1_loss(of_class, change[objects], reduction="sum") / len(label),
        }

    @torch.no_grad()
    def detect(self, images: Images) -> list[Detections]:
        """The detections of each image, in pixels of the resized image."""
        maps = joint(self.body, [images.pixels])[0]
        proposals = self._proposals(*self._rpn(maps), images.sizes)
        scores, changes = self._judge(self._pool(maps, proposals))
        found, start = [], 0
        for boxes, size in zip(proposals, images.sizes, strict=True):
            part = slice(start, start + len(boxes))
            start += len(boxes)
            moved = self.head_coder.decode_single(changes[part], boxes)
            moved = moved.view(len(boxes), self.classes, 4)
            sure = scores[part].softmax(1)[:, :-1]
            score, overlap, most = self.plan.score, self.plan.nms, self.plan.detections
            kept = select(moved, sure, size, score=score, overlap=overlap, most=most)
            found.append(Detections(*kept))
        return found

    def _rpn(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Objectness (n, anchors), changes (n, anchors, 4), anchors (anchors, 4); float32."""
        hidden = F.relu(self.rpn_conv(maps))
        logits = self.rpn_object(hidden).permute(0, 2, 3, 1).flatten(1)
        changes = self.rpn_change(hidden).permute(0, 2, 3, 1).reshape(*logits.shape, 4)
        anchors = anchors_of(self.cells, maps.shape[2], maps.shape[3], self.stride)
        return logits.float(), changes.float(), anchors

    def _rpn_losses(
        self, logits: Tensor, changes: Tensor, anchors: Tensor, target: Target
    ) -> tuple[Tensor, Tensor]:
        """The sums of both losses over the sampled anchors of an image."""
        with torch.no_grad():
            which, label = match(self.rpn_matcher, target.boxes, anchors)
            objects, background = draw(label, self.plan.rpn_batch, self.plan.rpn_positive)
            drawn = torch.cat([objects, background])
            wanted = self.rpn_coder.encode_single(target.boxes[which[objects]], anchors[objects])
            truth = label[drawn].float()
        object_loss = F.binary_cross_entropy_with_logits(logits[drawn], truth, reduction="sum")
        return object_loss, F.l1_loss(changes[objects], wanted, reduction="sum")

    def _proposals(
        self, logits: Tensor, changes: Tensor, anchors: Tensor, sizes: list[Size]
    ) -> list[Tensor]:
        plan, training = self.plan, self.training
        before = plan.pre_nms_train if training else plan.pre_nms_test
        after = plan.post_nms_train if training else plan.post_nms_test
        limit = partial(propose, before=before, after=after, overlap=plan.rpn_nms)
        return [
            limit(self.rpn_coder.decode_single(change, anchors), logit, size)
            for logit, change, size in zip(logits, changes, sizes, strict=True)
        ]

    def _draw(self, proposals: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """(boxes, classes, target changes) of the sampled proposals of an image.

        The true boxes are added to the proposals. The last class is background.
        """
        # With true boxes among the proposals, the head has objects to learn from the first step.
        boxes = torch.cat([proposals, target.boxes])
        which, label = match(self.head_matcher, target.boxes, boxes)
        drawn = torch.cat(draw(label, self.plan.roi_batch, self.plan.roi_positive))
        classes = target.classes[which[drawn]].where(label[drawn] == 1, self.classes)
        wanted = self.head_coder.encode_single(target.boxes[which[drawn]], boxes[drawn])
        return boxes[drawn], classes, wanted

    def _pool(self, maps: Tensor, boxes: list[Tensor]) -> Tensor:
        # As in detectron2, aligned=True corrects the half-pixel shift of the original RoIAlign.
        pooled: Tensor = roi_align(maps, boxes, self.plan.pooled, 1 / self.stride, 0, aligned=True)
        return pooled

    def _judge(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores (n, classes + 1) and changes (n, 4 x classes) of regions, as float32."""
        features = self.head(pooled.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return self.score(features).float(), self.change(features).float()


@torch.no_grad()
def _shape(body: nn.Module, last: nn.Module) -> tuple[int, int, int]:
    """(stride, channels, channels of the last stage), measured on one small image."""
    parameter = next(body.parameters())
    training = body.training
    maps = body.eval()(parameter.new_zeros(1, 3, 64, 64))
    width = last.eval()(maps).shape[1]
    body.train(training)
    last.train(training)
    return 64 // maps.shape[2], maps.shape[1], width
