"""The weighted k-nearest-neighbour vote of InstDisc (arXiv 1805.01978, section 3.4)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**26  # similarities held at once: 256 MiB in float32
FACTORS = 2**26  # numbers of the bank on the device at once: 256 MiB in float32
_STEEP = 1 / 700  # below this temperature exp(cosine / temperature) leaves the doubles


class Neighbours(NamedTuple):
    """The nearest rows of a bank, the nearest first; of equals the one with the lower number."""

    cosine: Tensor  # (N, k), -inf where the bank has no other row
    # Hides tuple.index, which nobody needs here.
    index: Tensor  # type: ignore[assignment]  # (N, k)


def nearest(
    bank: Tensor,
    queries: Tensor,
    k: int,
    own: Tensor | None = None,
    device: torch.device | None = None,
) -> Neighbours:
    """The k nearest rows of bank (M, D) to each query (N, D) by cosine; all rows where M < k.

    `own` (N,) is each query's own row in the bank, which is left out (-1: none). The bank goes to
    the device block by block, so neither it nor the similarities need fit into its memory.
    """
    device = device or queries.device
    k = min(k, len(bank))
    cosine = torch.full((len(queries), k), -torch.inf, device=device)
    index = torch.zeros((len(queries), k), dtype=torch.long, device=device)
    block = max(1, FACTORS // max(bank.shape[1], 1))
    rows = max(1, min(FACTORS // max(bank.shape[1], 1), CHUNK // max(min(block, len(bank)), 1)))
    for first in range(0, len(bank), block):
        # Numbers of neighbours rise from block to block, so a stable sort keeps equals in order.
        part = F.normalize(bank[first : first + block].to(device).float(), dim=1)
        for at in range(0, len(queries), rows):
            here = slice(at, at + rows)
            similar = F.normalize(queries[here].to(device).float(), dim=1) @ part.T  # (n, m)
            if own is not None:
                _leave_out(similar, own[here].to(device) - first)
            found, number = _highest(similar, min(k, len(part)))
            found = torch.cat([cosine[here], found], 1)
            number = torch.cat([index[here], number + first], 1)
            found, order = found.sort(dim=1, descending=True, stable=True)
            cosine[here], index[here] = found[:, :k], number.gather(1, order)[:, :k]
    return Neighbours(cosine, index)


def _leave_out(similar: Tensor, own: Tensor) -> None:
    """In place; own (n,) may lie outside of this block."""
    inside = torch.nonzero((own >= 0) & (own < similar.shape[1])).flatten()
    similar[inside, own[inside]] = -torch.inf


def _highest(similar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row with their columns, rising; of equals the first columns.

    topk chooses freely among equals, which matters where they straddle the k-th place.
    """
    found, column = similar.topk(min(k + 1, similar.shape[1]), dim=1)
    if k < similar.shape[1]:
        tied = torch.nonzero(found[:, k - 1] == found[:, k]).flatten()
        found, column = found[:, :k].clone(), column[:, :k].clone()
        if len(tied):
            row, last = similar[tied], found[tied, k - 1 :]
            above, equal = row > last, row == last
            spare = k - above.sum(1, keepdim=True)
            chosen = above | (equal & (equal.cumsum(1) <= spare))
            column[tied] = chosen.nonzero()[:, 1].view(len(tied), k)
            found[tied] = row.gather(1, column[tied])
    column, order = column.sort(dim=1)
    return found.gather(1, order), column


def vote(
    neighbours: Neighbours, labels: Tensor, k: int, temperature: float, classes: int
) -> Tensor:
    """Scores (N, classes), doubles on the host: k neighbours vote with exp(cosine / temperature).

    Labels (M,) are the bank's. At temperatures near zero, where the exponential overflows, a
    query's scores share a factor, which changes no order.
    """
    cosine = neighbours.cosine[:, :k].cpu().double()
    label = labels.cpu().long()[neighbours.index[:, :k].cpu()]
    if temperature < _STEEP and cosine.shape[1]:
        cosine = cosine - cosine[:, :1].clamp_min(-1)
    weight = (cosine / temperature).exp()
    scores = torch.zeros(len(cosine), classes, dtype=torch.double)
    return scores.scatter_add_(1, label, weight)


def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int
) -> Tensor:
    """Each query's score for each class, (N, classes): its k nearest vote with exp(cosine / t).

    bank (M, D) with labels (M,) in [0, classes), queries (N, D), neither needs to be normalised. Of
    a bank of fewer than k, all vote.
    """
    return vote(nearest(bank, queries, k), labels, k, temperature, classes)


def knn_grid(
    neighbours: Neighbours,
    labels: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    classes: int,
) -> Iterator[tuple[int, float, Tensor]]:
    """(k, temperature, predictions (N,)) of every pair, from one search of the largest k.

    Of classes with equal scores the lowest is predicted.
    """
    rows = max(1, CHUNK // max(classes, max(ks)))
    parts = range(0, len(neighbours.cosine), rows)
    for k in ks:
        for temperature in temperatures:
            predicted = [
                vote(
                    Neighbours(*(t[at : at + rows] for t in neighbours)),
                    labels,
                    k,
                    temperature,
                    classes,
                ).argmax(1)
                for at in parts
            ]
            yield k, temperature, torch.cat(predicted)


def knn_grid_of(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    classes: int,
    own: Tensor | None = None,
    device: torch.device | None = None,
) -> list[tuple[int, float, Tensor]]:
    """`nearest` and `knn_grid` for some queries after others, so that a large k fits into memory.

    Each pass goes over the whole bank, so there are as few as CHUNK neighbours allow.
    """
    rows = max(1, CHUNK // max(ks))
    found: list[list[tuple[int, float, Tensor]]] = []
    for first in range(0, max(len(queries), 1), rows):
        here = slice(first, first + rows)
        mine = None if own is None else own[here]
        close = nearest(bank, queries[here], max(ks), mine, device)
        found.append(list(knn_grid(close, labels, ks, temperatures, classes)))
    return [
        (k, temperature, torch.cat([predicted for _, _, predicted in column]))
        for column in zip(*found, strict=True)
        for k, temperature, _ in column[:1]
    ]


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
    grid = knn_grid(nearest(bank, queries, k), labels, [k], [temperature], classes)
    _, _, predicted = next(grid)
    return float((predicted == query_labels.cpu()).float().mean())
