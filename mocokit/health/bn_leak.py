"""Do batch statistics give the answer away? Measured directly.

A query and its key that were normalised with the same companions can find each other by them (MoCo
v1, section 3.3). So the same images are contrasted twice, with the groups as they are trained, and
with the keys in other groups: what an honest network knows does not depend on its companions.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocokit.methods.method import Method, Step
from mocokit.nets.batchnorm import one_statistics_update

TOP1 = "contrast_top1"

Coming = tuple[Any, Tensor, Step]  # views, numbers of the images, the step


@torch.no_grad()
def contrast_by_grouping(
    method: Method, steps: Iterable[Coming], precision: Callable[[], AbstractContextManager[object]]
) -> dict[str, Any]:
    """Contrast accuracy over some steps as trained, and with keys in other groups.

    Of a method with KeyGroups. Without a metric `contrast_top1` there is nothing to compare.

    Nothing of the method changes, running statistics included. With several processes all of them
    call it, with their own shares.
    """
    trained, regrouped, images = [], [], 0
    for views, index, step in steps:
        with one_statistics_update(method, 0), precision():
            images += step.images
            here = len(index)
            metrics = method(views, index, step).metrics
            if TOP1 not in metrics:
                return {"leak_unchecked": f"the method records no {TOP1}"}
            trained.append(metrics[TOP1].float() * here)
            with method.regrouped():
                other = replace(step, number=step.number + 2**40)  # a step no run reaches
                regrouped.append(method(views, index, other).metrics[TOP1].float() * here)
    values = torch.stack([torch.stack(trained).sum(), torch.stack(regrouped).sum()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    as_trained, otherwise = (values / images).tolist()
    return {
        "contrast_trained": as_trained,
        "contrast_regrouped": otherwise,
        "contrasted_images": float(images),
    }
