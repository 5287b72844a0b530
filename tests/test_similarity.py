"""Streamed log-sum-exps against plain ones, values and gradients; who is nobody's own negative."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

from mocokit.methods.similarity import Negatives, _similarity

TEMPERATURES = (0.07, 0.5)


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(
        dtype
    )


def compared(query, rows, own, owners, chunk):
    """Log-sum-exps, hardest, count, and the gradients of a weighted sum."""
    query, rows = query.clone().requires_grad_(), rows.clone().requires_grad_()
    result = Negatives(rows, owners, chunk).compare(query, TEMPERATURES, own)
    weight = torch.arange(1, len(query) + 1, dtype=query.dtype)
    sum((weight * (n + 1) * s).sum() for n, s in enumerate(result.log_sums)).backward()
    return (*result.log_sums, result.hardest, result.number, query.grad, rows.grad)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 99))
def test_streamed_equals_plain(n, k, chunk, named, seed):
    query, rows = unit(n, 5, seed=seed), unit(k, 5, seed=seed + 1)
    own = torch.arange(n) % k if named else None
    owners = torch.arange(k) if named else None
    plain = compared(query, rows, own, owners, None)
    streamed = compared(query, rows, own, owners, chunk)
    for a, b in zip(plain, streamed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_streamed_equals_plain_in_float32_over_a_large_queue():
    query, rows = unit(16, 32, dtype=torch.float32), unit(20_000, 32, seed=1, dtype=torch.float32)
    plain = compared(query, rows, None, None, None)
    streamed = compared(query, rows, None, None, 1024)
    for a, b in zip(plain, streamed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradcheck_of_the_streamed_sums():
    query, rows = unit(3, 4).requires_grad_(), unit(7, 4, seed=1).requires_grad_()
    own, owners = torch.tensor([0, 5, 6]), torch.arange(7)

    def sums(query, rows):
        return Negatives(rows, owners, 3).compare(query, (0.3, 0.9), own).log_sums

    assert torch.autograd.gradcheck(sums, (query, rows))


def test_no_matrix_of_all_similarities_is_kept_or_made():
    n, k, chunk = 8, 4096, 256
    query = unit(n, 16).requires_grad_()
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    rows = unit(k, 16, seed=1)
    with Watch():
        Negatives(rows, chunk=chunk).compare(query, [0.2]).log_sums[0].sum().backward()
    assert max(largest) < n * k  # the whole matrix never exists
    largest.clear()
    with Watch():
        Negatives(rows).compare(query, [0.2]).log_sums[0].sum().backward()
    assert max(largest) >= n * k  # the watch sees it where it does


def test_own_rows_are_left_out_and_counted():
    query, rows = unit(2, 4), unit(5, 4, seed=1)
    own, owners = torch.tensor([7, 3]), torch.tensor([7, 3, 7, 1, 2])
    result = Negatives(rows, owners).compare(query, [1.0], own)
    for i, allowed in enumerate(([1, 3, 4], [0, 2, 3, 4])):
        cosines = [float(query[i] @ rows[j]) for j in allowed]
        assert float(result.log_sums[0][i]) == pytest.approx(
            math.log(sum(math.exp(c) for c in cosines))
        )
        assert float(result.hardest[i]) == pytest.approx(max(cosines))
        assert float(result.number[i]) == len(allowed)


def test_names_on_one_side_alone_are_refused():
    with pytest.raises(ValueError, match="must both name"):
        Negatives(unit(3, 4)).compare(unit(2, 4), [1.0], torch.arange(2))


def test_similarities_are_cosines():
    torch.testing.assert_close(
        _similarity(unit(2, 4), unit(3, 4, seed=1), None, None), unit(2, 4) @ unit(3, 4, seed=1).T
    )
