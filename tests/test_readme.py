"""Every command of the README is run, on small data where it names a user's own."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mocokit import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes the command small enough for a test, without changing what it means.
SMALL = {
    "net.backbone": "resnet_tiny",
    "views.size": 32,
    "engine.threads": 1,
    "data.workers": 0,
}


def commands(language):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_commands_are_all_here():
    verbs = {line.split()[0] for line in commands("sh")}
    assert verbs == {"make", "mocokit", "."}
    assert sum(line.startswith("mocokit pretrain") for line in commands("sh")) >= 7


@pytest.mark.parametrize("line", [c for c in commands("sh") if c.startswith("make")])
def test_make_targets_exist(line):
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_activation_is_the_makefiles():
    makefile = (ROOT / "Makefile").read_text()
    assert ". .venv/bin/activate" in commands("sh") and "venv --quiet --clear" in makefile


def run(line, monkeypatch):
    """Exit code of a README line in this process, made small."""
    words = shlex.split(line)
    trains = words[1] == "pretrain" and "--show" not in words and ".yaml" not in line
    if trains:  # the last of an option given twice counts
        words += [word for k, v in SMALL.items() for word in ("--set", f"{k}={v}")]
        words += ["--epochs", "1"] + (["--batch-size", "40"] if "--batch-size" in words else [])
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_every_mocokit_command_in_order(photos, toy_npz, tmp_path, monkeypatch):
    """In one folder, as a reader would paste them; the run to --resume is made unfinished first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mocokit.protocols.finetune.LEAST_STEPS", 4)
    shutil.copytree(photos, tmp_path / "PHOTOS")
    shutil.copy(toy_npz, tmp_path / "CIFAR10.npz")
    ran = 0
    for line in commands("sh"):
        if not line.startswith("mocokit"):
            continue
        if "--resume" in line:
            metrics = sorted(Path("runs").glob("mocov2-PHOTOS-*"))[-1] / "metrics.jsonl"
            metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))
        assert run(line, monkeypatch) == 0, line
        ran += 1
    assert ran == 13
    assert Path("runs/mocov2-PHOTOS-001/backbone.safetensors").is_file()
    assert Path("runs/first/last.pt").exists()


def test_the_python_example(photos, tmp_path, monkeypatch):
    import mocokit

    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "PHOTOS")
    pretrain = mocokit.pretrain
    monkeypatch.setattr(mocokit, "pretrain", lambda *a: pretrain(*a, epochs=1, settings=SMALL))
    names = {}
    exec("\n".join(commands("python")), names)
    assert names["backbone"].num_features == 64


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_number_of_the_table_is_measured():
    """No placeholder is left where a measured figure belongs."""
    assert "DEMO_" not in README
