"""Gradients averaged over processes during the backward pass.

DDP is not used, because a run resumed under it would differ from an uninterrupted one. DDP lays its
buckets out anew after the first step of a process, and the position of a number in a bucket decides
the order in which a ring of three or more processes adds it up. Here the layout follows from the
parameters alone.

Processes share gradients, not weights. Once two copies differ, nothing makes them equal again.
Processes therefore compare their copies of weights, key encoder, queue and bank to the bit.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocokit.errors import MocokitError

BUCKET = 25 * 2**20  # bytes per all-reduce
CHUNK = 2**22  # numbers hashed at a time
# Each process has those of its own groups until they are read, so they are not compared.
LOCAL_STATISTICS = ("running_mean", "running_var")


class GradientAverage:
    """Replaces gradients by their mean over all processes. They are ready after `finish`.

    Gradients are sent in buckets, in a fixed order. A bucket is sent once it and all buckets before
    it are complete. The last parameters are in the first bucket, because backward
    computes their gradients first.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        self._begin()
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        size = BUCKET
        for parameter in reversed([*parameters]):
            if size + parameter.nbytes > BUCKET:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.nbytes
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                hook = partial(self._on_gradient, number)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._begin()

    def _begin(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, dist.Work | None]] = []

    def _on_gradient(self, number: int, parameter: Tensor) -> None:
        self._missing[number] -= 1
        # In order, even if a later bucket is complete: all processes must send the same one next.
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        gradients = _gradients(self._buckets[len(self._sent)])
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]) / dist.get_world_size()
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Wait for the means; called after backward, by all processes."""
        while len(self._sent) < len(self._buckets):  # a parameter had no gradient here
            self._send()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            if work is not None:
                work.wait()
            gradients = _gradients(bucket)
            _unpack(flat, gradients)
        self._begin()


def _gradients(bucket: Sequence[nn.Parameter]) -> list[Tensor]:
    for parameter in bucket:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in bucket if parameter.grad is not None]


@torch.no_grad()
def average_statistics(module: nn.Module, share: float) -> None:
    """Make running batch-norm statistics the mean over all groups of the world.

    `share` is this process's part of the batch. It is called after every step, not only before a
    save: the clock decides on saves, and would then change the numbers.
    """
    names = ("running_mean", "running_var")
    tensors = [t for name, t in module.named_buffers() if name.endswith(names)]
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) * share
    dist.all_reduce(flat)
    _unpack(flat, tensors)


def _unpack(flat: Tensor, tensors: list[Tensor]) -> None:
    """Copy consecutive parts of `flat` into the tensors."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit hash () of a tensor, on its device. Every bit and its position count.

    It is a sum of products modulo 2**64, so the order in which a device adds does not matter.
    """
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    words = flat.view(torch.int32) if len(flat) % 4 == 0 else flat
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].long()
        places = torch.arange(start, start + len(part), device=tensor.device)
        # Each position has a pseudorandom weight. Odd weights make any single change count.
        for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):
            places = (places + 1) * factor
            places = places ^ (places >> 29)
        total += (part * (2 * places + 1)).sum()
    return total


def compare_replicas(module: nn.Module, step: int) -> None:
    """Raise MocokitError, on all processes, if the state of one differs from the first one's."""
    tensors = {k: v for k, v in module.state_dict().items() if not k.endswith(LOCAL_STATISTICS)}
    local = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    others = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(others, local)
    first, *rest = torch.stack(others).tolist()
    for rank, other in enumerate(rest, start=1):
        differ = [name for name, a, b in zip(tensors, first, other, strict=True) if a != b]
        if differ:
            raise MocokitError(
                f"after step {step} {differ[0]} of process {rank} differs from that of process 0 "
                f"({len(differ)} of {len(tensors)} tensors differ); different versions of torch or "
                "a broken GPU can be the cause; resume from a checkpoint before that step"
            )
