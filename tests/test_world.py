"""One process with G groups and G processes with one group each are the same computation."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mocokit
from mocokit import build
from mocokit.engine import checkpoint
from mocokit.methods.memorybank import MemoryBank
from mocokit.methods.moco import MoCo
from mocokit.methods.simclr import SimCLR

SETTINGS = {
    "engine.threads": 1,
    "engine.precision": "float32",
    "engine.compare_steps": 5,
    "train.epochs": 4,
    "train.batch_size": 32,
    "optim.name": "sgd",
    "optim.lr": 0.05,
    "method.group_size": 8,
    "log.every_steps": 1,
    "data.labels": "none",  # no scores: their views are float32
}
ENDTOEND = {"method.name": "simclr", "method.queue_size": None, "method.symmetric": True}
WHOLE = {"method.batch_norm": "whole", "optim.name": "lars", "optim.lr": 0.3}
PLUS = {"net.head": "mlp_bn", "net.predictor": True, "method.symmetric": True} | {
    "method.batch_norm": "whole", "method.momentum_schedule": "cosine", "method.enqueue": "one"
}  # fmt: skip
V1 = {"net.head": "linear", "method.temperature": 0.07, "method.momentum": 0.99}
EIGHT_GROUPS = {"train.batch_size": 64, "train.epochs": 10}
PARTIAL = {"data.last": "keep", "train.batch_size": 24, "train.epochs": 3}  # 6 of 24, 1 of 16
BANK = {"method.name": "memorybank", "method.queue_size": None, "method.temperature": 0.5}


def pretrain_in_double(data, out, settings, patch=setattr):
    """A run in float64, where a difference of a bit does not grow to the fourth digit in 20 steps.

    Leaves each process's memory, its queue or bank or else its weights, beside its folder.
    """
    assert mocokit.pretrain
    loop = sys.modules["mocokit.pretrain"]  # the module; the package's name is the function
    build_parts, views = build.build_parts, loop.make_batch_views

    def in_double(*arguments):
        parts = build_parts(*arguments)
        parts.method.double()
        return parts

    def recording(update):
        def record(self, keep, step, progress):
            update(self, keep, step, progress)
            memory = {k: v for k, v in self.state_dict().items() if "rows" in k or "weight" in k}
            torch.save(memory, f"{out}.memory{os.environ.get('RANK', '0')}")

        return record

    patch(build, "build_parts", in_double)
    patch(loop, "make_batch_views", lambda *rest: tuple(v.double() for v in views(*rest)))
    for method in (MoCo, SimCLR, MemoryBank):
        patch(method, "update", recording(method.update))
    mocokit.pretrain("demo", data, out, settings=settings)
    threads = [(path / "comm").read_text() for path in Path("/proc/self/task").glob("*")]
    # One that frees a tensor while the interpreter ends aborts the process.
    assert not [name for name in threads if "gloo" in name], threads


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_world(world, data, out, settings):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(world):
        group = address | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, str(data), str(out), json.dumps(settings)]
        processes.append(
            subprocess.Popen(command, env=os.environ | group, stderr=subprocess.PIPE, text=True)
        )
    try:
        texts = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # where one failed, the others wait for it
    assert [process.returncode for process in processes] == [0] * world, "\n".join(texts)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"method.symmetric": True}),
        (3, {"train.micro_batch": 8, "method.loss": "dclw", "method.symmetric": True}),
        (3, ENDTOEND),
        (2, ENDTOEND | {"train.micro_batch": 8, "method.loss": "align_uniform"}),
        (3, ENDTOEND | WHOLE),
        (2, PLUS),
        (3, V1 | EIGHT_GROUPS),
        (2, PARTIAL),
        (3, BANK | {"train.micro_batch": 8, "method.loss": "dclw"}),
        (2, BANK | {"method.loss": "nce", "method.bank_negatives": 16}),
    ],
    ids=[
        "2-symmetric",
        "3-unequal-micro-coupled",
        "3-endtoend",
        "2-endtoend-micro-coupled",
        "3-simclr-whole",
        "2-mocov2plus",
        "3-mocov1-eight-groups",
        "2-last-partial",
        "3-memorybank-unequal-micro-coupled",
        "2-memorybank-nce",
    ],
)
def test_invariants_10_and_15_processes_equal_one_process(
    toy_npz, tmp_path, monkeypatch, world, changes
):
    """About 20 steps; three processes hold two, one and one of four groups, or 3, 3, 2 of 8."""
    settings = SETTINGS | changes
    pretrain_in_double(toy_npz, tmp_path / "one", settings, monkeypatch.setattr)
    run_world(world, toy_npz, tmp_path / "many", settings)
    memories = [torch.load(f"{tmp_path}/many.memory{r}", weights_only=True) for r in range(world)]
    for memory in memories[1:]:
        assert memory.keys() == memories[0].keys()
        for name, tensor in memory.items():
            assert torch.equal(tensor, memories[0][name]), name
    alone, together = (
        checkpoint.load(tmp_path / name / "last.pt")["method"] for name in ("one", "many")
    )
    first = next(name for name in alone if name.startswith("encoder.head."))
    assert alone[first].dtype == torch.float64
    for name, tensor in alone.items():
        torch.testing.assert_close(
            together[name], tensor, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    losses = [
        [json.loads(line)["loss"] for line in lines(tmp_path / name)[:20]]
        for name in ("one", "many")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # six digits are written


def test_failures_on_any_process_are_those_of_one_process(photos, tmp_path, monkeypatch):
    """Each of two processes meets images that cannot be read, and tells the other of them."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for path in sorted(folder.rglob("*.jpg"))[::13]:  # 7 of 80
        path.write_bytes(path.read_bytes()[:40])
    sizes = {"train.batch_size": 16, "train.epochs": 3, "method.queue_size": 8}
    settings = SETTINGS | sizes | {"data.workers": 1}
    pretrain_in_double(folder, tmp_path / "one", settings, monkeypatch.setattr)
    run_world(2, folder, tmp_path / "many", settings)
    alone, together = (checkpoint.load(tmp_path / name / "last.pt") for name in ("one", "many"))
    assert len(alone["bad_images"]) == 7
    assert torch.equal(alone["bad_images"], together["bad_images"])
    named = [(tmp_path / name / "bad_images.txt").read_text() for name in ("one", "many")]
    assert sorted(named[0].splitlines()) == sorted(named[1].splitlines())
    for name, tensor in alone["method"].items():
        torch.testing.assert_close(together["method"][name], tensor, atol=1e-9, rtol=1e-9)


if __name__ == "__main__":
    pretrain_in_double(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
