"""The weighted k-nearest-neighbour vote of InstDisc (arXiv 1805.01978, section 3.4)."""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**26  # similarities held at once: 256 MiB in float32


def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int
) -> Tensor:
    """Each query's score for each class, (N, classes): its k nearest vote with exp(cosine / t).

    bank (M, D) with labels (M,) in [0, classes), queries (N, D), neither needs to be normalised. Of
    a bank of fewer than k, all vote.
    """
    labels = labels.cpu().long()
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    scores = []
    for chunk in torch.split(queries, max(1, CHUNK // max(len(bank), 1))):
        cosine, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # (n, k)
        weight = (cosine.cpu().double() / temperature).exp()
        votes = torch.zeros(len(chunk), classes, dtype=torch.double)
        scores.append(votes.scatter_add_(1, labels[nearest.cpu()], weight))
    return torch.cat(scores)


def knn_accuracy(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    temperature: float,
) -> float:
    """Share of queries whose highest-scoring class is right."""
    classes = int(torch.cat([labels, query_labels]).max()) + 1
    scores = knn_scores(bank, labels, queries, k, temperature, classes)
    return float((scores.argmax(1) == query_labels.cpu()).float().mean())
