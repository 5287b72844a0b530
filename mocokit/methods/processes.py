"""What crosses processes: rows gathered with and without gradient."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mocokit.transfer import to_device


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) on its own."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.no_grad()
def gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes in their order, without gradient; process r holds counts[r].

    (counts[rank], ...) -> (sum(counts), ...).
    """
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def exchange(rows: Tensor, order: NDArray[np.int64], counts: Sequence[int]) -> Tensor:
    """This process's rows after all processes' rows are put in a common order, without gradient.

    Process r holds counts[r] consecutive rows of the whole, before and after; position i of the
    whole is to hold row order[i]. Each row goes once, to the process that wants it: a gather would
    bring every row to every process.
    """
    rank = dist.get_rank()
    bounds = np.cumsum([0, *counts])
    holder = np.searchsorted(bounds, order, side="right") - 1  # of the row wanted at a position
    wanted = [slice(bounds[r], bounds[r + 1]) for r in range(len(counts))]
    mine = holder[wanted[rank]]
    leaving = [order[want][holder[want] == rank] - bounds[rank] for want in wanted]
    # What is sent is memory, so it must lie as what is received does: images may be channels-last.
    sent = rows[to_device(np.concatenate(leaving), rows.device)].contiguous()
    received = rows.new_empty((counts[rank], *rows.shape[1:]))
    arriving = np.bincount(mine, minlength=len(counts)).tolist()
    dist.all_to_all_single(received, sent, arriving, [len(part) for part in leaving])
    # They arrive by the process they come from, each process's in the order of their positions.
    places = np.argsort(np.argsort(mine, kind="stable"), kind="stable")
    return received[to_device(places, rows.device)]


def gather_with_gradient(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """As `gather`; the gradient of a row is the sum of what all processes make of it.

    With each process's loss being its share of the whole, that is the gradient of the whole: the
    sum that a loss over other processes' rows lacks when it is gathered without.
    """
    if len(counts) == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, counts)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts):  # type: ignore[no-untyped-def]
        start = sum(counts[: dist.get_rank()])
        ctx.own = slice(start, start + len(rows))
        return gather(rows, counts)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.own], None


@torch.no_grad()
def sum_over_processes(number: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient."""
    if rank_and_world()[1] == 1:
        return number
    total = number.clone()
    dist.all_reduce(total)
    return total
