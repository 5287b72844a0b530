"""Lengthening: a new run from the end of a finished one, which is only read."""

import hashlib
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from test_contract import interrupted_at

import mocokit
from mocokit import cli
from mocokit.chance import Order
from mocokit.data.sources.arrays import ArraySource
from mocokit.engine import checkpoint
from mocokit.engine.folder import RunFolder
from mocokit.errors import Interrupted, UserError
from mocokit.methods.moco import MoCo
from mocokit.run import extend
from mocokit.settings import load, replace

QUICK = {
    "net.backbone": "resnet_tiny", "views.size": 32, "engine.threads": 1, "data.workers": 0,
    "engine.precision": "float32", "log.every_steps": 1, "save.every_steps": 2,
    "optim.warmup_epochs": 0.5, "method.queue_size": 64, "net.calibrate_head": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(toy_npz, tmp_path_factory):
    out = tmp_path_factory.mktemp("parent") / "run"
    mocokit.pretrain("mocov2", toy_npz, out, epochs=2, batch_size=40, settings=QUICK)
    return out


def longer(run, out, epochs=2, data=None, **options):
    return mocokit.pretrain(str(run), data, out, extend=epochs, **options).folder


def snapshot(folder):
    """Every file, its content and its time; links and locks too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = os.lstat(path)
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.relative_to(folder)] = (content, status.st_mtime_ns, status.st_ino)
    return found


def steps_of(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def same_state(a, b):
    one, two = (checkpoint.load(folder / "last.pt")["method"] for folder in (a, b))
    assert one.keys() == two.keys() and "queue.rows" in one
    return [name for name in one if not torch.equal(one[name], two[name])]


@pytest.fixture(scope="module")
def child(parent, tmp_path_factory):
    before = snapshot(parent)
    out = longer(parent, tmp_path_factory.mktemp("child") / "run")
    assert snapshot(parent) == before
    return out


def test_a_new_run_that_names_its_parent(parent, child, capsys):
    settings, old = load(child / "config.yaml"), load(parent / "config.yaml")
    assert settings.train.parent == str(parent)
    weights = checkpoint.digest(checkpoint.load(parent / "last.pt")["method"])
    assert settings.train.parent_weights == weights
    readme = (child / "README.md").read_text()
    assert f"Lengthens {parent} by 2 epochs" in readme and weights[:12] in readme
    assert RunFolder(child).result()["verdict"]
    assert (child / "backbone.safetensors").is_file()
    assert settings.method == old.method and settings.train.batch_size == old.train.batch_size


def test_it_begins_with_the_parents_state_and_the_stated_schedule(parent, child):
    old, lines = load(parent / "config.yaml"), steps_of(child)
    peak = 0.1 * old.optim.lr * 40 / 256
    assert len(lines) == 8
    for line in lines:
        expected = peak * 0.5 * (1 + math.cos(math.pi * (line["step"] - 1) / 8))
        assert line["lr"] == pytest.approx(expected, rel=1e-5)
    assert lines[0]["queue_filled"] == 1.0
    assert steps_of(parent)[0]["queue_filled"] < 1.0
    assert "filling" not in RunFolder(child).result()["verdict"]


def test_the_first_step_starts_from_the_parents_bytes(parent, tmp_path, monkeypatch):
    seen = {}

    def see(settings, folder, method):
        load_parent(settings, folder, method)
        seen.update({name: tensor.clone() for name, tensor in method.state_dict().items()})

    load_parent = extend.load_parent
    monkeypatch.setattr(extend, "load_parent", see)
    child = longer(parent, tmp_path / "child", 1)
    old = checkpoint.load(parent / "last.pt")
    assert seen.keys() == old["method"].keys()
    assert all(torch.equal(seen[name], old["method"][name]) for name in seen)
    assert same_state(parent, child)
    new = checkpoint.load(child / "last.pt")["optimizer"]
    assert new["state"].keys() == old["optimizer"]["state"].keys()


def test_no_order_and_no_view_comes_again(parent, child, toy_npz):
    seeds = [load(folder / "config.yaml").seed for folder in (parent, child)]
    assert (
        seeds[0]
        != seeds[1]
        == extend._seed(seeds[0], load(child / "config.yaml").train.parent_weights)
    )
    orders = {
        Order(seed, epoch, 160)[np.arange(160)].tobytes() for seed in seeds for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_stopped_and_resumed_it_is_the_same(parent, child, tmp_path, monkeypatch):
    """By the same command, and by its own config.yaml when the parent is gone."""
    moved = tmp_path / "moved"
    shutil.copytree(parent, moved, symlinks=True)
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, MoCo, 4)
        longer(moved, out)
    assert checkpoint.load(out / "last.pt")["step"] == 5
    shutil.rmtree(moved)
    mocokit.pretrain(str(out / "config.yaml"), out=out)
    assert same_state(child, out) == []
    again = tmp_path / "again"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, MoCo, 2)
        longer(parent, again)
    longer(parent, again)
    assert same_state(child, again) == []


def test_it_can_be_lengthened_again_at_the_same_rate(child, tmp_path):
    before = snapshot(child)
    third = longer(child, tmp_path / "third", 1)
    assert snapshot(child) == before
    a, b = (load(folder / "config.yaml") for folder in (child, third))
    assert a.optim.lr == b.optim.lr and b.train.parent == str(child)
    assert len({a.seed, b.seed}) == 2


def test_images_that_have_moved(parent, toy_npz, tmp_path):
    elsewhere = tmp_path / "elsewhere.npz"
    shutil.copy(toy_npz, elsewhere)
    out = longer(parent, tmp_path / "out", 1, data=elsewhere)
    assert load(out / "config.yaml").data.path == str(elsewhere)


def test_other_images_are_refused(parent, photos, tmp_path):
    with pytest.raises(UserError, match="the images are not those of"):
        longer(parent, tmp_path / "out", 1, data=photos)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"net.backbone": "resnet18"}, "net.backbone is resnet_tiny in the run to lengthen"),
        ({"net.dim": 64}, "net.dim"),
        ({"method.name": "simclr"}, "method.name"),
        ({"method.queue_size": 128}, "method.queue_size"),
        ({"method.temperature": 0.1}, "method.temperature"),
        ({"train.epochs": 5}, "--epochs and --extend"),
        ({"train.parent": "/x"}, "train.parent follows"),
        ({"seed": 0}, "seed 0 is that of the run to lengthen"),
    ],
)
def test_what_does_not_fit_is_refused(parent, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        longer(parent, tmp_path / "out", 1, settings=changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no warm-up, and a learning rate that falls as a cosine from optim.lr 0.003"),
        (
            {"optim.lr": 0.3, "optim.warmup_epochs": 2.0, "optim.schedule": "steps"},
            "2 epochs of warm-up, and a learning rate that falls in steps from optim.lr 0.3",
        ),
    ],
)
def test_what_it_says_of_its_schedule_is_so(parent, changes, said):
    _, found = extend.lengthened(str(parent), 5, changes)
    words = extend.told(replace(load(parent / "config.yaml"), found))
    assert words.endswith(said) and " by 5 epochs: " in words


def test_what_the_user_states_is_kept(parent):
    _, changes = extend.lengthened(str(parent), 3, {"optim.lr": 0.5, "seed": 7, "net.dim": 128})
    assert (changes["optim.lr"], changes["seed"], changes["train.epochs"]) == (0.5, 7, 3)
    assert "optim.lr_batch" not in changes  # what is stated is what runs
    same, changes = extend.lengthened(str(parent / "config.yaml"), 3, {})
    assert same == str(parent / "config.yaml")
    # Whatever schedule the parent had, and wherever it began.
    schedule = {"schedule": "cosine", "per": "step", "first_epoch": 0, "warmup_epochs": 0.0}
    schedule |= {"lr": pytest.approx(0.003), "lr_batch": 256}
    assert schedule.items() <= {k.removeprefix("optim."): v for k, v in changes.items()}.items()
    assert changes["net.calibrate_head"] is False


def test_a_seed_follows_from_the_parents_seed_and_its_weights():
    seeds = {extend._seed(seed, weights) for seed in (0, 1) for weights in ("a", "b")}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_parent_is_read_until_the_first_checkpoint_and_numbers_the_images(parent, tmp_path):
    folder, method = RunFolder(tmp_path / "run"), torch.nn.Linear(1, 1)
    settings = replace(load(parent / "config.yaml"), {"train.parent": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="has no checkpoint"):
        extend.load_parent(settings, folder, method)
    folder.make()
    checkpoint.save(folder.checkpoints, 1, {})
    extend.load_parent(settings, folder, method)  # a resumed run needs it no more
    others = ArraySource(np.zeros((70, 8, 8, 3), np.uint8), None, "others")
    assert extend.parents_index(settings, others).length == 70
    settings = replace(settings, {"train.parent": str(parent)})
    assert extend.parents_index(settings, others).fingerprint != others.index().fingerprint
    assert extend.parents_index(replace(settings, {"train.parent": None}), others) is None


@pytest.mark.parametrize("run", [None, "mocov2", "nowhere", "."])
def test_what_is_no_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="name a finished run"):
        extend.lengthened(run, 1, {})


def test_parents_that_cannot_be_lengthened(parent, tmp_path, toy_npz):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(parent, unfinished, symlinks=True)
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(True)
    (unfinished / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="is not finished, so it is resumed"):
        longer(unfinished, tmp_path / "out", 1)
    (unfinished / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl is not there, .*; restore it"):
        longer(unfinished, tmp_path / "out", 1)
    (unfinished / "metrics.jsonl").write_text("".join(lines))
    checkpoints = sorted((unfinished / "checkpoints").iterdir())
    checkpoints[-1].unlink()
    with pytest.raises(UserError, match="is not that of its end"):
        longer(unfinished, tmp_path / "out", 1)
    for path in checkpoints[:-1]:
        path.unlink()
    with pytest.raises(UserError, match="has no checkpoint"):
        longer(unfinished, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_a_parent_that_changed_before_the_first_checkpoint(parent, tmp_path, toy_npz):
    moved = tmp_path / "moved"
    shutil.copytree(parent, moved, symlinks=True)
    config, changes = extend.lengthened(str(moved), 1, {})
    last = moved / "checkpoints" / checkpoint.name_of(8)
    state = checkpoint.load(last)
    state["method"]["queue.rows"] += 1
    checkpoint.save(moved / "checkpoints", state.pop("step"), state)
    with pytest.raises(UserError, match="is not the one that this run lengthens"):
        mocokit.pretrain(config, out=tmp_path / "out", settings=changes)


@pytest.mark.parametrize("method", [None, [torch.ones(2)], {}, {"queue.rows": "x"}])
def test_a_parent_with_a_forged_checkpoint_is_a_sentence(parent, tmp_path, method):
    forged = tmp_path / "forged"
    shutil.copytree(parent, forged, symlinks=True)
    state = checkpoint.load(forged / "checkpoints" / checkpoint.name_of(8))
    state["method"] = method
    checkpoint.save(forged / "checkpoints", state.pop("step"), state)
    with pytest.raises(UserError, match="no checkpoint of pre-training|another method or arch"):
        longer(forged, tmp_path / "out", 1)


def test_more_epochs_for_a_finished_run_names_the_way(parent, toy_npz):
    with pytest.raises(UserError, match=f"pretrain --extend 3 {parent}"):
        mocokit.pretrain("mocov2", toy_npz, parent, epochs=5, batch_size=40, settings=QUICK)
    with pytest.raises(UserError) as error:
        mocokit.pretrain("mocov2", toy_npz, parent, epochs=1, batch_size=40, settings=QUICK)
    assert "--extend" not in str(error.value)


def test_the_command(parent, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["mocokit", "pretrain", "--extend", "1", str(parent), "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert f"Lengthens {parent} by 1 epochs" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words[:4], "mocov2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
