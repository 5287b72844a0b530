"""Measuring, judging and exporting leave nothing behind: not a bit, not a flag, not a file.

`everything` describes all that a run holds and all that torch and the generators remember; each
action is taken between two such descriptions, for methods with every flag set.
"""

import hashlib
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import stubs
import torch
from built import Built

import mocokit
from mocokit.check import check
from mocokit.engine import checkpoint
from mocokit.engine.stop import Stopped, StopSignals
from mocokit.evaluate.session import Session
from mocokit.health.bn_leak import contrast_by_grouping
from mocokit.methods.method import KeyGroups
from mocokit.run.begin import begun
from mocokit.run.diagnosis import diagnose, upcoming
from mocokit.settings import methods
from mocokit.weights.encoder import build_encoder
from mocokit.weights.subject import weights_hash
from mocokit.weights.write import write_backbone

SYMMETRIC, PIECES = {"method.symmetric": True}, {"train.micro_batch": 8}
WHOLE = {"method.batch_norm": "whole"}
SIMCLR, BANK = {"method.name": "simclr"}, {"method.name": "memorybank"}
FEW = {"monitor.images": 32, "monitor.bank": 40}
CASES = {
    "moco": {},
    "moco-whole": WHOLE,
    "moco-one-group": {"method.groups": 1},
    "moco-unshuffled": {"method.shuffle": False},
    "moco-pieces": PIECES | SYMMETRIC,
    "mocov2plus": WHOLE | SYMMETRIC | {
        "method.enqueue": "one", "net.predictor": True, "net.head": "mlp_bn",
        "method.momentum_schedule": "cosine",
    },
    "moco-float16": {"engine.precision": "float16"},
    "moco-keep": {"data.last": "keep", "optim.name": "lars"},
    "simclr": SIMCLR | PIECES,
    "simclr-whole": SIMCLR | WHOLE | SYMMETRIC,
    "bank": BANK | {"method.loss": "dclw"},
    "bank-nce": BANK | {"method.loss": "nce", "method.bank_negatives": 9} | PIECES,
    "SimSiam": {},
    "Dense": {},
    "MultiCrop": {},
}  # fmt: skip
TORCH = torch.nn.Module().__dict__.keys() - {"training"}


@pytest.fixture(scope="module")
def run_of(small, tmp_path_factory):
    """A run with labels in the middle of its second epoch, and its loader; trained once a case."""
    runs = {}

    def run(case):
        if case not in runs:
            changes = FEW | CASES[case]
            if hasattr(stubs, case):
                changes["method.name"] = f"stubs:{case}"
            built = Built(small, changes, tmp_path_factory.mktemp(case.lower()) / "run")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("mocokit.train.diagnose", lambda *rest: {})
                patch.setattr("mocokit.train.recording.finish", lambda *rest: {})
                built.trained()
            built.run.step = 5
            built.untrained = build_encoder(built.run.settings)
            runs[case] = built
        return runs[case]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "_outside", {})
        for name in CASES:
            if hasattr(stubs, name):
                methods.use(f"stubs:{name}", getattr(stubs, name))
        yield run


def digest(value):
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


def plain(module):
    """A module's own attributes: flags and numbers as they are, all others by identity."""
    for name, value in vars(module).items():
        # Every step sets `groups` before its forward: they are the next batch's.
        if name in TORCH | {"groups"} or isinstance(value, torch.Tensor):
            continue
        simple = isinstance(value, bool | int | float | str | tuple | type(None))
        yield name, value if simple else id(value)


def of_module(module):
    found = {"": checkpoint.digest(dict(module.state_dict()))}
    for name, child in module.named_modules():
        found[f"{name}."] = (type(child).__name__, dict(plain(child)))
        found[f"{name} hooks"] = len(child._forward_hooks), len(child._forward_pre_hooks)
    for name, parameter in module.named_parameters():
        grad = None if parameter.grad is None else digest(parameter.grad.numpy().tobytes())
        found[f"{name} parameter"] = id(parameter), parameter.requires_grad, grad
    return found


def of_torch():
    """What torch and the generators remember."""
    return {
        "torch": digest(torch.get_rng_state().numpy().tobytes()),
        "numpy": digest(np.random.get_state()),
        "random": digest(random.getstate()),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "stance": str(torch._dynamo.eval_frame._stance),
    }


def files(folder, but=()):
    return {
        str(path.relative_to(folder)): (digest(path.read_bytes()), path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name not in but
    }


def everything(built, but=()):
    run = built.run
    return {
        "method": of_module(run.parts.method),
        "optimizer": checkpoint.digest(run.parts.optimizer.state_dict()),
        "scaler": run.parts.scaler.state_dict(),
        "schedule": run.parts.schedule,
        "specs": run.parts.specs,
        "settings": run.settings,
        "run": (run.step, run.saved, dict(run.health), run.bad.first, run.resident, id(run.upload)),
        "loader": (built.loader.start_step, built.loader.total_steps, built.loader.workers),
        "torch": of_torch(),
        "files": files(run.folder.path, but),
    }


def assert_same(before, after):
    for part, value in before.items():
        if isinstance(value, dict):
            for name in value.keys() | after[part].keys():
                assert value.get(name) == after[part].get(name), f"{part}: {name}"
        else:
            assert value == after[part], part


def knn(built, tmp_path):
    scores = dict(built.monitor.run(built.method.encoder))
    assert scores.keys() == {"knn_backbone", "knn_head"}


def baselines(built, tmp_path):
    assert built.monitor.random_weights(built.untrained) is not None
    built.monitor.raw_pixels()


def health(built, tmp_path):
    views, _, _ = next(upcoming(built.run, built.loader, 1))
    assert built.health.run(built.method.encoder, views)["rankme"] > 0


def leak(built, tmp_path):
    coming = upcoming(built.run, built.loader, 2)
    if isinstance(built.method.leak, KeyGroups):
        graphs = []
        hook = built.method.register_forward_hook(
            lambda method, given, output: graphs.append(output.loss.requires_grad)
        )
        try:
            found = contrast_by_grouping(built.method, coming, built.monitor.precision)
        finally:
            hook.remove()
        assert found["contrasted_images"] == 64
        assert graphs == [False] * 4, "nothing is differentiated"


def diagnosed(built, tmp_path):
    with StopSignals() as stop:
        assert diagnose(built.run, built.loader, built.monitor, stop)["knn_head"] >= 0


def exported(built, tmp_path):
    path = tmp_path / "backbone.safetensors"
    write_backbone(path, built.method.encoder.backbone, built.run.settings)
    assert path.is_file()


def state(built, tmp_path):
    checkpoint.save(tmp_path / "checkpoints", 5, built.run.state())


ACTIONS = [knn, baselines, health, leak, diagnosed, exported, state]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_behind(run_of, tmp_path, case):
    built = run_of(case)
    built.method.train()
    assert built.loader and built.monitor
    for action in ACTIONS:
        before = everything(built)
        action(built, tmp_path)
        assert_same(before, everything(built))


@pytest.mark.parametrize("case", ["mocov2plus", "moco-pieces", "simclr", "Dense", "bank"])
@pytest.mark.parametrize("after", [1, 2])
def test_nor_when_it_is_broken_off(run_of, tmp_path, monkeypatch, case, after):
    """By a signal, or an error, in the first or second batch of whatever is measured."""
    built = run_of(case)
    built.method.train()
    encoder, method = type(built.method.encoder), type(built.method)
    for action, owner, name in (
        (knn, encoder, "both"),
        (health, encoder, "both"),
        (leak, method, "forward"),
        (diagnosed, method, "forward"),
    ):
        if owner is method and not isinstance(built.method.leak, KeyGroups):
            continue
        before, whole, calls = everything(built), getattr(owner, name), []

        def broken(*given, whole=whole, calls=calls):
            calls.append(True)
            if len(calls) == after:
                raise Stopped
            return whole(*given)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(owner, name, broken)
            patch.setattr("mocokit.protocols.features.BATCH", 16)
            action(built, tmp_path)
        assert_same(before, everything(built))


def test_evaluating_leaves_the_run_and_its_subjects(run_of, monkeypatch, tmp_path):
    """On the trained and the untrained weights. Fine-tuning, which trains: test_evaluate.py."""
    built = run_of("moco")
    with begun(built.run):
        built.run.step = 8
        built.run.save()
    subjects, kept = [], Session.subjects

    def noted(self, *rest, **named):
        found = kept(self, *rest, **named)
        subjects.extend((one, of_module(one.network)) for one in found)
        return found

    monkeypatch.setattr(Session, "subjects", noted)
    folder = built.run.folder.path
    before = everything(built, LATER)
    mocokit.evaluate_knn(folder, built.data, device="cpu", k=(5, 20))
    mocokit.evaluate_linear(folder, built.data, device="cpu")
    assert len(subjects) >= 4
    for one, described in subjects:
        assert_same({"": described}, {"": of_module(one.network)})
        assert weights_hash(one.network) == one.weights
    after = everything(built, LATER)
    before["torch"].pop("torch"), after["torch"].pop("torch")  # their own seeds
    assert_same(before, after)


LATER = ("evaluations.jsonl", "README.md", ".lock")


def test_check_leaves_a_run_as_it_is(run_of, tmp_path):
    built = run_of("moco")
    with begun(built.run):
        pass
    before = everything(built)
    check(str(built.run.folder.config), built.data, tmp_path / "views.png", quick=True)
    assert_same(before, everything(built))


def test_first_weights_are_no_one_elses(run_of):
    """What an untrained encoder is built from: the run's own stay."""
    built = run_of("moco-whole")
    before = everything(built)
    build_encoder(built.run.settings)
    after = everything(built)
    before["torch"].pop("torch"), after["torch"].pop("torch")  # drawn from its own seed
    assert_same(before, after)
