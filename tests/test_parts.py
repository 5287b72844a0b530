"""The queue against a list, the follower against its formula, pieces against the whole."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from mocokit.methods.parts import Queue, follow, gather, rank_and_world, sum_of_pieces


@given(st.integers(1, 20), st.lists(st.integers(0, 50), max_size=8))
def test_queue_is_first_in_first_out(size, counts):
    torch.manual_seed(0)
    queue = Queue(size, 3)
    model = [row.clone() for row in queue.rows]
    pointer, number = 0, 0
    for count in counts:
        keys = torch.arange(number, number + count).float()[:, None].expand(-1, 3)
        number += count
        queue.enqueue(keys)
        for key in keys:
            model[pointer] = key
            pointer = (pointer + 1) % size
        assert int(queue.pointer) == pointer
        torch.testing.assert_close(queue.rows, torch.stack(model), atol=0, rtol=0)
    assert int(queue.filled) == min(number, size)


def test_queue_starts_with_unit_rows_and_is_saved():
    queue = Queue(10, 4)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(10))
    queue.enqueue(torch.ones(3, 4))
    other = Queue(10, 4)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows, queue.rows) and int(other.pointer) == 3


@pytest.mark.parametrize("momentum", [0, 0.5, 0.9, 0.99, 0.999, 1])
def test_follow_is_the_formula_on_parameters_only(momentum):
    torch.manual_seed(0)
    key, query = nn.BatchNorm1d(4).double(), nn.BatchNorm1d(4).double()
    with torch.no_grad():
        for p in (*key.parameters(), *query.parameters()):
            p.normal_()
    query.running_mean.fill_(7.0)
    before = [p.clone() for p in key.parameters()]
    follow(key.requires_grad_(False), query, momentum)
    for p, q, old in zip(key.parameters(), query.parameters(), before, strict=True):
        torch.testing.assert_close(p, momentum * old + (1 - momentum) * q, atol=1e-15, rtol=0)
    assert float(key.running_mean.sum()) == 0


def test_follow_halves_in_69_steps_at_099():
    key, query = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(key.weight)
    nn.init.zeros_(query.weight)
    for _ in range(69):
        follow(key.requires_grad_(False), query, 0.99)
    assert float(key.weight) == pytest.approx(0.5, abs=0.002)


def test_alone_there_is_nothing_to_gather():
    rows = torch.randn(3, 2)
    assert rank_and_world() == (0, 1) and gather(rows, [3]) is rows


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_pieces_give_the_gradients_of_the_sum(scale):
    torch.manual_seed(0)
    net, inputs = nn.Linear(3, 2).double(), torch.randn(10, 3, dtype=torch.float64)

    def loss_of(piece):
        return net(inputs[piece]).square().sum()

    (scale * loss_of(slice(0, 10))).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    total = sum_of_pieces(loss_of, [slice(0, 4), slice(4, 5), slice(5, 10)], net.parameters())
    torch.testing.assert_close(total, loss_of(slice(0, 10)))
    (scale * total).backward()
    for p, q in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, q, atol=1e-10, rtol=1e-12)


def test_pieces_are_differentiated_outside_autocast():
    """As a loop would: the gradient of a float32 product is not cast down to bfloat16."""
    torch.manual_seed(0)
    weight, inputs = nn.Parameter(torch.randn(30, 20)), torch.randn(10, 30)

    def loss_of(piece):
        with torch.autocast("cpu", enabled=False):
            return (inputs[piece] @ weight).square().sum()

    (expected,) = torch.autograd.grad(loss_of(slice(0, 10)), [weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = sum_of_pieces(loss_of, [slice(0, 4), slice(4, 10)], [weight])
    total.backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-4)


def test_pieces_leave_unused_parameters_without_gradient():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    x = torch.arange(4.0)
    pieces = [slice(0, 2), slice(2, 4)]
    sum_of_pieces(lambda s: (used * x[s]).sum(), pieces, [used, unused]).backward()
    torch.testing.assert_close(used.grad, torch.tensor([2.0, 4.0]))
    assert unused.grad is None
