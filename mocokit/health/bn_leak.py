"""Do batch statistics give the answer away? Measured directly.

A query and its key that were normalised with the same companions can find each other by them (MoCo
v1, section 3.3). So the same images are contrasted twice, with the groups as they are trained, and
with the keys in other groups: what an honest network knows does not depend on its companions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocokit.methods.method import Draw, Method
from mocokit.methods.processes import rank_and_world
from mocokit.nets.batchnorm import one_statistics_update

Step = tuple[Any, Tensor, Draw]  # views, numbers of the images, chance


def has_groups(method: Method) -> bool:
    """Whether keys are cut into groups that could be drawn anew.

    Where one batch norm spans the whole batch and all negatives come from it, none is given away.
    """
    grouped = hasattr(method, "shuffle") and hasattr(method, "count_groups")
    if not getattr(method, "whole", False):
        return grouped
    # A process's share then need not be whole groups, and its layers wait for the others.
    return grouped and hasattr(method, "queue") and rank_and_world()[1] == 1


@torch.no_grad()
def contrast_by_grouping(
    method: Method, steps: Iterable[Step], precision: Callable[[], AbstractContextManager[object]]
) -> dict[str, float]:
    """Contrast accuracy over some steps as trained, and with keys in other groups.

    Nothing of the method changes, running statistics included. With several processes all of them
    call it, with their own shares.
    """
    trained, regrouped, images = [], [], 0
    for views, index, draw in steps:
        with one_statistics_update(method, 0), precision():
            images += draw.images
            here = len(index)
            top1 = method(views, index, draw).metrics["contrast_top1"].float()
            trained.append(top1 * here)
            with _other_groups(method):
                other = Draw(draw.seed, draw.step + 2**40, draw.images)  # a step no run reaches
                top1 = method(views, index, other).metrics["contrast_top1"].float()
                regrouped.append(top1 * here)
    values = torch.stack([torch.stack(trained).sum(), torch.stack(regrouped).sum()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    as_trained, otherwise = (values / images).tolist()
    return {
        "contrast_trained": as_trained,
        "contrast_regrouped": otherwise,
        "contrasted_images": float(images),
    }


@contextmanager
def _other_groups(method: Any) -> Iterator[None]:
    """Keys shuffled over at least two groups."""
    shuffle, count, whole = method.shuffle, method.count_groups, getattr(method, "whole", None)
    method.shuffle = True
    method.count_groups = lambda images: max(2, count(images))
    if whole is not None:
        method.whole = False
    try:
        yield
    finally:
        method.shuffle, method.count_groups = shuffle, count
        if whole is not None:
            method.whole = whole
