"""Features of a set of images, computed with frozen weights."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit.data.batch import Batch
from mocokit.data.loader import read_batches
from mocokit.data.source import Source
from mocokit.engine.stop import raise_if_interrupted
from mocokit.views.params import ViewSpec, draw_table, scoring_bound
from mocokit.views.views import evaluation_views, make_views

BATCH = 256
CROP_AREA = (0.08, 1.0)  # area of a probe's random crops, as in torchvision's RandomResizedCrop


def evaluation_batches(
    source: Source,
    indices: NDArray[np.int64],
    spec: ViewSpec,
    device: torch.device,
    workers: int = 0,
    crops: int | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """The images with these numbers, in batches, with their evaluation views (n, 3, S, S).

    Images that cannot be read are left out. If `crops` is given, it is the seed of random crops,
    which replace the evaluation views.
    """
    random = probe_spec(spec)
    bound = scoring_bound(spec if crops is None else random)
    for batch in read_batches(source, indices, BATCH, bound, workers):
        raise_if_interrupted()
        if len(batch.index):
            sizes = batch.heights, batch.widths
            if crops is None:
                yield batch, evaluation_views(spec, batch.pixels, *sizes, device)
            else:
                table = draw_table(random, crops, 0, batch.index, 0, *sizes)
                yield batch, make_views(random, table, batch.pixels, *sizes, device)


def probe_spec(spec: ViewSpec) -> ViewSpec:
    """The training views of a probe, as in the authors' main_lincls.py: random crops and flips.

    Size and normalisation are those of the network.
    """
    return dataclasses.replace(
        spec,
        order=("crop", "flip"),
        crop_area=CROP_AREA,
        crop_ratio=(3 / 4, 4 / 3),
        flip_probability=0.5,
    )


def compute_features(
    network: Callable[[Tensor], tuple[Tensor, ...]],
    batches: Iterator[tuple[Batch, Tensor]],
) -> tuple[NDArray[np.int64], tuple[Tensor, ...]]:
    """The numbers of the images (N,), and a float32 table (N, D) for each output of the network.

    Both are empty if no image could be read.
    """
    numbers: list[NDArray[np.int64]] = []
    parts: list[tuple[Tensor, ...]] = []
    for batch, views in batches:
        numbers.append(batch.index)
        parts.append(tuple(output.float() for output in network(views)))
    if not numbers:
        return np.empty(0, np.int64), ()
    return np.concatenate(numbers), tuple(torch.cat(column) for column in zip(*parts, strict=True))
