"""The queue against a list, the follower against its formula, pieces against the whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F

from mocokit.methods.parts import Bank, Queue, follow
from mocokit.methods.processes import gather, gather_with_gradient, rank_and_world
from mocokit.run.recording import _filled
from mocokit.transfer import to_device


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
    assert gather_with_gradient(rows, [3]) is rows


def test_bank_starts_uniform_with_rows_of_length_about_1():
    torch.manual_seed(0)
    rows = Bank(2000, 128).rows
    assert float(rows.abs().max()) <= (128 / 3) ** -0.5
    assert float(rows.norm(dim=1).mean()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_bank_blends_and_normalises(momentum):
    torch.manual_seed(0)
    bank = Bank(6, 4).double()
    before, index = bank.rows.clone(), torch.tensor([4, 0, 4])
    vectors = F.normalize(torch.randn(3, 4).double(), dim=1)
    bank.blend(index, vectors, momentum)
    for row, vector in ((4, vectors[0]), (0, vectors[1])):  # of a double the first counts
        mixed = momentum * before[row] + (1 - momentum) * vector
        torch.testing.assert_close(bank.rows[row], mixed / mixed.norm())
    for row in (1, 2, 3, 5):
        assert torch.equal(bank.rows[row], before[row])
    assert int(bank.seen) == 3 and "rows" in bank.state_dict()


def test_numbers_on_their_way_to_a_device_are_a_copy():
    """Also of arrays that cannot be written, such as a file mapped into memory."""
    numbers = np.arange(4)
    fixed = numbers[:]
    fixed.flags.writeable = False
    sent = [to_device(one, torch.device("cpu")) for one in (numbers, fixed)]
    numbers += 1
    assert all(tensor.tolist() == [0, 1, 2, 3] for tensor in sent)
    assert to_device(fixed, torch.device("cpu"), torch.float32).dtype == torch.float32


def test_the_emptiest_queue_says_how_full_they_are():
    queues = {"a": Queue(8, 3), "b": Queue(4, 3)}
    for queue, count in zip(queues.values(), (6, 1), strict=True):
        queue.enqueue(torch.zeros(count, 3))
    assert _filled(SimpleNamespace(queues=queues)) == {"queue_filled": 0.25}
    assert _filled(SimpleNamespace(queues={})) == {}
