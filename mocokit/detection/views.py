"""Images for the detector: resized by Pillow, mirrored, and in pairs of similar shape."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mocokit import chance
from mocokit.chance import Slot
from mocokit.data.decode import BadImage, decode
from mocokit.detection.c4 import Images, Target
from mocokit.detection.dataset import Sample
from mocokit.detection.protocol import Plan
from mocokit.errors import UserError

T = TypeVar("T")
PAIR = 2  # images padded to one size: each of the authors' 8 GPUs had 2 of 16
_TRIES = 100  # images tried in place of one that cannot be used


class View(NamedTuple):
    """A resized image (H, W, 3), with boxes in pixels of the resized image."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scale: tuple[float, float]  # width and height divided by those in the file
    size: tuple[int, int]  # height and width in the file


def resized(height: int, width: int, side: int, cap: int) -> tuple[int, int]:
    """Height and width after resizing. The shorter is `side`, unless the longer exceeds `cap`.

    >>> resized(375, 500, 800, 1333)
    (800, 1067)
    """
    scale = side / min(height, width)
    if max(height, width) * scale > cap:
        scale = cap / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def view(sample: Sample, side: int, cap: int, flip: bool) -> View:
    """The view of an image. Raises BadImage."""
    pixels = decode(sample.path, None, sample.top)
    height, width = pixels.shape[:2]
    tall, wide = resized(height, width, side, cap)
    # As in detectron2, Pillow resizes: it antialiases, and torchvision's detectors do not.
    small = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BILINEAR)
    if flip:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = wide / width, tall / height
    boxes = sample.boxes * np.array([*scale, *scale])
    if flip:
        boxes[:, [0, 2]] = wide - boxes[:, [2, 0]]
    boxes = boxes.clip(0, [wide, tall, wide, tall])
    return View(np.array(small), boxes.astype(np.float32), sample.labels, scale, (height, width))


class ViewSampler:
    """The views of any training step, as a function of the seed."""

    def __init__(self, samples: Sequence[Sample], plan: Plan, seed: int) -> None:
        self.samples, self.plan, self.seed = samples, plan, seed
        self._order_seed = chance.library_seed(seed, 0, Slot.DETECTION_ORDER)
        self.bad: dict[str, str] = {}

    def step(self, step: int) -> list[View]:
        """The views of a step, wide ones first. A step may span the end of an epoch."""
        images, count = len(self.samples), self.plan.batch_size
        places = np.arange(step * count, (step + 1) * count)
        views = []
        for epoch in np.unique(places // images).tolist():
            here = places[places // images == epoch] % images
            order = chance.Order(self._order_seed, epoch, images)
            views += [self._view(int(number), epoch) for number in order[here]]
        return sorted(views, key=lambda one: one.pixels.shape[0] > one.pixels.shape[1])

    def _view(self, number: int, epoch: int) -> View:
        plan, images = self.plan, len(self.samples)
        for place in range(number, number + min(_TRIES, images)):
            at = place % images
            drawn = chance.uniform(
                self.seed, epoch, number, 0, [Slot.DETECTION_SIDE, Slot.DETECTION_FLIP]
            )
            side = plan.sides[int(drawn[0] * len(plan.sides))]
            try:
                seen = view(self.samples[at], side, plan.max_side, bool(drawn[1] < plan.flip))
            except BadImage as error:
                self.bad[self.samples[at].name] = str(error)
                continue
            solid = (seen.boxes[:, 2:] - seen.boxes[:, :2] > 1e-5).all(1)
            if solid.any():
                return seen._replace(boxes=seen.boxes[solid], labels=seen.labels[solid])
        first = next((f"{name} ({reason})" for name, reason in self.bad.items()), "none")
        raise UserError(
            f"{min(_TRIES, images)} images in a row cannot be used; the first unreadable one: "
            f"{first}"
        )


def pairs(
    views: Sequence[View], mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[list[Images], list[list[Target]]]:
    """The views on the device in pairs: normalised, then padded with zeros."""
    groups, targets = [], []
    shift, scale = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
    for start in range(0, len(views), PAIR):
        some = views[start : start + PAIR]
        sizes = [(one.pixels.shape[0], one.pixels.shape[1]) for one in some]
        tall, wide = max(h for h, _ in sizes), max(w for _, w in sizes)
        pixels = torch.zeros(len(some), 3, tall, wide, device=device)
        for place, one, (height, width) in zip(pixels, some, sizes, strict=True):
            levels = _to(torch.from_numpy(one.pixels), device).permute(2, 0, 1)
            place[:, :height, :width] = (levels / 255 - shift) / scale
        groups.append(Images(pixels.contiguous(memory_format=torch.channels_last), sizes))
        arrays = [[torch.from_numpy(array) for array in (one.boxes, one.labels)] for one in some]
        targets.append([Target(_to(box, device), _to(label, device)) for box, label in arrays])
    return groups, targets


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def ahead(make: Callable[[int], T], numbers: range, threads: int) -> Iterator[T]:
    """make(n) for each number, in order. Threads make some ahead; decoding releases the GIL."""
    pool = ThreadPoolExecutor(max_workers=max(1, threads))
    waiting: list[Future[T]] = []
    try:
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(cancel_futures=True)
