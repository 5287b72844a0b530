"""The batch file for SLURM, run by a shell against a scheduler that only notes what it is asked."""

import os
import shlex
import subprocess
import sys

import pytest

from mocokit import slurm
from mocokit.errors import UserError

SIZES = {"name": "mocokit-mocov2", "nodes": 2, "gpus": 4, "cpus": 8, "time": "24:00:00"}


def write(command=("mocokit", "pretrain"), **changes):
    return slurm.script(command, **({**SIZES, "log": "%j.log"} | changes))


@pytest.mark.parametrize(("code", "asked"), [(0, []), (75, ["requeue 1234"]), (1, []), (2, [])])
def test_a_saved_run_is_queued_again_and_no_other(tmp_path, code, asked):
    words = ["python", "-m", "mocokit", "pretrain", "my photos/it's", "--set", "a.b=$(touch x)"]
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, end in (("srun", code), ("scontrol", 0)):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}\nexit {end}\n')
        tool.chmod(0o755)
    file = tmp_path / "job"
    file.write_text(write(words))
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "1234"}
    done = subprocess.run(["bash", file], env=environment, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert (tmp_path / "srun").read_text().splitlines() == [
        "--cpus-per-task=8", "--kill-on-bad-exit=0", "--wait=60", *words
    ]  # fmt: skip
    found = tmp_path / "scontrol"
    assert ([" ".join(found.read_text().split())] if found.exists() else []) == asked
    assert not (tmp_path / "x").exists()


def test_what_sbatch_reads():
    lines = [line for line in write(options=["partition=gpu"]).splitlines() if "#SBATCH" in line]
    assert {
        "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=24:00:00", "#SBATCH --signal=TERM@120", "#SBATCH --requeue",
        "#SBATCH --open-mode=append", "#SBATCH --partition=gpu",
    } < set(lines)  # fmt: skip
    first = next(line for line in write().splitlines() if line and not line.startswith("#"))
    assert first == "trap 'cancelled=yes' TERM"  # sbatch reads no option after the first command


@pytest.mark.parametrize(
    "changes",
    [
        {"time": "soon"}, {"time": "1:00:00\n#SBATCH --x"}, {"options": ["wrap=rm -rf"]},
        {"options": ["x=1\n"]}, {"log": "a b"}, {"name": "a\nb"},
    ],
)  # fmt: skip
def test_what_would_break_a_line_is_refused(changes):
    with pytest.raises(UserError):
        write(**changes)


def test_the_verb(tmp_path, toy_npz):
    file, out = tmp_path / "job", tmp_path / "run"
    command = [sys.executable, "-m", "mocokit", "slurm", "mocov2_cifar10", str(toy_npz)]
    options = ["--gpus", "2", "--file", str(file), "--epochs", "3", "--set", "optim.lr=0.1"]
    refused = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--out" in refused.stderr and not file.exists()
    subprocess.run([*command, *options, "--out", out], check=True, capture_output=True)
    line = next(line for line in file.read_text().splitlines() if line.startswith("srun"))
    words = shlex.split(line)
    assert words[4:] == [
        sys.executable, "-m", "mocokit", "pretrain", "mocov2_cifar10", str(toy_npz), "--out",
        str(out), "--epochs", "3", "--set", "optim.lr=0.1",
    ]  # fmt: skip
