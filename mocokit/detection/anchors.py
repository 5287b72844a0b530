"""Boxes in a two-stage detector: anchors, matching, sampling, proposals, detections.

Boxes are (left, top, right, bottom) in pixels of the resized image. Pixels are counted from 0, and
the right and lower ends are outside the box. Numbers and order of operations are detectron2's. The
parts of torchvision that differ are not used (see docs/design.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms

Size = tuple[int, int]  # height, width


def anchor_cells(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(sizes x ratios, 4): unrounded boxes around 0 of area size^2, height / width = ratio."""
    sides = torch.tensor(
        [[size / ratio**0.5, size * ratio**0.5] for size in sizes for ratio in ratios]
    )
    return torch.cat([-sides / 2, sides / 2], 1)


def anchors_of(cells: Tensor, height: int, width: int, stride: int) -> Tensor:
    """(height x width x cells, 4): the cells around the first pixel of each position of a map."""
    down = torch.arange(height, device=cells.device, dtype=cells.dtype) * stride
    right = torch.arange(width, device=cells.device, dtype=cells.dtype) * stride
    tops, lefts = torch.meshgrid(down, right, indexing="ij")
    shifts = torch.stack([lefts, tops, lefts, tops], 2)
    return (shifts[:, :, None] + cells).reshape(-1, 4)


def match(matcher: Matcher, truth: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(number of the matched true box, label) for each box: 1 object, 0 background, -1 neither."""
    matched = matcher(box_iou(truth, boxes))
    label = (matched >= 0).long()
    label[matched == Matcher.BETWEEN_THRESHOLDS] = -1
    return matched.clamp(min=0), label


def draw(label: Tensor, count: int, positive: float) -> tuple[Tensor, Tensor]:
    """Random indices of (objects, background) to train on, drawn by torch's generator.

    There are at most `count` in total, and at most the share `positive` of them are objects.
    """
    objects, background = (label == 1).nonzero()[:, 0], (label == 0).nonzero()[:, 0]
    object_count = min(len(objects), int(count * positive))
    background_count = min(len(background), count - object_count)
    first = torch.randperm(len(objects), device=label.device)[:object_count]
    second = torch.randperm(len(background), device=label.device)[:background_count]
    return objects[first], background[second]


@torch.no_grad()
def propose(
    boxes: Tensor, logits: Tensor, size: Size, *, before: int, after: int, overlap: float
) -> Tensor:
    """The proposals of an image, highest score first: best scores, clipped, not empty, NMS."""
    scores, order = logits.topk(min(before, len(logits)))
    boxes = boxes[order]
    finite = boxes.isfinite().all(1) & scores.isfinite()
    boxes = clip_boxes_to_image(boxes, size)
    keep = finite & (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, scores = boxes[keep], scores[keep]
    return boxes[nms(boxes, scores, overlap)[:after]]


@torch.no_grad()
def select(
    boxes: Tensor, probabilities: Tensor, size: Size, *, score: float, overlap: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes, scores, classes) detected in an image, highest score first.

    They are chosen from boxes (n, classes, 4) by probabilities (n, classes), without background.
    """
    finite = boxes.isfinite().all(2).all(1) & probabilities.isfinite().all(1)
    boxes, probabilities = clip_boxes_to_image(boxes[finite], size), probabilities[finite]
    chosen = probabilities > score
    classes = chosen.nonzero()[:, 1]
    found, scores = boxes[chosen], probabilities[chosen]
    keep = batched_nms(found, scores, classes, overlap)[:most]
    return found[keep], scores[keep], classes[keep]


def coder(weights: tuple[float, float, float, float]) -> BoxCoder:
    """Encodes boxes as changes of other boxes, in detectron2's parametrisation."""
    return BoxCoder(weights)
