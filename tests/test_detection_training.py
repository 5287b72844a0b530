"""Training a detector, watched from outside; its trial where files are damaged or refused."""

import json
import math
import os
import shutil

import pytest
import torch
from shapes import write_shapes
from test_detection import trainer
from test_detection_data import opened
from test_voc import FEW, evaluate, same, weights

from mocokit.detection import c4, trial
from mocokit.detection.train import Trainer
from mocokit.engine import checkpoint
from mocokit.errors import MocokitError, NonFiniteLoss
from mocokit.evaluate import voc
from mocokit.nets.batchnorm import GroupedBatchNorm2d


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("training"), 12, 4)


@pytest.fixture(scope="module")
def data(root):
    return opened(root).train


def test_the_optimiser_is_the_protocols(data, monkeypatch):
    """Warm-up, drops, momentum and decay, as each step takes them; by hand, in step with it."""
    seen, plain = [], torch.optim.SGD.step

    def watched(self, closure=None):
        seen.append([dict(group) for group in self.param_groups])
        return plain(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    values = {"warmup": 4, "drop_steps": (6, 8), "lr": 0.008, "warmup_factor": 0.001}
    ours = trainer(data, 9, **values)
    assert [ours.step for _ in ours.steps()] == list(range(1, 10))
    ramp = [0.008 * (0.001 * (1 - share) + share) for share in (0, 1 / 4, 2 / 4, 3 / 4)]
    rates = [*ramp, 0.008, 0.008, 0.0008, 0.0008, 0.00008]
    norms = {
        id(p)
        for module in ours.detector.modules()
        if isinstance(module, GroupedBatchNorm2d)
        for p in module.parameters()
    }
    assert len(seen) == 9
    for groups, rate in zip(seen, rates, strict=True):
        for group in groups:
            of_norms = {id(p) in norms for p in group["params"]}
            assert len(of_norms) == 1
            assert group["lr"] == pytest.approx(rate, rel=1e-9)
            assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, False, 0)
            assert group["weight_decay"] == (0.0 if of_norms == {True} else 1e-4)
    trained = sum(len(group["params"]) for group in seen[0])
    assert trained == len(list(ours.detector.parameters()))


def test_a_resumed_trainer_takes_the_rate_of_its_own_step(data, monkeypatch):
    values = {"warmup": 4, "drop_steps": (6, 8), "lr": 0.008}
    first, rates, plain = trainer(data, 9, **values), [], torch.optim.SGD.step
    for _ in first.steps():
        if first.step == 3:
            break
    state = {**first.state(), "step": 3}
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self: rates.append(self.param_groups[0]["lr"]) or plain(self),
    )
    second = trainer(data, 9, **values)
    second.load(state)
    next(second.steps())
    assert rates == [pytest.approx(0.008 * (0.001 / 4 + 3 / 4), rel=1e-9)]


@pytest.mark.parametrize("training", [True, False])
def test_proposals_have_the_limits_of_training_and_of_the_test(data, monkeypatch, training):
    asked, plain = [], c4.propose

    def watched(*words, **limits):
        asked.append(limits)
        return plain(*words, **limits)

    monkeypatch.setattr(c4, "propose", watched)
    numbers = {"pre_nms_train": 41, "post_nms_train": 31, "pre_nms_test": 21, "post_nms_test": 11}
    ours = trainer(data, 1, **numbers)
    if training:
        next(ours.steps())
    else:
        trial.detect_in(ours, data, lambda done, total: None)
    before, after = (41, 31) if training else (21, 11)
    assert asked
    assert all((one["before"], one["after"]) == (before, after) for one in asked)


def test_unreadable_images_are_part_of_the_state(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    path = tmp_path / "data/JPEGImages/a001.jpg"
    path.write_bytes(path.read_bytes()[:700])
    ours = trainer(opened(tmp_path / "data").train, 6)
    for _ in ours.steps():
        pass
    bad = ours.state()["bad"]
    assert [name.split("/")[-1] for name in bad] == ["a001"]
    other = trainer(opened(tmp_path / "data").train, 6)
    other.load({**ours.state(), "step": 6})
    assert dict(other.views.bad) == bad


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_the_remedy(data, monkeypatch, broken):
    ours = trainer(data, 3, lr=0.1)
    plain = ours._losses

    def losses(views, stream, step):
        found = plain(views, stream, step)
        return {name: one * (broken if step == 1 else 1) for name, one in found.items()}

    monkeypatch.setattr(ours, "_losses", losses)
    for _ in ours.steps():
        pass
    for call in (ours.check, ours.state):
        with pytest.raises(NonFiniteLoss, match=r"step 2 is not finite.*--set lr=0.01"):
            call()


# The files of a trial.


def test_each_line_of_its_log_is_of_its_own_step(root, tmp_path, monkeypatch):
    """What the optimiser took and what was lost in that step, whichever steps are written."""
    took, lost, plain = [], [], torch.optim.SGD.step
    train_losses = Trainer._losses

    def losses(self, views, stream, step):
        found = train_losses(self, views, stream, step)
        if torch.is_grad_enabled():
            lost.append({name: one.item() for name, one in found.items()})
        return found

    def watched(self, closure=None):
        took.append([group["lr"] for group in self.param_groups])
        return plain(self, closure)

    monkeypatch.setattr(Trainer, "_losses", losses)
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr(trial, "LOG_STEPS", 2)
    changes = {"warmup": 2, "drop_steps": (3, 4), "lr": 0.008, "warmup_factor": 0.001}
    evaluate(root, tmp_path / "out", steps=5, every=0, pictures=0, settings=FEW | changes)
    rates = [0.008 * 0.001, 0.008 * (0.001 / 2 + 1 / 2), 0.008, 0.0008, 0.00008]
    assert took == [pytest.approx([rate, rate], rel=1e-9) for rate in rates]
    text = (tmp_path / "out/trial-0/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]  # the last one too
    for line in lines:
        of = line["step"] - 1
        assert line["lr"] == pytest.approx(rates[of], rel=1e-6)
        assert len(lost[of]) == 4
        assert {name: line[name] for name in lost[of]} == pytest.approx(lost[of], rel=1e-5)
        assert line["loss"] == pytest.approx(sum(lost[of].values()), rel=1e-5)
        assert line["bad_images"] == 0


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return evaluate(root, out, every=2), out


CHANGING = {"test_seconds", "peak_memory_gib"}


def plain(result):
    return {name: value for name, value in result.items() if name not in CHANGING}


@pytest.mark.parametrize("damage", [b"", b"\xff", b'{"AP50": 3', b"[]", b"{}", b"null", "pipe"])
def test_a_damaged_result_is_tested_again(finished, root, tmp_path, capsys, damage):
    shutil.copytree(finished[1], tmp_path / "out", symlinks=True)
    path = tmp_path / "out/trial-0/result.json"
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(damage)
    again = evaluate(root, tmp_path / "out", every=2)
    assert plain(again.trials[0]) == plain(finished[0].trials[0])
    said = " ".join(capsys.readouterr().err.split())
    assert "result.json is damaged" in said and "resumes after step 4" in said


def test_damaged_checkpoints_are_set_aside_and_told(finished, root, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "out", symlinks=True)
    folder = tmp_path / "out/trial-0"
    (folder / "result.json").unlink()
    (path,) = (folder / "checkpoints").glob("step-*.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    again = evaluate(root, tmp_path / "out", every=2)
    assert plain(again.trials[0]) == plain(finished[0].trials[0])
    assert same(weights(folder), weights(finished[1] / "trial-0"))
    said = " ".join(capsys.readouterr().err.split())
    assert "set aside, and trial-0 begins anew" in said
    assert path.with_name(f"{path.name}.damaged").read_bytes() == bytes(content)


def test_a_cut_line_of_its_log_costs_a_trial_nothing_else(finished, root, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out", symlinks=True)
    folder = tmp_path / "out/trial-0"
    (folder / "result.json").unlink()
    content = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(content[:-20])
    again = evaluate(root, tmp_path / "out", every=2)
    assert plain(again.trials[0]) == plain(finished[0].trials[0])


@pytest.mark.parametrize("what", ["result.json", "checkpoint", "pictures"])
def test_a_full_disk_is_a_sentence_and_the_same_command_resumes(
    finished, root, tmp_path, monkeypatch, capsys, what
):
    def full(*words, **named):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if what == "result.json":
            patch.setattr(trial, "write_text", full)
        elif what == "checkpoint":
            patch.setattr(checkpoint, "whole", full)
        else:
            patch.setattr(trial, "write_bytes", full)
        if what == "pictures":
            found = evaluate(root, tmp_path / "out", every=2)
            assert "predictions.png (No space left on device)" in " ".join(
                capsys.readouterr().err.split()
            )
            assert plain(found.trials[0]) == plain(finished[0].trials[0])
            return
        with pytest.raises(MocokitError, match="No space left on device"):
            evaluate(root, tmp_path / "out", every=2)
    again = evaluate(root, tmp_path / "out", every=2)
    assert plain(again.trials[0]) == plain(finished[0].trials[0])


def test_a_folder_of_files_that_are_no_json_is_refused(root, tmp_path):
    (tmp_path / "out").mkdir()
    for content in (b"\xff", b"[1]", b"{}", b"not json"):
        (tmp_path / "out/identity.json").write_bytes(content)
        with pytest.raises(voc.UserError, match="choose another --out"):
            evaluate(root, tmp_path / "out")
