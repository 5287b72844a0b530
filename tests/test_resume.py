"""Kills: `kill -9` and resume is bit for bit the run that was never killed; signals save."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_contract import interrupted_at
from test_pretrain import FAST

import mocokit
from mocokit.data.loader import Loader
from mocokit.engine import checkpoint
from mocokit.errors import Interrupted, UserError
from mocokit.health.knn_monitor import KnnMonitor

SETTINGS = {
    "engine.threads": 1,
    "optim.name": "sgd",
    "optim.lr": 0.05,
    "save.every_steps": 3,
    "log.every_steps": 1,
}

# Dies without a word after step 13 of 20: the last checkpoint is that of step 12, in mid-epoch.
DYING = """
import os, signal, sys
import mocokit
from mocokit.methods.moco import MoCo
update = MoCo.update
def dying(self, keep, step, progress):
    update(self, keep, step, progress)
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
MoCo.update = dying
settings = eval(sys.argv[3])
mocokit.pretrain("demo", sys.argv[1], sys.argv[2], epochs=4, batch_size=32, settings=settings)
"""


def run(data, out, settings):
    return mocokit.pretrain("demo", data, out, epochs=4, batch_size=32, settings=settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_and_resumed_equals_straight(toy_npz, tmp_path, precision):
    settings = SETTINGS | {"engine.precision": precision}
    run(toy_npz, tmp_path / "straight", settings)
    killed = tmp_path / "killed"
    died = subprocess.run(
        [sys.executable, "-c", DYING, str(toy_npz), str(killed), repr(settings)], check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert checkpoint.steps(killed / "checkpoints")[-1] == 12
    assert len((killed / "metrics.jsonl").read_text().splitlines()) >= 12
    run(toy_npz, killed, settings)
    states = [checkpoint.load(folder / "last.pt") for folder in (tmp_path / "straight", killed)]
    assert [state["step"] for state in states] == [20, 20]
    a, b = ({**state["method"], **flat(state["optimizer"])} for state in states)
    assert a.keys() == b.keys()
    assert {"encoder.head.0.weight", "key_encoder.head.0.weight", "queue.rows"} < a.keys()
    assert any(name.startswith("momentum") for name in a)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    steps = [line["step"] for line in read(killed)]
    assert steps == [*range(1, 21), 20]  # nothing twice; the result comes last


def flat(optimizer):
    return {
        f"momentum.{number}": state["momentum_buffer"]
        for number, state in optimizer["state"].items()
    }


def read(folder):
    import json

    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(photos, tmp_path, number, code):
    """The signal goes to the whole group, as from a terminal or a scheduler, loaders included."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mocokit", "pretrain", "demo", str(photos)]
    command += ["--set", "data.workers=1"]
    command += ["--out", str(out), "--epochs", "100000", "--batch-size", "32"]
    command += ["--set", "log.every_steps=1", "--set", "save.every_epochs=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code, text
    assert f"and saved; resume with the same command and --out {out}" in text
    assert "Traceback" not in text
    step = int(checkpoint.load(out / "last.pt")["step"])
    assert f"stopped after step {step}" in text


@pytest.mark.parametrize("end", [False, True], ids=["after-an-epoch", "after-the-last"])
def test_scoring_gives_way_to_a_signal_and_is_done_on_resume(toy_npz, tmp_path, monkeypatch, end):
    settings = SETTINGS | {"monitor.every_epochs": 2}
    run(toy_npz, tmp_path / "straight", settings)
    measure, asked = KnnMonitor.run, []

    def run_and_stop(self, encoder):
        asked.append(True)
        if len(asked) == (2 if end else 1):
            os.kill(os.getpid(), signal.SIGTERM)
        yield from measure(self, encoder)

    with monkeypatch.context() as patch:
        patch.setattr(KnnMonitor, "run", run_and_stop)
        with pytest.raises(Interrupted) as caught:
            run(toy_npz, tmp_path / "stopped", settings)
    assert caught.value.exit_code == 75
    step = checkpoint.load(tmp_path / "stopped" / "last.pt")["step"]
    assert step == (20 if end else 10)
    assert not any("knn_head" in line for line in read(tmp_path / "stopped")[step:])
    run(toy_npz, tmp_path / "stopped", settings)
    assert lines(tmp_path / "straight") == lines(tmp_path / "stopped")


def lines(folder):
    """metrics.jsonl without what clocks say."""
    clocks = {"images_per_s", "data_wait", "peak_memory_gib"}
    return [{k: v for k, v in line.items() if k not in clocks} for line in read(folder)]


@pytest.mark.parametrize("of", ["loading", "scoring"])
def test_what_fails_between_steps_costs_no_step(toy_npz, tmp_path, monkeypatch, capsys, of):
    settings = SETTINGS | {"save.every_steps": None, "monitor.every_epochs": 2}
    run(toy_npz, tmp_path / "straight", settings)
    batches = Loader.__iter__

    def load(self):
        for step, batch in batches(self):
            if step == 13:
                raise UserError("the disk went away")
            yield step, batch

    def score(self, encoder):
        raise UserError("the disk went away")
        yield

    with monkeypatch.context() as patch:
        if of == "loading":
            patch.setattr(Loader, "__iter__", load)
        else:
            patch.setattr(KnnMonitor, "run", score)
        with pytest.raises(UserError, match="^the disk went away$"):
            run(toy_npz, tmp_path / "failed", settings)
    step = 13 if of == "loading" else 10
    assert f"saved after step {step}" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "failed" / "checkpoints")[-1] == step
    run(toy_npz, tmp_path / "failed", settings)
    states = [checkpoint.load(tmp_path / name / "last.pt") for name in ("straight", "failed")]
    assert checkpoint.digest(states[0]) == checkpoint.digest(states[1])
    assert lines(tmp_path / "straight") == lines(tmp_path / "failed")


def test_threads_are_a_runs_identity_and_other_instructions_are_told(
    toy_npz, tmp_path, monkeypatch, capsys
):
    """Another number of threads, or other vector instructions, round sums in another order."""
    from mocokit.engine import runtime
    from mocokit.methods.moco import MoCo

    settings = {**FAST, "engine.threads": 1}

    def run(threads):
        given = settings | {"engine.threads": threads}
        return mocokit.pretrain(
            "demo", toy_npz, tmp_path / "run", epochs=2, batch_size=32, settings=given
        )

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, MoCo, 2)
        run(1)
    with pytest.raises(UserError, match="it differs in engine.threads"):
        run(2)
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    here = runtime.instruction_set(torch.device("cpu"))
    assert state["instruction_set"] == here and here
    monkeypatch.setattr("mocokit.run.begin.instruction_set", lambda device: "VSX")
    run("auto")  # which goes on with what the run has
    told = f"computed with {here}, and this machine has VSX"
    assert told in capsys.readouterr().err.replace("\n", " ")
