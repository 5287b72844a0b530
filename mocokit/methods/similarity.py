"""How queries compare with their negatives: all that a contrastive loss needs to know of them.

Each loss sees its negatives through log-sum-exps of similarities alone, so one piece of code
serves all of them, and holds either all similarities at once (fast) or a chunk at a time (small).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Compared(NamedTuple):
    """What is known of the negatives of n queries."""

    log_sums: tuple[Tensor, ...]  # (n,) each: log of the sum of exp(similarity / temperature)
    hardest: Tensor  # (n,) the highest similarity to a negative, without gradient
    number: Tensor  # (n,) how many negatives a query has


class Negatives(NamedTuple):
    """Unit vectors (K, C) to tell queries from.

    `row_images` (K,) numbers the image of each row: rows of a query's own image are not among its
    negatives. `chunk` rows are compared at a time, None compares all at once.
    """

    rows: Tensor
    row_images: Tensor | None = None
    chunk: int | None = None

    def compare(
        self, query: Tensor, temperatures: Sequence[float], query_images: Tensor | None = None
    ) -> Compared:
        """query (n, C), unit vectors; query_images (n,) the numbers of their images.

        In the queries' precision, outside autocast.
        """
        if (query_images is None) != (self.row_images is None):
            raise ValueError("queries and negatives must both name their images, or neither")
        with torch.autocast(query.device.type, enabled=False):
            if self.chunk is None:
                similarity = _similarity(query, self.rows, query_images, self.row_images)  # (n, K)
                log_sums = tuple((similarity / t).logsumexp(1) for t in temperatures)
                hardest = similarity.detach().amax(1)
            else:
                *sums, hardest = _Streamed.apply(
                    query, self.rows, query_images, self.row_images, tuple(temperatures), self.chunk
                )
                log_sums = tuple(sums)
        return Compared(log_sums, hardest, self._count(query, query_images))

    def _count(self, query: Tensor, query_images: Tensor | None) -> Tensor:
        size = query.new_full((len(query),), len(self.rows))
        if query_images is None or self.row_images is None:
            return size
        # By sorting, because comparing all with all would hold n x K.
        row_images = self.row_images.sort().values
        excluded = torch.searchsorted(row_images, query_images, right=True) - torch.searchsorted(
            row_images, query_images
        )
        return size - excluded


def _similarity(
    query: Tensor, rows: Tensor, query_images: Tensor | None, row_images: Tensor | None
) -> Tensor:
    """Cosines (n, K); minus infinity where a row is of the query's own image."""
    similarity = query @ rows.T
    if query_images is None or row_images is None:
        return similarity
    return similarity.masked_fill(query_images[:, None] == row_images[None], -torch.inf)


class _Streamed(torch.autograd.Function):
    """Log-sum-exps over negatives of which n x chunk similarities exist at a time.

    Backward computes the similarities again: exp(s / t - log sum) is their share in the sum.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, query, rows, query_images, row_images, temperatures, chunk
    ):
        log_sums = [query.new_full((len(query),), -torch.inf) for _ in temperatures]
        hardest = query.new_full((len(query),), -torch.inf)
        for part in _parts(len(rows), chunk):
            similarity = _similarity(
                query, rows[part], query_images, _cut(row_images, part)
            )  # (n, chunk)
            hardest = torch.maximum(hardest, similarity.amax(1))
            for number, t in enumerate(temperatures):
                more = (similarity / t).logsumexp(1)
                log_sums[number] = torch.logaddexp(log_sums[number], more)
        ctx.save_for_backward(query, rows, query_images, row_images, *log_sums)
        ctx.temperatures, ctx.chunk = temperatures, chunk
        ctx.mark_non_differentiable(hardest)
        return *log_sums, hardest

    @staticmethod
    def backward(ctx: Any, *gradients):  # type: ignore[no-untyped-def]
        query, rows, query_images, row_images, *log_sums = ctx.saved_tensors
        of_query = torch.zeros_like(query)
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        for part in _parts(len(rows), ctx.chunk):
            similarity = _similarity(query, rows[part], query_images, _cut(row_images, part))
            weight = torch.zeros_like(similarity)
            for t, log_sum, gradient in zip(ctx.temperatures, log_sums, gradients, strict=False):
                # Of a query without a negative all shares are 0, not exp(inf - inf).
                share = (similarity / t - log_sum[:, None].nan_to_num(neginf=0.0)).exp_()
                weight += share * (gradient / t)[:, None]
            of_query += weight @ rows[part]
            if of_rows is not None:
                of_rows[part] = weight.T @ query
        return of_query, of_rows, None, None, None, None


def _parts(size: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, size, chunk))


def _cut(row_images: Tensor | None, part: slice) -> Tensor | None:
    return None if row_images is None else row_images[part]
