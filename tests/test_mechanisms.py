"""Whole runs of every mechanism: stopped and resumed, labels or none, losses exchanged."""

import json
import os
import signal

import pytest
import torch
from built import Built

import mocokit
from mocokit.engine import checkpoint
from mocokit.errors import Interrupted, UserError
from mocokit.methods.memorybank import MemoryBank
from mocokit.methods.simclr import SimCLR
from mocokit.run import state as run_state

FAST = {"log.every_steps": 1, "engine.threads": 1, "monitor.every_epochs": 0}
ENDTOEND = {"method.name": "simclr", "method.symmetric": True}
BANK = {"method.name": "memorybank"}
MECHANISMS = {
    "endtoend": (SimCLR, ENDTOEND | {"train.micro_batch": 32}),
    "simclr": (
        SimCLR,
        ENDTOEND | {"method.batch_norm": "whole", "optim.name": "lars", "optim.lr": 0.3},
    ),
    "bank": (MemoryBank, BANK),
    "nce": (MemoryBank, BANK | {"method.loss": "nce", "method.bank_negatives": 16}),
}


def run(data, out, changes, epochs=2):
    return mocokit.pretrain(
        "demo", data, out, epochs=epochs, batch_size=32, settings=FAST | changes
    )


def state_of(folder):
    return checkpoint.load(folder / "last.pt")


def losses(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", MECHANISMS)
def test_stopped_and_resumed_is_bit_for_bit_the_straight_run(toy_npz, tmp_path, monkeypatch, name):
    """In the middle of an epoch; with bank, NCE's constant and LARS's velocities."""
    method, changes = MECHANISMS[name]
    straight = run(toy_npz, tmp_path / "straight", changes).folder
    update = method.update

    def stopping(self, keep, step, progress):
        update(self, keep, step, progress)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(method, "update", stopping)
    with pytest.raises(Interrupted):
        run(toy_npz, tmp_path / "stopped", changes)
    assert state_of(tmp_path / "stopped")["step"] == 7
    monkeypatch.setattr(method, "update", update)
    run(toy_npz, tmp_path / "stopped", changes)
    a, b = state_of(straight), state_of(tmp_path / "stopped")
    for key, tensor in a["method"].items():
        assert torch.equal(tensor, b["method"][key]), key
    for number, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][number][key])
            )
    assert losses(straight) == losses(tmp_path / "stopped")


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 48),
        ({"method.queue_size": 97, "method.symmetric": True}, 97),
        (ENDTOEND, 0),
        (BANK, 136),
    ],
)
@pytest.mark.parametrize("dim", [8, 20])
def test_room_is_asked_for_the_table_that_is_held(small, tmp_path, changes, rows, dim):
    """A queue, or a row for each of the 136 images, in float32."""
    built = Built(small, changes | {"net.dim": dim}, tmp_path / "run")
    held = [t for name, t in built.method.named_buffers() if name.endswith(".rows")]
    assert [tuple(table.shape) for table in held] == ([(rows, dim)] if rows else [])
    assert built.run.settings.method.table_bytes(136, dim) == rows * dim * 4


@pytest.mark.parametrize("loss", ["dcl", "dclw", "align_uniform", "dual_temperature"])
@pytest.mark.parametrize("mechanism", [{}, ENDTOEND, BANK], ids=["moco", "endtoend", "bank"])
def test_any_loss_goes_with_any_mechanism(toy_npz, tmp_path, mechanism, loss):
    folder = run(toy_npz, tmp_path / "run", mechanism | {"method.loss": loss}, epochs=1).folder
    assert len(losses(folder)) == 5 and all(value is not None for value in losses(folder))


@pytest.mark.parametrize("mechanism", [ENDTOEND, BANK], ids=["endtoend", "bank"])
def test_a_last_partial_batch_and_unlabelled_photos(photos, tmp_path, mechanism):
    changes = mechanism | {"data.last": "keep", "views.size": 32, "data.workers": 0}
    run(photos, tmp_path / "run", changes, epochs=1)
    assert len(losses(tmp_path / "run")) == 3  # 80 images in batches of 32
    assert mocokit.load(tmp_path / "run").num_features == 64


def test_a_whole_batch_in_pieces_is_refused_before_anything_is_written(toy_npz, tmp_path):
    changes = MECHANISMS["simclr"][1] | {"train.micro_batch": 16}
    with pytest.raises(UserError, match="recipe endtoend"):
        run(toy_npz, tmp_path / "run", changes)
    assert not (tmp_path / "run").exists()


def test_views_made_on_demand_give_the_same_run(toy_npz, tmp_path, monkeypatch):

    changes = ENDTOEND | {"train.micro_batch": 32, "engine.precision": "float32"}
    held = run(toy_npz, tmp_path / "held", changes, epochs=1).folder
    made = []

    class Counted(run_state.ViewsOnDemand):
        def __getitem__(self, rows):
            made.append(rows)
            return super().__getitem__(rows)

    monkeypatch.setattr(run_state, "HELD_VIEWS", 0)
    monkeypatch.setattr(run_state, "ViewsOnDemand", Counted)
    lazily = run(toy_npz, tmp_path / "made", changes, epochs=1).folder
    assert len(made) > 4 * 5  # both passes of both views in every step
    assert losses(held) == pytest.approx(losses(lazily), rel=1e-4)
