"""Processes compare what each holds a copy of: weights, key encoder, queue or bank, to the bit.

Nothing brings copies together again once they differ: gradients are shared, weights are not.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocokit.errors import MocokitError

CHUNK = 2**22  # numbers hashed at a time
OWN = ("running_mean", "running_var")  # of each process's groups, until they are read


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit number () that follows from every bit of a tensor and its place, on its device.

    Sums of products modulo 2**64, so it does not depend on the order in which a device adds.
    """
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    words = flat.view(torch.int32) if len(flat) % 4 == 0 else flat
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].long()
        places = torch.arange(start, start + len(part), device=tensor.device)
        for factor in (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9):  # an odd weight that tells nothing
            places = (places + 1) * factor
            places = places ^ (places >> 29)
        total += (part * (2 * places + 1)).sum()
    return total


def compare_replicas(module: nn.Module, step: int) -> None:
    """Raise MocokitError, on all processes, where one holds another state than the first."""
    tensors = {k: v for k, v in module.state_dict().items() if not k.endswith(OWN)}
    own = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    first, *rest = torch.stack(others).tolist()
    for rank, other in enumerate(rest, start=1):
        differ = [name for name, a, b in zip(tensors, first, other, strict=True) if a != b]
        if differ:
            raise MocokitError(
                f"after step {step} process {rank} holds another {differ[0]} than process 0 "
                f"({len(differ)} of {len(tensors)} tensors differ); unequal versions of torch or a "
                "broken GPU can be the cause; go on from a checkpoint before that step"
            )
