"""What mocokit 0.1 wrote is still read, and continues as it would have then.

tests/data/v01/README.md says how the files were made. Tests reach the package by its public names;
`save_anew` alone knows modules inside it.
"""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import mocokit

OLD = Path(__file__).parent / "data" / "v01"
STEP, STEPS, STEPS_PER_EPOCH = 45, 50, 25
CLOCKS = {"images_per_s", "data_wait", "peak_memory_gib"}

# By recipe: what a setting of 0.1 is called now, or None if it meant nothing for that method and
# was dropped.
MOCOS = ["queue_size", "momentum", "momentum_batch", "momentum_schedule", "enqueue"]
BANKS = ["bank_negatives", "bank_momentum"]
VIEWS: dict[str, str | None] = {"views.resize": "views.canvas"}
RENAMED: dict[str, dict[str, str | None]] = {
    "mocov2": VIEWS | {f"method.{name}": None for name in BANKS},
    "simclr": VIEWS | {f"method.{name}": None for name in [*MOCOS, *BANKS]},
    "memorybank": VIEWS | {f"method.{name}": None for name in [*MOCOS, "symmetric", "shuffle"]},
}


def save_anew(old: Path, new: Path) -> None:
    """Load the run in `old` as a resume does, and save it in `new` as a run does now."""
    from mocokit.data.open import open_data
    from mocokit.engine.folder import RunFolder
    from mocokit.engine.runtime import joined_world
    from mocokit.run.begin import begun
    from mocokit.run.command import asked as settle
    from mocokit.run.open import open_run

    asked, stated = settle(str(old / "config.yaml"), None, {})
    splits = open_data(asked.data.path, asked.data.labels, asked.data.root)
    with joined_world("cpu") as world:
        job = open_run(asked, stated, splits, old, False, world)
        with begun(job):
            assert job.step == STEP
            job.folder, job.saved = RunFolder(new), -1
            job.folder.create(job.settings, job.effect.as_dict())
            job.save()


def copy_of_stopped(folder: Path) -> Path:
    return Path(shutil.copytree(OLD / "stopped", folder, symlinks=True))


def resume(folder: Path) -> mocokit.Run:
    return mocokit.pretrain(str(folder / "config.yaml"), out=folder)


def fixed_input() -> Tensor:
    """(2, 3, 32, 32) sines."""
    waves = np.sin(0.37 * np.arange(2 * 3 * 32 * 32)).astype(np.float32)
    return torch.from_numpy(waves).view(2, 3, 32, 32)


@torch.no_grad()
def features(path: Path) -> np.ndarray:
    """(2, 64) of the fixed input."""
    backbone = mocokit.load(path)
    assert backbone.num_features == 64 and not backbone.training
    return backbone(fixed_input()).numpy()


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without clocks."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def leaves(tree, place=""):
    """(place, value) of every tensor, number and text."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from leaves(branch, f"{place}/{name}")
    elif isinstance(tree, (list, tuple)):
        for number, branch in enumerate(tree):
            yield from leaves(branch, f"{place}/{number}")
    else:
        yield place, tree


def flat(tree, prefix=""):
    """{dotted path: value} of a tree from YAML."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (flat(branch, f"{prefix}.{name}".strip(".")) for name, branch in tree.items())
    return {path: value for part in parts for path, value in part.items()}


@pytest.mark.parametrize("recipe", RENAMED)
def test_an_old_config_gives_the_settings_that_it_states(recipe, toy_npz, monkeypatch, capsys):
    path = OLD / "configs" / f"{recipe}.yaml"
    words = ["mocokit", "pretrain", str(path), str(toy_npz), "--show-all"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mocokit", run_name="__main__")
    out = capsys.readouterr()
    assert not ended.value.code, out.err
    found = flat(yaml.safe_load(out.out))
    stated = flat(yaml.safe_load(path.read_text()))
    stated = {k: v for k, v in stated.items() if not k.startswith("resolved.")}
    assert len(stated) > 70 and {"method.queue_size", "optim.lr", "seed"} < stated.keys()
    del stated["data.path"]  # given in the command
    for name, value in stated.items():
        now = RENAMED[recipe].get(name, name)
        if now is not None:
            assert found[now] == value, name


def test_an_old_run_resumes_as_it_did_then(tmp_path):
    folder = copy_of_stopped(tmp_path / "run")
    assert STEP % STEPS_PER_EPOCH and (folder / "last.pt").is_symlink()
    before = (folder / "metrics.jsonl").read_text()
    run = resume(folder)
    assert run.result["step"] == STEPS and run.result["finished"]
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    then, now = metrics(OLD / "finished"), metrics(folder)
    assert [line["step"] for line in now] == [*range(1, STEPS + 1), STEPS]
    for old, new in zip(then[:STEPS], now, strict=False):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-4)
        assert new["lr"] == old["lr"]
    # Sums round differently on other machines.
    old, new = (load_file(path / "backbone.safetensors") for path in (OLD / "finished", folder))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_an_old_run_continues_as_the_same_state_saved_anew(tmp_path):
    old, new = copy_of_stopped(tmp_path / "old"), tmp_path / "new"
    save_anew(old, new)
    shutil.copy(old / "metrics.jsonl", new)
    assert len(list((new / "checkpoints").glob("step-*.pt"))) == 1
    for folder in (old, new):
        resume(folder)
    one, two = (torch.load(path / "last.pt", weights_only=True) for path in (old, new))
    assert one["step"] == two["step"] == STEPS
    a, b = dict(leaves(one)), dict(leaves(two))
    assert a.keys() == b.keys()
    assert sum(isinstance(value, Tensor) for value in a.values()) > 100
    for place, value in a.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, b[place]), place
        else:
            assert value == b[place], place
    assert metrics(old) == metrics(new)


@pytest.mark.parametrize("name", ["finished/backbone.safetensors", "stopped"])
def test_an_old_backbone_gives_the_features_that_it_gave(name):
    expected = np.load(OLD / "features.npz", allow_pickle=False)[name.split("/")[0]]
    np.testing.assert_allclose(features(OLD / name), expected, rtol=0, atol=1e-5)
    assert expected.std(0).max() > 1e-3  # the two images give different features
