"""Parts that methods share: the queue, the memory bank, the slow follower."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Queue(nn.Module):
    """The latest keys, first in, first out: `rows` (K, C), unit vectors, kept in checkpoints.

    Starts with random unit vectors (MoCo v1, the authors' code); `filled` counts real keys so far.
    `keys_per_image` join in each step.
    """

    rows: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, keys_per_image: int = 1) -> None:
        super().__init__()
        self.keys_per_image = keys_per_image
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys (N, C) in the place of the oldest rows, in order, wrapping at the end.

        Of more keys than rows the last stay, as if they had come one by one.
        """
        size, count = len(self.rows), len(keys)
        kept = keys[-size:]
        start = self.pointer + (count - len(kept))
        places = (start + torch.arange(len(kept), device=self.rows.device)) % size
        self.rows.index_copy_(0, places, kept.to(self.rows.dtype))
        self.pointer.add_(count).remainder_(size)
        self.filled.add_(count).clamp_(max=size)


class Bank(nn.Module):
    """One vector for each image of the data: `rows` (N, C), kept in checkpoints.

    Starts uniform in +-1/sqrt(C/3), of length about 1 (InstDisc's code); `seen` counts the vectors
    blended in so far.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim / 3)
        self.register_buffer("rows", torch.empty(images, dim).uniform_(-bound, bound))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def blend(self, index: Tensor, vectors: Tensor, momentum: float) -> None:
        """Move the rows of images (n,) towards vectors (n, C): m old + (1 - m) new, normalised.

        InstDisc (arXiv 1805.01978, section 3.2). An image that comes twice, as a substitute may,
        takes the first.
        """
        rows = F.normalize(self.rows[index].lerp(vectors.to(self.rows.dtype), 1 - momentum), dim=1)
        # Equal numbers then write equal rows, in whatever order a device writes them.
        first = (index[:, None] == index[None]).to(torch.uint8).argmax(1)
        self.rows.index_copy_(0, index, rows[first])
        self.seen.add_(len(index))


@torch.no_grad()
def follow(key_module: nn.Module, module: nn.Module, momentum: float) -> None:
    """Move the key module's parameters towards the module's: k <- m k + (1 - m) q.

    Parameters only: the key encoder's batch-norm buffers move by its own forward. MoCo v1, eq. 2.
    """
    keys: list[Tensor] = [*key_module.parameters()]
    queries: list[Tensor] = [*module.parameters()]
    torch._foreach_mul_(keys, momentum)
    torch._foreach_add_(keys, queries, alpha=1.0 - momentum)
