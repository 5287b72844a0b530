"""Batch norm over groups of images, so that one device computes what several would.

Momentum contrast leaks through batch statistics: a query and its key normalised together can find
each other by them. The authors hide this by shuffling keys over GPUs of 32 images each (MoCo v1,
section 3.3). Here the groups are explicit, so one process with 8 groups and 8 processes with one
group are the same computation.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def group_sizes(images: int, groups: int) -> list[int]:
    """Cut a batch into consecutive groups that differ by at most one image, the larger ones first.

    >>> group_sizes(100, 3)
    [34, 33, 33]
    """
    size, larger = divmod(images, groups)
    return [size + (number < larger) for number in range(groups)]


def share_of_groups(groups: int, rank: int, world: int) -> slice:
    """The groups that one of several processes holds: whole, consecutive, as even as can be."""
    sizes = group_sizes(groups, world)
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


class _GroupedBatchNorm(nn.Module):
    """What both dimensions share: grouped statistics in training, ordinary batch norm in eval.

    Parameters and buffers have torch's names, so state dicts are interchangeable.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        group_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.group_size, self.eps, self.momentum = (
            channels,
            group_size,
            eps,
            momentum,
        )
        # Of the next batches: how many, or their sizes; None follows from group_size.
        self.groups: int | tuple[int, ...] | None = None
        self.whole = False  # one batch over all processes, instead of groups
        # Without scale and shift as the last layer of MoCo v3's and BYOL's heads is.
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C) or (N, C, H, W) -> the same, normalised; any memory format is kept."""
        if not self.training:
            return F.batch_norm(
                inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        groups = self.groups or max(1, round(len(inputs) / self.group_size))
        sizes = group_sizes(len(inputs), groups) if isinstance(groups, int) else [*groups]
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # a plain average over batches, as torch's batch norm does
            momentum = 1.0 / float(self.num_batches_tracked)
        if self.whole and dist.is_initialized() and dist.get_world_size() > 1:
            return self._synchronised(inputs, momentum)
        if len(sizes) > 1 and _at_once(inputs, sizes):
            return self._all_groups_at_once(inputs, len(sizes), momentum)
        # Each group moves its own copy of the running statistics; their mean is kept.
        means = self.running_mean.repeat(len(sizes), 1)
        variances = self.running_var.repeat(len(sizes), 1)
        outputs = [
            F.batch_norm(part, mean, var, self.weight, self.bias, True, momentum, self.eps)
            for part, mean, var in zip(torch.split(inputs, sizes), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return outputs[0] if len(sizes) == 1 else torch.cat(outputs)

    def _all_groups_at_once(self, inputs: Tensor, groups: int, momentum: float) -> Tensor:
        """The same for equal groups, in a number of operations that does not grow with them."""
        outputs: Tensor
        weight = self.running_mean.new_ones(()) if self.weight is None else self.weight
        bias = self.running_mean.new_zeros(()) if self.bias is None else self.bias
        outputs, mean, var = _EqualGroups.apply(inputs, weight, bias, groups, self.eps)
        count = inputs.numel() // inputs.shape[1] // groups
        with torch.no_grad():
            unbiased = var.mean(0) * (count / (count - 1))
            # lerp is linear: the mean over groups of moved statistics is one move to the mean.
            self.running_mean.lerp_(mean.mean(0).to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return outputs

    def _synchronised(self, inputs: Tensor, momentum: float) -> Tensor:
        """Batch norm whose statistics are those of all processes' inputs together.

        torch's own SyncBatchNorm does not run on a CPU, where two processes are tested against one.
        """
        values = inputs.float() if inputs.dtype in (torch.bfloat16, torch.float16) else inputs
        others = [dim for dim in range(inputs.ndim) if dim != 1]
        shape = (1, -1, *(1 for _ in others[1:]))
        size = values.new_tensor(float(inputs.numel() // inputs.shape[1]))
        sums = _SumOverProcesses.apply(torch.cat([values.sum(others), size[None]]))
        mean = sums[:-1] / sums[-1]
        centred = values - mean.view(shape)
        var = _SumOverProcesses.apply(centred.square().sum(others)) / sums[-1]
        with torch.no_grad():
            unbiased = var * sums[-1] / (sums[-1] - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = self.weight * scale
        outputs: Tensor = centred * scale.view(shape)
        if self.bias is not None:
            outputs = outputs + self.bias.view(shape)
        return outputs.to(inputs.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, group_size={self.group_size}"


def _at_once(inputs: Tensor, sizes: list[int]) -> bool:
    """Whether groups are normalised together: on a GPU, where each group's launches cost most.

    On a CPU the loop over groups is faster: each group stays near the cache.
    """
    values = inputs.numel() // inputs.shape[1] // len(sizes)
    return inputs.is_cuda and len(set(sizes)) == 1 and values > 1


class _EqualGroups(torch.autograd.Function):
    """Batch norm of equal groups: outputs, and mean and biased variance (groups, C) of each.

    Only the inputs are kept for backward, in their own precision, as torch's batch norm does.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = _by_group(_as_float(inputs), groups)
        others = _all_but_group_and_channel(values)
        var, mean = torch.var_mean(values, others, correction=0, keepdim=True)
        inverse = (var + eps).rsqrt()
        scale = inverse * _per_channel(weight, values)
        # Not returned as a view of the groups: the activation that follows works in place.
        outputs = torch.empty_like(inputs)
        result = torch.addcmul(_per_channel(bias, values) - mean * scale, values, scale)
        _by_group(outputs, groups).copy_(result)
        ctx.save_for_backward(inputs, weight, mean, inverse)
        mean, var = mean.reshape(groups, -1), var.reshape(groups, -1)
        ctx.mark_non_differentiable(mean, var)
        return outputs, mean, var

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *of_statistics: Any) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, inverse = ctx.saved_tensors
        groups = len(mean)
        values = _by_group(_as_float(inputs), groups)
        others = _all_but_group_and_channel(values)
        gradients = _by_group(_as_float(gradient), groups)
        normal = (values - mean) * inverse
        total = gradients.sum(others, keepdim=True)
        along = (gradients * normal).sum(others, keepdim=True)
        count = inputs.numel() // inputs.shape[1] // groups
        scale = inverse * _per_channel(weight, values)
        of_inputs = scale * (gradients - (total + normal * along) / count)
        of_weight, of_bias = (
            (along.sum(0).flatten(), total.sum(0).flatten()) if weight.ndim else (None, None)
        )
        return of_inputs.to(inputs.dtype).flatten(0, 1), of_weight, of_bias, None, None


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """(N, C, ...) -> (groups, N / groups, C, ...), a view."""
    return tensor.view(groups, -1, *tensor.shape[1:])


def _all_but_group_and_channel(values: Tensor) -> list[int]:
    return [dim for dim in range(values.ndim) if dim not in (0, 2)]


def _per_channel(numbers: Tensor, values: Tensor) -> Tensor:
    """(C,), or a scalar for all, -> broadcastable with values (G, n, C, ...)."""
    if numbers.ndim == 0:
        return numbers
    return numbers.view(-1, *(1 for _ in values.shape[3:]))


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GroupedBatchNorm2d(_GroupedBatchNorm):
    """Batch norm over groups of `group_size` images, or over `groups` groups where that is set.

    A batch of N images makes max(1, round(N / group_size)) consecutive groups that differ by at
    most one image. Running statistics are the mean over the groups.
    """


class GroupedBatchNormAct2d(_GroupedBatchNorm):
    """The same followed by an activation, in place of timm's BatchNormAct2d."""

    def __init__(
        self,
        channels: int,
        group_size: int,
        eps: float,
        momentum: float | None,
        drop: nn.Module,
        act: nn.Module,
        affine: bool = True,
    ) -> None:
        super().__init__(channels, group_size, eps, momentum, affine)
        self.drop, self.act = drop, act

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.act(self.drop(super().forward(inputs)))
        return outputs


def use_groups(module: nn.Module, group_size: int) -> nn.Module:
    """Replace every batch norm below `module` by a grouped one that holds the same tensors."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _grouped(child, group_size))
        else:
            use_groups(child, group_size)
    return module


def _grouped(norm: _BatchNorm, group_size: int) -> _GroupedBatchNorm:
    if not norm.track_running_stats:
        raise ValueError("a batch norm without running statistics cannot be grouped")
    new: _GroupedBatchNorm
    if hasattr(norm, "act"):  # timm's BatchNormAct2d
        new = GroupedBatchNormAct2d(
            norm.num_features,
            group_size,
            norm.eps,
            norm.momentum,
            cast(nn.Module, norm.drop),
            cast(nn.Module, norm.act),
            norm.affine,
        )
    else:
        new = GroupedBatchNorm2d(
            norm.num_features, group_size, norm.eps, norm.momentum, norm.affine
        )
    new.load_state_dict(norm.state_dict())
    return new.train(norm.training)


def use_whole(module: nn.Module) -> None:
    """Let every batch norm below `module` take its statistics over the whole batch at once.

    Over all processes: SimCLR's global batch norm (arXiv 2002.05709, section 2.2).
    """
    for layer in _layers(module):
        layer.whole, layer.group_size = True, sys.maxsize


def set_groups(module: nn.Module, groups: int | tuple[int, ...] | None) -> None:
    """Say into how many groups the next batches are to be cut, or of which sizes.

    None follows from group_size.
    """
    for layer in _layers(module):
        layer.groups = groups


@contextmanager
def local_statistics(module: nn.Module) -> Iterator[None]:
    """Let one process run forwards by itself: its statistics wait for no other's."""
    layers = [layer for layer in _layers(module) if layer.whole]
    for layer in layers:
        layer.whole = False
    try:
        yield
    finally:
        for layer in layers:
            layer.whole = True


@contextmanager
def one_statistics_update(module: nn.Module, parts: int) -> Iterator["RunningStatistics"]:
    """Let forwards of several parts of one batch move the running statistics as one would."""
    statistics = RunningStatistics(module, parts)
    try:
        yield statistics
    except BaseException:
        statistics.undo()
        raise
    statistics.finish()


class RunningStatistics:
    """Collects what each part's forward would make of the running statistics, by its groups.

    A single part moves them itself; no part at all leaves them as they were.
    """

    def __init__(self, module: nn.Module, parts: int) -> None:
        layers = list(_layers(module)) if parts != 1 else []
        self._counts = [layer.num_batches_tracked for layer in layers]
        self._started = [count.clone() for count in self._counts]
        self._tensors = [t for layer in layers for t in (layer.running_mean, layer.running_var)]
        self._before = [t.clone() for t in self._tensors]
        self._sums = [torch.zeros_like(t) for t in self._tensors]
        self._groups = 0

    def part(self, groups: int) -> None:
        """Take in the part just forwarded, which held this many groups."""
        if self._tensors:
            torch._foreach_add_(self._sums, self._tensors, alpha=groups)
            torch._foreach_copy_(self._tensors, self._before)
            self._groups += groups

    def undo(self) -> None:
        """Leave the statistics as they were, where the parts were not all forwarded."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._before)
            torch._foreach_copy_(self._counts, self._started)

    def finish(self) -> None:
        """Move the statistics to the mean over all groups, once."""
        if not self._tensors:
            return
        if self._groups:
            torch._foreach_div_(self._sums, self._groups)
        torch._foreach_copy_(self._tensors, self._sums if self._groups else self._before)
        torch._foreach_copy_(self._counts, self._started)
        torch._foreach_add_(self._counts, 1 if self._groups else 0)


@torch.no_grad()
def calibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set running statistics to their average over these batches (N, 3, H, W), as in evaluation.

    Random weights can only be judged fairly once their statistics fit the data.
    """
    layers = list(_layers(module))
    momenta = [layer.momentum for layer in layers]
    was_training = module.training
    for layer in layers:
        layer.momentum = None
        layer.num_batches_tracked.zero_()
    try:
        module.train()
        for batch in batches:
            module(batch)
    finally:
        module.train(was_training)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _layers(module: nn.Module) -> Iterator[_GroupedBatchNorm]:
    return (layer for layer in module.modules() if isinstance(layer, _GroupedBatchNorm))
