"""The weighted k-nearest-neighbour vote of InstDisc (arXiv 1805.01978, section 3.4)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from mocokit.engine.stop import raise_if_interrupted
from mocokit.protocols.defaults import NEIGHBOURS

CHUNK = 2**26  # similarities in memory at once: 256 MiB in float32
FACTORS = 2**26  # numbers of the bank on the device at once: 256 MiB in float32
_STEEP = 1 / 700  # below this temperature, exp(cosine / temperature) overflows a double


class Neighbours(NamedTuple):
    """The nearest rows of a bank, nearest first. Of equally near rows, the lower comes first."""

    cosine: Tensor  # (N, k), -inf if the bank has no other row
    # This hides tuple.index, which is not used.
    index: Tensor  # type: ignore[assignment]  # (N, k)


def nearest(
    bank: Tensor,
    queries: Tensor,
    k: int,
    own_rows: Tensor | None = None,
    device: torch.device | None = None,
) -> Neighbours:
    """The k nearest rows of bank (M, D) to each query (N, D) by cosine; all rows if M < k.

    `own_rows` (N,) gives the row of each query in the bank, which is left out; -1 means none. The
    bank is copied to the device in blocks, so neither it nor the similarities must fit there.
    """
    device = device or queries.device
    k = min(k, len(bank))
    cosine = torch.full((len(queries), k), -torch.inf, device=device)
    index = torch.zeros((len(queries), k), dtype=torch.long, device=device)
    block = max(1, FACTORS // max(bank.shape[1], 1))
    rows = max(1, min(FACTORS // max(bank.shape[1], 1), CHUNK // max(min(block, len(bank)), 1)))
    for first in range(0, len(bank), block):
        # Row numbers grow from block to block, so a stable sort keeps equal rows in order.
        part = F.normalize(bank[first : first + block].to(device).float(), dim=1)
        for at in range(0, len(queries), rows):
            here = slice(at, at + rows)
            similar = F.normalize(queries[here].to(device).float(), dim=1) @ part.T  # (n, m)
            if own_rows is not None:
                _leave_out(similar, own_rows[here].to(device) - first)
            found, number = _highest(similar, min(k, len(part)))
            found = torch.cat([cosine[here], found], 1)
            number = torch.cat([index[here], number + first], 1)
            found, order = found.sort(dim=1, descending=True, stable=True)
            cosine[here], index[here] = found[:, :k], number.gather(1, order)[:, :k]
    return Neighbours(cosine, index)


def _leave_out(similar: Tensor, columns: Tensor) -> None:
    """Set one column of each row to -inf, in place. Columns (n,) outside the block are skipped."""
    inside = torch.nonzero((columns >= 0) & (columns < similar.shape[1])).flatten()
    similar[inside, columns[inside]] = -torch.inf


def _highest(similar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest values of each row, in ascending order of columns; of equals, the first.

    topk chooses any of equal values, which matters if some of them would come after the k-th place.
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

    Labels (M,) are those of the bank. Near temperature zero the exponential would overflow. There,
    all scores of a query are divided by one factor, which does not change their order.
    """
    cosine = neighbours.cosine[:, :k].cpu().double()
    label = labels.cpu().long()[neighbours.index[:, :k].cpu()]
    if temperature < _STEEP and cosine.shape[1]:
        cosine = cosine - cosine[:, :1].clamp_min(-1)
    weight = (cosine / temperature).exp()
    scores = torch.zeros(len(cosine), classes, dtype=torch.double)
    return scores.scatter_add_(1, label, weight)


def suited(labels: ArrayLike, left_out: int = 0) -> tuple[int, str]:
    """How many neighbours vote where nobody states it, and that in words for a protocol.

    Of a bank with labels (M,): half of what a class has, by the median class, at most NEIGHBOURS.
    With more, other classes outvote the right one (docs/log.md: of 30 images a class, 15 score
    three to five points more than 200). `left_out` counts a query's own row.
    """
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    images = int(np.median(counts)) - left_out if len(counts) else 0
    if images // 2 >= NEIGHBOURS:
        return NEIGHBOURS, str(NEIGHBOURS)
    if images < 2:
        return 1, "1 (most classes have one image in the bank)"
    k = images // 2
    return k, f"{k} (half of a class's {images} images in the bank)"


def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int
) -> Tensor:
    """Scores (N, classes): the k nearest rows of the bank vote with exp(cosine / temperature).

    The bank (M, D) has labels (M,) in [0, classes). Neither it nor the queries (N, D) need to be
    normalised. If the bank has fewer than k rows, all of them vote.
    """
    return vote(nearest(bank, queries, k), labels, k, temperature, classes)


def knn_grid(
    neighbours: Neighbours,
    labels: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    classes: int,
) -> Iterator[tuple[int, float, Tensor]]:
    """(k, temperature, predictions (N,)) for every pair, from one search with the largest k.

    If several classes have the same score, the lowest is predicted.
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
    own_rows: Tensor | None = None,
    device: torch.device | None = None,
) -> list[tuple[int, float, Tensor]]:
    """`nearest` and `knn_grid` for a part of the queries at a time, so that a large k fits.

    Each part searches the whole bank, so parts are as large as CHUNK neighbours allow.
    """
    rows = max(1, CHUNK // max(ks))
    found: list[list[tuple[int, float, Tensor]]] = []
    for first in range(0, max(len(queries), 1), rows):
        raise_if_interrupted()
        here = slice(first, first + rows)
        here_rows = None if own_rows is None else own_rows[here]
        close = nearest(bank, queries[here], max(ks), here_rows, device)
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
    """The share of queries whose class of highest score is correct."""
    classes = int(torch.cat([labels, query_labels]).max()) + 1
    grid = knn_grid(nearest(bank, queries, k), labels, [k], [temperature], classes)
    _, _, predicted = next(grid)
    return float((predicted == query_labels.cpu()).float().mean())
