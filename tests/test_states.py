"""Probes that train resume to the bit, from their own state alone; what they train is watched."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import mocokit
from mocokit import recipes
from mocokit.data.sources.arrays import ArraySource
from mocokit.engine import checkpoint
from mocokit.engine.runtime import autocast
from mocokit.engine.stop import Stopped, StopSignals
from mocokit.errors import Interrupted, MocokitError, NonFiniteLoss, UserError
from mocokit.files import locked
from mocokit.nets.backbones import build_backbone
from mocokit.protocols import finetune, linear_paper, states as states_
from mocokit.protocols.finetune import Plan, fine_tune
from mocokit.protocols.labelled import labelled_split
from mocokit.protocols.linear_paper import fit_paper
from mocokit.protocols.states import State, States
from mocokit.weights.encoder import view_spec
from mocokit.weights.subject import FrozenModel, weights_hash

SPEC = dataclasses.replace(view_spec(recipes.demo()), size=16, resize=16)
EPOCHS, STEPS = 3, 3  # of each probe below


class Forgetful(nn.Module):
    """A backbone with dropout, so that every step draws from torch's generator."""

    def __init__(self):
        super().__init__()
        self.backbone, self.drop = build_backbone("resnet_tiny"), nn.Dropout(0.3)

    def forward(self, images):
        return self.drop(self.backbone(images))


def source(count, seed=0):
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    colours = np.array([60, 120, 180])[labels]
    images = colours[:, None, None, None] + draw.normal(0, 40, (count, 16, 16, 3))
    return ArraySource(images.clip(0, 255).astype(np.uint8), labels, "toy")


def subject(seed=0, spec=SPEC):
    torch.manual_seed(seed)
    network = Forgetful().eval().requires_grad_(False)
    return FrozenModel("toy", network, 64, spec, "resnet_tiny")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(finetune, "LEAST_STEPS", 1)
    monkeypatch.setattr(linear_paper, "BATCH", 10)
    monkeypatch.setattr(states_, "SAVING_SHARE", math.inf)  # every epoch is saved


SPLIT = labelled_split(source(30), source(12, 1), seed=0)
PLAN = Plan(epochs=EPOCHS, batch_size=10)


def tune(states=None, judged=None, split=SPLIT, plan=PLAN, seed=0):
    """Everything that comes out of fine-tuning, as bytes."""
    predicted, truth, details = fine_tune(
        judged or subject(), split, plan, seed=seed, states=states
    )
    return predicted.tolist(), truth.tolist(), details


def fit(states=None, judged=None, split=SPLIT, seed=0, epochs=EPOCHS, lr=0.5):
    fitted = fit_paper(judged or subject(), split, seed=seed, epochs=epochs, lr=lr, states=states)
    return fitted.weight.numpy().tobytes(), fitted.bias.numpy().tobytes(), fitted.details


PROBES = {"finetune": tune, "linear": fit}


@pytest.fixture(scope="module")
def straight():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "LEAST_STEPS", 1)
        patch.setattr(linear_paper, "BATCH", 10)
        return {name: probe() for name, probe in PROBES.items()}


@pytest.fixture
def reached(monkeypatch):
    """Every step that is reached, as (number, what ends there); `at` is called with its count."""
    plain, seen = State.reached, []

    def watched(self, step, words, content, end_of):
        seen.append((step, end_of))
        plain(self, step, words, content, end_of)
        for call in watched.calls:
            call(len(seen))

    watched.calls, watched.seen = [], seen
    monkeypatch.setattr(State, "reached", watched)
    return watched


class Killed(BaseException):
    pass


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize(
    "at",
    [
        pytest.param(at, marks=[] if at in (2, 4, 9) else pytest.mark.slow)
        for at in range(1, EPOCHS * STEPS + 1)
    ],
)
def test_a_killed_probe_repeats_what_its_state_lacks(probe, at, straight, reached, tmp_path):
    def kill(count):
        if count == at:
            raise Killed

    reached.calls.append(kill)
    with pytest.raises(Killed):
        PROBES[probe](States(tmp_path))
    assert PROBES[probe](States(tmp_path)) == straight[probe]
    steps = [step for step, _ in reached.seen]
    saved = at // STEPS * STEPS  # the last whole epoch
    assert steps == [*range(1, at + 1), *range(saved + 1, EPOCHS * STEPS + 1)]


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_stopped_after_every_step_repeats_nothing(probe, straight, reached, tmp_path):
    reached.calls.append(lambda count: os.kill(os.getpid(), signal.SIGTERM))
    notes, stops = [], 0
    while True:
        try:
            with StopSignals() as stop, stop.interruptible():
                found = PROBES[probe](States(tmp_path, notes.append))
            break
        except Stopped as stopped:
            stops += 1
            assert "saved " in str(stopped) and "of 3" in str(stopped)
    assert found == straight[probe]
    # A signal that comes once a step is done ends the work after the next step.
    assert stops >= EPOCHS * STEPS // 2 and notes[0].startswith("toy")
    assert [step for step, _ in reached.seen] == list(range(1, EPOCHS * STEPS + 1))


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    """By a clock of our own: a save takes 3 seconds, so the next is due 60 seconds later."""
    monkeypatch.setattr(states_, "SAVING_SHARE", 1 / 20)
    now, saved = [1000.0], []

    def save(folder, step, content):
        saved.append((step, now[0]))
        now[0] += 3.0

    monkeypatch.setattr(states_.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(states_.checkpoint, "save", save)
    monkeypatch.setattr(states_.checkpoint, "prune", lambda *rest: None)
    state = State("probe", tmp_path, "identity", "machine", lambda text: None, _saved_at=now[0])
    for step in range(1, 20):
        now[0] += 10.0
        state.reached(step, "words", dict, "epoch")
    assert [step for step, _ in saved] == [1, 7, 13, 19]
    # Within an epoch, at least STEP_SECONDS apart.
    saved.clear()
    for step in range(20, 100):
        now[0] += 10.0
        state.reached(step, "words", dict, "step")
    assert [step for step, _ in saved] == [49, 79]
    state.reached(100, "words", dict, "end")
    assert saved[-1][0] == 100


def test_what_is_finished_is_not_done_again(straight, reached, tmp_path, monkeypatch):
    states = States(tmp_path)
    assert tune(states) == straight["finetune"] and fit(states) == straight["linear"]
    done = len(reached.seen)
    monkeypatch.setattr(finetune, "_predict", None)  # would fail if called
    assert tune(States(tmp_path)) == straight["finetune"]
    assert fit(States(tmp_path)) == straight["linear"]
    assert len(reached.seen) == done and len(list(tmp_path.iterdir())) == 2
    states.forget()
    assert list(tmp_path.iterdir()) == []


def test_a_test_that_lacks_an_image_is_done_again(straight, reached, tmp_path, monkeypatch):
    """What could not be read for once is not kept as the result."""
    plain = finetune._predict

    def some(*words):
        predicted, truth = plain(*words)
        return predicted[1:], truth[1:]

    monkeypatch.setattr(finetune, "_predict", some)
    assert len(tune(States(tmp_path))[0]) == 11
    monkeypatch.setattr(finetune, "_predict", plain)
    assert tune(States(tmp_path)) == straight["finetune"]
    assert len(reached.seen) == EPOCHS * STEPS


def relabelled():
    one = source(30)
    one.labels = one.labels[::-1].copy()
    return labelled_split(one, source(12, 1), seed=0)


OTHERS = {
    "tune": {
        "seed": {"seed": 1},
        "weights": {"judged": subject(1)},
        "a view": {"judged": subject(spec=dataclasses.replace(SPEC, resize=20))},
        "precision": {"judged": dataclasses.replace(subject(), precision="bfloat16")},
        "images": {"split": labelled_split(source(30, 5), source(12, 1), seed=0)},
        "test images": {"split": labelled_split(source(30), source(12, 7), seed=0)},
        "labels": {"split": relabelled()},
        "a class": {"split": dataclasses.replace(SPLIT, classes=(*SPLIT.classes, "no image"))},
        "a share": {"split": SPLIT.with_share(0.5, 0)},
        "another share": {"split": SPLIT.with_share(0.5, 1)},
        **{
            name: {"plan": dataclasses.replace(PLAN, **{name: value})}
            for name, value in {
                "epochs": 4,
                "lr": 0.01,
                "batch_size": 15,
                "momentum": 0.5,
                "weight_decay": 0.0,
                "layer_decay": 0.5,
            }.items()
        },
    },
    "fit": {
        "seed": {"seed": 1},
        "epochs": {"epochs": 4},
        "lr": {"lr": 0.1},
        "weights": {"judged": subject(1)},
        "layer": {"judged": dataclasses.replace(subject(), layer="head")},
        "images": {"split": labelled_split(source(30, 5), source(12, 1), seed=0)},
    },
}
assert set(dataclasses.asdict(PLAN)) < set(OTHERS["tune"])


@pytest.mark.parametrize(
    ("probe", "change"), [(probe, name) for probe, some in OTHERS.items() for name in some]
)
def test_the_state_of_another_probe_is_not_taken(probe, change, tmp_path, monkeypatch):
    """Nor under this probe's own name, where somebody copied it there."""

    def stop_at_first(self, step, words, content, end_of):
        found.append(self.found)
        self._save(step, words, content())
        raise Killed

    call = {"tune": tune, "fit": fit}[probe]
    found = []
    monkeypatch.setattr(State, "reached", stop_at_first)
    for options in ({}, OTHERS[probe][change], {}):
        with pytest.raises(Killed):
            call(States(tmp_path), **options)
    assert [one is not None for one in found] == [False, False, True]
    one, other = sorted(tmp_path.iterdir())
    for folder in (one, other):
        shutil.rmtree(folder / "checkpoints")
    found.clear()
    with pytest.raises(Killed):
        call(States(tmp_path), **OTHERS[probe][change])
    filled, empty = sorted((one, other), key=lambda path: not (path / "checkpoints").exists())
    shutil.copytree(filled / "checkpoints", empty / "checkpoints")
    with pytest.raises(Killed):
        call(States(tmp_path))
    assert found == [None, None]


def test_the_same_probe_in_another_process_is_refused(tmp_path):
    states = States(tmp_path)
    with states.of("toy", subject(), SPLIT, {}) as state:
        with (
            pytest.raises(UserError, match="another process does the same"),
            States(tmp_path).of("toy", subject(), SPLIT, {}),
        ):
            pass
        with States(tmp_path).of("toy", subject(), SPLIT, {"lr": 1}):  # another one is not
            pass
        states.forget()
        assert state.folder.is_dir()  # what is in use stays


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """States of both probes after their first epoch."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "LEAST_STEPS", 1)
        patch.setattr(linear_paper, "BATCH", 10)
        plain = State.reached

        def killed(self, step, words, content, end_of):
            plain(self, step, words, content, end_of)
            if end_of == "epoch":
                raise Killed

        patch.setattr(State, "reached", killed)
        for probe in PROBES.values():
            with pytest.raises(Killed):
                probe(States(folder))
    return folder


@settings(max_examples=12)
@given(st.sampled_from(["flip", "cut", "empty", "text", "other"]), st.floats(0, 1), st.data())
def test_a_damaged_state_costs_its_progress_alone(begun, straight, tmp_path_factory, how, at, data):
    probe = data.draw(st.sampled_from(sorted(PROBES)))
    folder, notes = tmp_path_factory.mktemp("damaged"), []
    shutil.copytree(begun, folder, dirs_exist_ok=True)
    every = {("model" in checkpoint.load(one)): one for one in folder.rglob("step-*.pt")}
    path = every[probe == "finetune"]
    content = bytearray(path.read_bytes())
    place = int(at * (len(content) - 1))
    if how == "flip":
        content[place] ^= 0x55
    elif how == "other":
        torch.save({"format": 2, "step": 3, "checksum": ""}, path)
        content = path.read_bytes()
    else:
        content = {"cut": content[:place], "empty": b"", "text": b"no checkpoint"}[how]
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "LEAST_STEPS", 1)
        patch.setattr(linear_paper, "BATCH", 10)
        assert PROBES[probe](States(folder, notes.append)) == straight[probe]
    said = " ".join(notes)
    # A flipped bit may lie in what a zip file keeps twice: then the state is whole all the same.
    assert "begins anew" in said or (how == "flip" and "resumes after epoch 1 of 3" in said)


def test_a_full_disk_ends_no_probe_but_a_stop_says_so(straight, reached, tmp_path, monkeypatch):
    def full(folder, step, state):
        raise MocokitError(f"cannot write {folder} (No space left on device)")

    monkeypatch.setattr(checkpoint, "save", full)
    notes = []
    assert tune(States(tmp_path, notes.append)) == straight["finetune"]
    assert len(notes) == 1 and "No space left" in notes[0] and "a stop would lose" in notes[0]
    reached.calls.append(lambda count: os.kill(os.getpid(), signal.SIGTERM))
    with StopSignals() as stop, stop.interruptible(), pytest.raises(MocokitError, match="No space"):
        fit(States(tmp_path / "other"))
    (tmp_path / "file").touch()
    reached.calls.clear()
    notes.clear()
    assert fit(States(tmp_path / "file", notes.append)) == straight["linear"]
    assert len(notes) == 1 and "MOCOKIT_CACHE" in notes[0]


def test_the_oldest_states_go_first_but_none_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(states_, "LIMIT_GIB", 2.5 / 1024)
    for number in range(4):
        (tmp_path / f"{number}" / "checkpoints").mkdir(parents=True)
        (tmp_path / f"{number}" / "checkpoints/step-00000001.pt").write_bytes(bytes(2**20))
        (tmp_path / f"{number}" / "last.pt").touch()
        os.utime(tmp_path / f"{number}" / "last.pt", (number, number))
    with locked(tmp_path / "1/.lock"), States(tmp_path).of("toy", subject(), SPLIT, {}) as state:
        pass
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"1", "2", "3", state.folder.name}


def test_a_resumed_probe_has_the_threads_that_it_began_with(reached, tmp_path):
    def kill(count):
        if count == STEPS:
            raise Killed

    seen = []
    try:
        torch.set_num_threads(2)
        reached.calls.append(kill)
        with pytest.raises(Killed):
            fit(States(tmp_path))
        torch.set_num_threads(1)
        reached.calls.append(lambda count: seen.append(torch.get_num_threads()))
        fit(States(tmp_path))
        assert set(seen) == {2} and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_no_broken_weights_are_saved(reached, tmp_path):
    """Statistics are of no effect on the loss in training, so they are looked at themselves."""

    def spoil(count):
        if count == 2:
            networks[0].backbone.backbone.bn1.running_var[0] = math.inf

    networks, plain = [], finetune.Classifier
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finetune, "Classifier", lambda *words: networks.append(plain(*words)) or networks[-1]
        )
        reached.calls.append(spoil)
        with pytest.raises(NonFiniteLoss, match="fine-tuning diverged in epoch 1.*--layer-decay"):
            tune(States(tmp_path))
    assert not list(tmp_path.rglob("*.pt"))


# Through the command, as a scheduler does.


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("finetune", {"percent": [50.0, 100.0], "epochs": 30}),
        ("linear", {"epochs": 100, "lr": 1.0}),
    ],
)
def test_sigterm_ends_the_command_with_75_and_a_sentence(verb, options, tmp_path, monkeypatch):
    images = {"train": source(24), "test": source(9, 1)}
    arrays = {f"{side}_images": one.images for side, one in images.items()}
    np.savez(tmp_path / "x.npz", **arrays, **{f"{k}_labels": v.labels for k, v in images.items()})
    judged = ("random:resnet_tiny", str(tmp_path / "x.npz"))
    place, cache = tmp_path / "found.json", tmp_path / "cache"
    code = "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); "  # one thread
    code += "from mocokit.protocols import finetune; finetune.LEAST_STEPS = 60; "
    code += "from mocokit import cli; cli.main()"
    words = [sys.executable, "-c", code, "evaluate", verb, *judged, "--size", "16"]
    words += ["--device", "cpu", "--json", str(place)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{name}", str(one)]
    named = {"env": os.environ | {"MOCOKIT_CACHE": str(cache)}, "text": True}

    process = subprocess.Popen(words, stderr=subprocess.PIPE, **named)
    deadline = time.monotonic() + 120
    while not list(cache.rglob("step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = " ".join(process.communicate(timeout=120)[1].split())
    assert process.returncode == 75, said
    assert "stopped (random resnet_tiny" in said and "saved " in said, said
    assert "resume with the same command" in said and "Traceback" not in said
    assert not place.exists()

    done = subprocess.run(words, stderr=subprocess.PIPE, check=True, timeout=200, **named)
    assert "resumes " in done.stderr and list((cache / "probes").iterdir()) == []
    monkeypatch.setenv("MOCOKIT_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(finetune, "LEAST_STEPS", 60)
    monkeypatch.setattr("mocokit.evaluate.session.default_threads", lambda: 1)
    monkeypatch.setattr(linear_paper, "BATCH", 256)
    evaluate = {"finetune": mocokit.evaluate_finetune, "linear": mocokit.evaluate_linear}[verb]
    straight = evaluate(*judged, size=16, device="cpu", **options)
    assert json.loads(place.read_text())["results"] == straight.as_dict()["results"]


def test_a_signal_before_the_work_ends_it_at_once(toy_npz, tmp_path, monkeypatch):
    def opening(*words, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("mocokit.evaluate.session.open_model", opening)
    began = time.monotonic()
    with pytest.raises(Interrupted, match="nothing to save") as stopped:
        mocokit.evaluate_knn("random:resnet_tiny", toy_npz, size=16)
    assert stopped.value.exit_code == 75 and time.monotonic() - began < 30


# What is trained.


def test_fine_tuning_leaves_its_subject_alone(straight):
    """And so one share of the labels knows nothing of another."""
    judged = subject()
    before = weights_hash(judged.network)
    few = tune(judged=judged, split=SPLIT.with_share(0.4, 0))
    assert weights_hash(judged.network) == before and not judged.network.training
    assert not any(p.requires_grad for p in judged.network.parameters())
    assert tune(judged=judged) == straight["finetune"] != few


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_fine_tuning_is_the_protocol_that_it_prints(monkeypatch, decay):
    """What reaches the optimiser, and when: watched, as the paper's probe is."""
    seen, plain = [], torch.optim.SGD

    class Watched(plain):
        def step(self, closure=None):
            seen.append([dict(group) for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    plan = dataclasses.replace(PLAN, layer_decay=decay)
    tune(plan=plan)
    total = EPOCHS * STEPS
    assert len(seen) == total
    for step, groups in enumerate(seen):
        rate = plan.lr * (1 + math.cos(math.pi * step / total)) / 2
        layers = [decay ** (len(groups) - 1 - at) for at in range(len(groups))]
        assert [group["lr"] for group in groups] == pytest.approx([rate * one for one in layers])
        for group in groups:
            assert (group["momentum"], group["nesterov"]) == (0.9, True)
            assert group["weight_decay"] == 1e-4
    trained = sum(p.numel() for group in seen[0] for p in group["params"])
    assert trained == sum(p.numel() for p in subject().network.parameters()) + 64 * 3 + 3
    words = plan.describe(subject())
    for text in (
        "Nesterov momentum 0.9",
        "cosine per step",
        "weight decay 0.0001",
        "lr 0.05",
        f"batch {plan.batch_size}, or all",
    ):
        assert text in words


def test_precision_is_that_of_every_convolution(monkeypatch):
    """Of the frozen network, and of all steps and the test of fine-tuning."""
    seen, plain = set(), torch.nn.Conv2d.forward

    def watched(self, images):
        seen.add((found := plain(self, images)).dtype)
        return found

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        kind = partial(autocast, torch.device("cpu"), precision)
        judged = dataclasses.replace(subject(), precision=precision, autocast=kind)
        for computed in (lambda one: one.features(torch.zeros(2, 3, 16, 16)), partial(tune, None)):
            seen.clear()
            computed(judged)
            assert seen == {dtype}


def test_a_batch_of_one_image_trains_nothing_but_counts_as_a_step(monkeypatch):
    """31 images in batches of 10: batch norm cannot train on the last one."""
    rates, plain = [], torch.optim.SGD

    class Watched(plain):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    tune(split=labelled_split(source(31), source(12, 1), seed=0), plan=Plan(2, batch_size=10))
    steps = [0, 1, 2, 4, 5, 6]
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * n / 8)) for n in steps])
