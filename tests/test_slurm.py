"""The batch file for SLURM, run by a shell against a scheduler that only notes what it is asked."""

import os
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest

from mocokit.cli import app, slurm
from mocokit.errors import UserError
from mocokit.run.command import asked
from mocokit.settings import parse_assignments

SIZES = {"name": "mocokit-mocov2", "nodes": 2, "gpus": 4, "cpus": 8, "time": "24:00:00"}


def write(command=("mocokit", "pretrain"), **changes):
    return slurm.script(command, **({**SIZES, "log": "%j.log"} | changes))


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("code", [0, 75, 1, 2, 143])
def test_a_saved_run_is_queued_again_and_no_other(tmp_path, code, cancelled):
    """Nor one that scancel has ended, whose signal reaches the script too."""
    words = ["python", "-m", "mocokit", "pretrain", "my photos/it's", "--set", "a.b=$(touch x)"]
    tools = tmp_path / "bin"
    tools.mkdir()
    signal = "kill -TERM $PPID\n" if cancelled else ""
    for name, end in (("srun", f"{signal}exit {code}"), ("scontrol", "exit 0")):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{name}\n{end}\n')
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
    assert found.exists() == (code == 75 and not cancelled)
    assert not found.exists() or found.read_text().split() == ["requeue", "1234"]
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
    options += ["--batch-size", "256", "--seed", "7", "--allow-import", "math", "--nodes", "2"]
    options += ["--cpus", "3", "--time", "1:00:00", "--sbatch", "partition=a", "--sbatch", "mem=9"]
    refused = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--out" in refused.stderr and not file.exists()
    subprocess.run([*command, *options, "--out", out], check=True, capture_output=True)
    line = next(line for line in file.read_text().splitlines() if line.startswith("srun"))
    words = shlex.split(line)
    assert {
        "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3", "--time=1:00:00", "--partition=a",
        "--mem=9",
    } < {text.removeprefix("#SBATCH ") for text in file.read_text().splitlines()}  # fmt: skip
    assert words[4:] == [
        sys.executable, "-m", "mocokit", "pretrain", "mocov2_cifar10", str(toy_npz), "--out",
        str(out), "--epochs", "3", "--batch-size", "256", "--seed", "7", "--set", "optim.lr=0.1",
        "--allow-import", "math",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "gpus", "batch", "changes", "fits"),
    [
        (1, 8, 256, [], True), (8, 1, 256, [], True), (2, 4, 256, [], True),
        (1, 9, 256, [], False), (9, 1, 256, [], False), (2, 5, 256, [], False),
        (3, 3, 256, [], False), (3, 3, 288, [], True), (2, 4, 256, ["method.groups=7"], False),
        (2, 4, 8, ["method.batch_norm=whole"], True), (3, 3, 8, ["method.batch_norm=whole"], False),
    ],
)  # fmt: skip
def test_gpus_of_all_machines_need_a_group_each(
    tmp_path, monkeypatch, nodes, gpus, batch, changes, fits
):
    """Groups of 32 images, if nothing else is stated; without groups, an image each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    sizes = {"nodes": nodes, "gpus": gpus, "batch_size": batch, "assignments": changes}
    if fits:
        app.write_slurm("mocov2", "photos", "run", file="job", **sizes)
        lines = (tmp_path / "job").read_text().splitlines()
        assert {f"#SBATCH --nodes={nodes}", f"#SBATCH --gpus-per-node={gpus}"} <= {*lines}
        return
    with pytest.raises(UserError, match=f"^{nodes * gpus} GPUs for the [78] .* of {batch}: "):
        app.write_slurm("mocov2", "photos", "run", file="job", **sizes)
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mocov2", "photos"], ["mocov2", "{here}/photos"]),
        (["photos"], ["mocov2", "{here}/photos"]),
        (["mine.yaml"], ["{here}/mine.yaml", "{here}/photos"]),
        (["mine.yaml", "b c/one"], ["{here}/mine.yaml", "{here}/b c/one"]),
        (["mocov2", "photos::b c/{one,two}"], ["mocov2", "{here}/photos::{here}/b c/{{one,two}}"]),
        (["mocov2", "{photos,/}"], ["mocov2", "{here}/photos::/"]),
        (["mocov2_cifar10", "cifar10"], ["mocov2_cifar10", "cifar10"]),
        (["photos", None, "data.root=sets"], ["mocov2", "{here}/photos"]),
        (["mocov2", None, "data.path=photos"], ["mocov2", "{here}/photos"]),
    ],
)
def test_the_job_finds_everything_from_another_folder(tmp_path, monkeypatch, words, expected):
    recipe, data, assignment = [*words, None, None][:3]
    here, there = tmp_path / "here", tmp_path / "there"
    for name in ("photos", "b c/one", "b c/two"):
        (here / name).mkdir(parents=True)
    there.mkdir()
    (here / "mine.yaml").write_text("data: {path: photos}\n")
    monkeypatch.chdir(here)
    given = [assignment] if assignment else []
    app.write_slurm(recipe, data, "out/run", gpus=2, file="job", assignments=given, batch_size=256)
    monkeypatch.chdir(there)
    line = next(line for line in (here / "job").read_text().splitlines() if line.startswith("srun"))
    command = shlex.split(line)[8:]
    expected = [word.format(here=here) for word in expected]
    assert command[:2] == expected
    assert command[2:4] == ["--out", f"{here}/out/run"]
    changes = parse_assignments([b for a, b in pairwise(command) if a == "--set"])
    if assignment == "data.root=sets":
        assert changes["data.root"] == f"{here}/sets"
    settings, _ = asked(*command[:2], changes)
    assert settings.data.path == expected[1]
