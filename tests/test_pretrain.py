"""Whole runs in this process: folder, metrics, resume, identity, and what stops a run."""

import json
import shutil

import numpy as np
import pytest
import torch

import mocokit
from mocokit import recipes
from mocokit.engine import checkpoint
from mocokit.engine.due import Due
from mocokit.engine.folder import RunFolder
from mocokit.errors import Interrupted, NonFiniteLoss, UserError
from mocokit.methods.moco import MoCo
from mocokit.run import build
from mocokit.weights import encoder

FAST = {"log.every_steps": 5, "optim.warmup_epochs": 1.0, "engine.threads": 1}


def run(data, out, epochs=2, **settings):
    changes = FAST | {k.replace("__", "."): v for k, v in settings.items()}
    return mocokit.pretrain("demo", data, out, epochs=epochs, batch_size=32, settings=changes)


def state_of(folder):
    return checkpoint.load(folder / "last.pt")


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def finished(toy_npz, tmp_path_factory):
    return run(toy_npz, tmp_path_factory.mktemp("runs") / "straight", 4)


def test_the_run_folder_is_complete(finished):
    names = {path.name for path in finished.folder.iterdir()} - {".lock"}
    assert names == {
        "config.yaml", "metrics.jsonl", "checkpoints", "last.pt", "images.idx",
        "backbone.safetensors", "views.png", "README.md", "run.json",
    }  # fmt: skip
    assert (finished.folder / "last.pt").resolve().name == "step-00000020.pt"
    assert len(list((finished.folder / "checkpoints").iterdir())) == 2
    assert "mocokit.load(" in (finished.folder / "README.md").read_text()


def test_metrics_hold_the_health_line(finished):
    lines = [json.loads(t) for t in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    *steps, last = lines
    assert [line["step"] for line in steps] == [1, 5, 10, 15, 20]
    for line in steps:
        assert set(line) == {
            "step", "epoch", "loss", "chance_loss", "contrast_top1", "feature_std", "grad_norm",
            "queue_filled", "key_momentum", "lr", "images_per_s", "data_wait", "peak_memory_gib",
            "bad_images",
        }  # fmt: skip
        assert all(np.isfinite(value) for value in line.values())
        assert line["chance_loss"] == pytest.approx(np.log(1 + 32), rel=1e-5)
        assert 0 <= line["data_wait"] <= 1 and line["grad_norm"] > 0
    assert steps[0]["queue_filled"] == 1.0  # 32 keys fill the 32 rows
    assert last["finished"] is True and last == finished.result
    assert {"knn_backbone", "knn_head", "knn_random_weights", "knn_raw_pixels"} <= set(last)


def test_load_gives_the_backbone(finished):
    backbone = mocokit.load(finished.folder)
    assert not backbone.training and backbone.num_features == 64
    state = state_of(finished.folder)["method"]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state[f"encoder.backbone.{name}"])
    again = mocokit.load(finished.folder / "last.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images), again(images))
    assert mocokit.load(finished.folder / "backbone.safetensors").num_features == 64
    with pytest.raises(UserError, match="there is no backbone"):
        mocokit.load(finished.folder / "none")


def test_a_finished_run_is_not_run_again(finished, toy_npz, capsys, monkeypatch):
    monkeypatch.setattr(MoCo, "forward", lambda *a: pytest.fail("it trained"))
    again = run(toy_npz, finished.folder, 4)
    assert again.result == finished.result
    assert "finished" in capsys.readouterr().err


def test_another_identity_is_refused_and_named(finished, toy_npz, tmp_path):
    before = (finished.folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"differs in .*method.temperature \(0.2 there, 0.3 asked"):
        run(toy_npz, finished.folder, 4, method__temperature=0.3)
    arrays = dict(np.load(toy_npz))
    arrays["train_images"][3, 2, 1, 0] ^= 1
    np.savez(tmp_path / "toy.npz", **arrays)
    with pytest.raises(UserError, match="differs in the data's images"):
        run(tmp_path / "toy.npz", finished.folder, 4)
    assert (finished.folder / "config.yaml").read_text() == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopped_and_resumed_is_bit_for_bit_the_straight_run(
    toy_npz, tmp_path, monkeypatch, precision
):
    """Interrupted in the middle of an epoch, and gone on with by another number of workers."""
    straight = run(toy_npz, tmp_path / "straight", engine__precision=precision)
    update = MoCo.update

    def stopping(self, keep, step, progress):
        update(self, keep, step, progress)
        if step == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MoCo, "update", stopping)
    with pytest.raises(Interrupted, match="after step 3 and saved; .*--out") as caught:
        run(toy_npz, tmp_path / "stopped", engine__precision=precision)
    assert caught.value.exit_code == 75
    assert state_of(tmp_path / "stopped")["step"] == 3
    monkeypatch.setattr(MoCo, "update", update)
    run(toy_npz, tmp_path / "stopped", engine__precision=precision, data__workers=2)
    a, b = state_of(straight.folder), state_of(tmp_path / "stopped")
    for state in (a, b):
        state.pop("settings")
    assert_same(a, b)
    lines = [
        [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (straight.folder, tmp_path / "stopped")
    ]
    timing = {"images_per_s", "data_wait", "peak_memory_gib"}
    for x, y in zip(*lines, strict=True):
        assert {k: v for k, v in x.items() if k not in timing} == {
            k: v for k, v in y.items() if k not in timing
        }


def test_the_seed_decides(toy_npz, tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = run(toy_npz, tmp_path / name, 1, seed=seed).folder
        weights.append(state_of(folder)["method"])
    assert_same(weights[0], weights[1])
    assert not torch.equal(weights[0]["encoder.head.2.weight"], weights[2]["encoder.head.2.weight"])


def test_the_monitor_changes_nothing(toy_npz, tmp_path):
    with_, without = (
        run(toy_npz, tmp_path / str(every), monitor__every_epochs=every).folder for every in (1, 0)
    )
    assert_same(state_of(with_)["method"], state_of(without)["method"])
    text = (with_ / "metrics.jsonl").read_text()
    assert [line["epoch"] for line in map(json.loads, text.splitlines()) if "knn_head" in line] == [
        1,
        2,
    ]


def test_config_yaml_repeats_the_run(finished, tmp_path):
    again = mocokit.pretrain(str(finished.folder / "config.yaml"), out=tmp_path / "again")
    assert_same(state_of(again.folder)["method"], state_of(finished.folder)["method"])


def test_micro_batches_make_the_same_run(finished, toy_npz, tmp_path):
    changes = {"engine__precision": "float32", "train__micro_batch": 16}
    pieces = run(toy_npz, tmp_path / "pieces", **changes)
    changes.pop("train__micro_batch")
    whole = run(toy_npz, tmp_path / "whole", **changes)
    a, b = state_of(pieces.folder)["method"], state_of(whole.folder)["method"]
    torch.testing.assert_close(a["queue.rows"], b["queue.rows"], atol=1e-3, rtol=0)


def test_unlabelled_photos_of_any_size(photos, tmp_path):
    run_ = run(photos, tmp_path / "photos", 1, data__workers=1, views__size=32)
    assert {"step": 2, "epoch": 1, "finished": True}.items() <= run_.result.items()
    assert not any(name.startswith("knn") for name in run_.result)
    assert mocokit.load(run_.folder).num_features == 64


def test_the_number_of_workers_changes_nothing(photos, tmp_path):
    a, b = (
        run(photos, tmp_path / str(n), 1, data__workers=n, data__last="keep").folder for n in (0, 2)
    )
    assert_same(state_of(a)["method"], state_of(b)["method"])


def test_bad_images_are_named_counted_and_replaced(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "empty.png").write_bytes(b"")
    out = run(folder, tmp_path / "run", 2, data__workers=0, data__last="keep").folder
    named = (out / "bad_images.txt").read_text()
    assert "broken.jpg" in named and "empty.png" in named and len(named.splitlines()) == 2
    assert '"bad_images": 2' in (out / "metrics.jsonl").read_text()


def test_a_last_partial_batch_is_trained_on(photos, tmp_path):
    out = run(photos, tmp_path / "keep", 1, data__last="keep", data__workers=0).folder
    assert state_of(out)["step"] == 3  # 32 + 32 + 16
    assert int(state_of(out)["method"]["queue.pointer"]) == 80 % 32


def test_a_loss_that_is_not_finite_stops_the_run(toy_npz, tmp_path, monkeypatch):
    forward, begun = MoCo.forward, []

    def breaking(self, views, index, step):
        begun.append(step.number)
        output = forward(self, views, index, step)
        return output._replace(loss=output.loss * torch.nan) if step.number == 7 else output

    monkeypatch.setattr(MoCo, "forward", breaking)
    with pytest.raises(NonFiniteLoss, match=r"loss of step 8 is not finite.*step-00000005.pt"):
        run(toy_npz, tmp_path / "nan")
    assert begun == list(range(8))  # on a CPU at once, though only steps 5 and 10 are logged
    assert checkpoint.steps(tmp_path / "nan" / "checkpoints") == [5]
    for tensor in state_of(tmp_path / "nan")["method"].values():
        assert bool(tensor.isfinite().all())
    monkeypatch.setattr(MoCo, "forward", forward)
    assert run(toy_npz, tmp_path / "nan").result["finished"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 500}, "train.batch_size 500 exceeds the 160 images"),
        ({"device": "cuda:7"}, "device cuda:7"),
        ({"settings": {"net.backbone": "resnet19"}}, "did you mean"),
        ({"settings": {"method.tau": 1}}, "setting method.tau does not exist"),
    ],
)
def test_mistakes_leave_nothing_behind(toy_npz, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        mocokit.pretrain("demo", toy_npz, tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_out_must_be_a_runs_or_a_new_folder(toy_npz, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds other files and no run"):
        run(toy_npz, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(toy_npz, tmp_path / "thesis.tex")


def test_resume_finds_the_newest_unfinished_run(toy_npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = {"epochs": 1, "batch_size": 32, "settings": FAST}
    with pytest.raises(UserError, match="runs/ holds no unfinished run of demo on toy"):
        mocokit.pretrain("demo", toy_npz, resume=True, **asked)
    first = mocokit.pretrain("demo", toy_npz, **asked)
    assert str(first.folder) == "runs/demo-toy-001"
    metrics = first.folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))  # not finished after all
    other = mocokit.pretrain("demo", toy_npz, seed=1, **asked)
    assert str(other.folder) == "runs/demo-toy-002"
    again = mocokit.pretrain("demo", toy_npz, resume=True, **asked)
    assert again.folder == first.folder and again.result["finished"]


@pytest.mark.parametrize(
    ("micro", "sentence"),
    [
        (None, "step 1 does not fit .* train.micro_batch=16, which gives the same result"),
        (16, "even in pieces of one group of 16 images; lower train.batch_size"),
    ],
)
def test_out_of_memory_names_the_value_to_try(toy_npz, tmp_path, monkeypatch, micro, sentence):
    def full(self, views, index, draw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(MoCo, "forward", full)
    with pytest.raises(UserError, match=sentence):
        run(toy_npz, tmp_path / "run", train__micro_batch=micro)


def test_the_readme_of_an_unfinished_run_says_how_to_go_on(toy_npz, tmp_path, monkeypatch):
    def broken(self, views, index, draw):
        raise RuntimeError("our fault")

    with monkeypatch.context() as patch:
        patch.setattr(MoCo, "forward", broken)
        with pytest.raises(RuntimeError, match="our fault"):
            run(toy_npz, tmp_path / "run")
    text = (tmp_path / "run" / "README.md").read_text()
    command = text.split("```sh\n")[1].split("\n")[0].split()
    assert "Not finished" in text and command[:2] == ["mocokit", "pretrain"]
    config, _, out = command[2:]
    assert mocokit.pretrain(config, out=out).result["finished"]
    assert "Not finished" not in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.slow
def test_compiled_encoders_make_the_same_run(photos, tmp_path):
    """The path that CUDA takes by default, on a CPU, with a last batch of half the size."""
    changes = {"engine__precision": "float32", "data__last": "keep", "optim__lr": 1e-5}
    changes |= {"views__size": 32, "data__workers": 0}
    plain, compiled = (
        run(photos, tmp_path / str(flag), 1, engine__compile=flag, **changes).folder
        for flag in (False, True)
    )
    a, b = state_of(plain)["method"], state_of(compiled)["method"]
    assert a.keys() == b.keys()
    torch.testing.assert_close(a["queue.rows"], b["queue.rows"], atol=1e-4, rtol=0)


def test_weights_that_are_not_finite_are_never_saved(toy_npz, tmp_path, monkeypatch):
    """A finite loss whose gradient overflows, at the very step that ends an epoch."""
    forward = MoCo.forward

    def breaking(self, views, index, step):
        output = forward(self, views, index, step)
        if step.number != 9:
            return output
        return output._replace(loss=output.loss + 0 * (output.loss - output.loss.detach()).sqrt())

    monkeypatch.setattr(MoCo, "forward", breaking)
    with pytest.raises(NonFiniteLoss, match=r"weights after step 10 .*good.*step-00000005.pt"):
        run(toy_npz, tmp_path / "run", 2)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5]
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    monkeypatch.setattr(MoCo, "forward", forward)
    assert run(toy_npz, tmp_path / "run", 2).result["finished"]


def test_a_damaged_checkpoint_is_written_again(toy_npz, tmp_path):
    folder = run(toy_npz, tmp_path / "run", 2).folder
    before = state_of(folder)
    newest = folder / "checkpoints" / "step-00000010.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:-1]))
    run(toy_npz, folder, 2)
    assert_same(state_of(folder), before)


def test_a_skipped_float16_step_leaves_keys_and_queue(toy_npz, tmp_path, monkeypatch):
    """The first scale, 65536, overflows float16 here: the step is not taken, nor its update."""
    updated = []
    update = MoCo.update
    monkeypatch.setattr(
        MoCo, "update", lambda self, *rest: (updated.append(rest[1]), update(self, *rest))
    )
    out = run(toy_npz, tmp_path / "run", 2, engine__precision="float16", log__every_steps=1).folder
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()][:-1]
    skipped = [line["step"] - 1 for line in lines if line["grad_norm"] is None]
    assert skipped and sorted(updated + skipped) == list(range(10))
    assert state_of(out)["scaler"]["scale"] < 65536


def test_library_randomness_is_resumed_too(toy_npz, tmp_path, monkeypatch):
    """Dropout in the head: its masks follow from the step, not from a carried state."""
    build_head = encoder.build_head
    monkeypatch.setattr(
        encoder,
        "build_head",
        lambda *a: torch.nn.Sequential(*build_head(*a), torch.nn.Dropout(0.5)),
    )
    straight = run(toy_npz, tmp_path / "straight").folder
    with monkeypatch.context() as patch:
        patch.setattr(Due, "save_or_stop", lambda self, step, asked: (step == 3, step == 3))
        with pytest.raises(Interrupted):
            run(toy_npz, tmp_path / "stopped")
    run(toy_npz, tmp_path / "stopped")
    assert_same(state_of(straight)["method"], state_of(tmp_path / "stopped")["method"])


def test_a_rate_stated_beside_a_file_is_what_runs(finished, toy_npz, tmp_path):
    again = mocokit.pretrain(
        str(finished.folder / "config.yaml"),
        out=tmp_path / "run",
        epochs=1,
        settings={"optim.lr": 0.01, "optim.scale": "linear", "train.batch_size": 40},
    )
    assert "  lr: 0.01\n" in (again.folder / "config.yaml").read_text().split("resolved:")[1]


def test_two_new_runs_get_two_folders(toy_npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_parts = build.build_parts

    def meanwhile(*arguments):  # another run is faster while this one builds its network
        taken = RunFolder(tmp_path / "runs" / "demo-toy-001")
        taken.create(recipes.demo(), {})
        return build_parts(*arguments)

    monkeypatch.setattr(build, "build_parts", meanwhile)
    got = mocokit.pretrain("demo", toy_npz, epochs=1, batch_size=32, settings=FAST)
    assert got.folder.name == "demo-toy-002"


@pytest.mark.parametrize(("wait", "advised"), [(0.09, False), (0.11, True)])
def test_advice_when_the_device_waits_for_images(
    photos, tmp_path, monkeypatch, capsys, wait, advised
):
    monkeypatch.setattr(
        "mocokit.engine.record.Meter.read", lambda self: {"images_per_s": 1.0, "data_wait": wait}
    )
    monkeypatch.setattr("mocokit.run.recording.default_threads", lambda: 4)
    changes = {"data.workers": 1, "log.every_steps": 1}
    run(photos, tmp_path / "run", 5, **{k.replace(".", "__"): v for k, v in changes.items()})
    said = capsys.readouterr().err
    text = "11% of the time went into waiting for images; --set data.workers=2 (now 1)"
    assert said.count("went into waiting") == advised and (text in said) == advised
    assert ("mocokit pack" in said) == advised
