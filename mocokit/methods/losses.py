"""The contrastive losses, in float32 outside autocast."""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrast_logits(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Similarity of each query (N, C) to its key (N, C), then to the negatives (K, C): (N, 1+K)."""
    with torch.autocast(query.device.type, enabled=False):
        positive = (query * key).sum(1, keepdim=True)  # (N, 1)
        return torch.cat([positive, query @ negatives.T], 1) / temperature  # (N, 1+K)


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE: cross-entropy of telling each query's key from the negatives, mean over queries.

    query (N, C), key (N, C), negatives (K, C), all unit vectors. MoCo v1 (arXiv 1911.05722), eq. 1.
    """
    logits = contrast_logits(query, key, negatives, temperature)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent: each of 2N views against its partner and the 2(N-1) others, mean over views.

    a (N, C), b (N, C), unit vectors of the two views. SimCLR (arXiv 2002.05709), eq. 1.
    """
    with torch.autocast(a.device.type, enabled=False):
        views = torch.cat([a, b])  # (2N, C)
        logits = views @ views.T / temperature  # (2N, 2N)
        logits = logits.masked_fill(
            torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf
        )
        partner = torch.arange(len(views), device=views.device).roll(len(a))
        return F.cross_entropy(logits, partner)
