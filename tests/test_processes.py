"""A gather with gradient between two real processes, against one process that holds all rows."""

import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from test_world import free_port
from torch.nn import functional as F

from mocokit.engine.average import compare_replicas, fingerprint
from mocokit.errors import MocokitError
from mocokit.methods.losses import InfoNCE, nt_xent
from mocokit.methods.processes import exchange, gather_with_gradient, sum_over_processes
from mocokit.methods.similarity import Negatives

COUNTS = [3, 2]
ORDERS = [[4, 0, 3, 1, 2], [0, 1, 2, 3, 4], [3, 4, 2, 1, 0], [2, 1, 0, 4, 3]]


def image_of(number):
    return torch.arange(12).reshape(3, 2, 2) + 100 * number


def projections():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, sum(COUNTS), 4, generator=generator, dtype=torch.float64)


def share_of_nt_xent(rank):
    """The gradient of a process's own rows by NT-Xent over the views of both processes."""
    start = sum(COUNTS[:rank])
    own = slice(start, start + COUNTS[rank])
    mine = projections()[:, own].clone().requires_grad_()
    a, b = F.normalize(mine, dim=2)
    rows = torch.cat([gather_with_gradient(view, COUNTS) for view in (a, b)])
    images = torch.arange(sum(COUNTS))
    negatives = Negatives(rows, images.repeat(2))
    queries, partners = torch.cat([a, b]), torch.cat([b, a])
    sums, _, number = negatives.compare(queries, [0.3], images[own].repeat(2))
    mean = InfoNCE(0.3)((queries * partners).sum(1), sums, number)
    (mean * len(queries) / (2 * sum(COUNTS))).backward()  # this process's part of the mean
    return mine.grad


def test_invariant_11_a_differentiable_gather_gives_the_gradient_of_one_process(tmp_path):
    import subprocess

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | address | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    together = torch.cat([torch.tensor(one["gradient"], dtype=torch.float64) for one in found], 1)
    whole = projections().requires_grad_()
    nt_xent(*F.normalize(whole, dim=2), 0.3).backward()
    torch.testing.assert_close(together, whole.grad, atol=1e-12, rtol=1e-12)
    for one in found:  # both processes name the one that differs, and in what
        assert (
            "after step 7 weight of process 1 differs from that of process 0 (1 of 2"
            in one["differ"]
        )
    assert [one["sum"] for one in found] == [3.0, 3.0]
    for number, order in enumerate(ORDERS):
        rows = [row for one in found for row in one["exchanged"][number]]
        assert rows == [[float(i), -float(i)] for i in order]
    images = [image for one in found for image in one["images"]]
    assert images == [image_of(i).tolist() for i in ORDERS[0]]


def test_alone_a_sum_is_itself():
    assert sum_over_processes(torch.tensor(2.0)) == pytest.approx(2.0)


@settings(max_examples=50)
@given(
    st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool])
)
def test_a_fingerprint_sees_a_bit_and_its_place(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 50, (), generator=generator))
    tensor = (torch.randn(size, generator=generator) > 0 if dtype == torch.bool
              else torch.randint(-9, 9, (size,), generator=generator).to(dtype))  # fmt: skip
    whole = int(fingerprint(tensor))
    assert int(fingerprint(tensor.clone())) == whole
    other = tensor.clone()
    words = other.view(torch.uint8)
    place = int(torch.randint(len(words), (), generator=generator))
    words[place] ^= 1
    assert int(fingerprint(other)) != whole
    turned = tensor.flip(0)
    assert torch.equal(turned, tensor) == (int(fingerprint(turned)) == whole)


def test_a_fingerprint_is_the_same_in_chunks(monkeypatch):
    tensor = torch.randn(1000)
    whole = int(fingerprint(tensor))
    monkeypatch.setattr("mocokit.engine.average.CHUNK", 7)
    assert int(fingerprint(tensor)) == whole


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    first = sum(COUNTS[:rank])
    numbers = torch.arange(first, first + COUNTS[rank]).float()
    rows = torch.stack([numbers, -numbers], 1)
    images = torch.stack([image_of(int(number)) for number in numbers])
    images = images.to(memory_format=torch.channels_last)
    layer = torch.nn.Linear(4, 3)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    compare_replicas(layer, 6)
    if rank == 1:
        layer.weight.data[2, 3] += 1e-6
    try:
        compare_replicas(layer, 7)
    except MocokitError as error:
        differ = str(error)
    answer = {
        "differ": differ,
        "images": exchange(images, np.array(ORDERS[0]), COUNTS).tolist(),
        "exchanged": [exchange(rows, np.array(order), COUNTS).tolist() for order in ORDERS],
        "gradient": share_of_nt_xent(rank).tolist(),
        "sum": float(sum_over_processes(torch.tensor(1.0 + rank))),
    }
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(answer, file)
    dist.destroy_process_group()
