"""The contract of a method (methods/method.py): every built-in method, and stubs from outside."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import stubs
import torch
from PIL import Image
from test_pretrain import FAST, assert_same, state_of

import mocokit
from mocokit import recipes
from mocokit.errors import Interrupted, UserError
from mocokit.methods.method import KeyGroups, Method, NoLeak, Output, Step
from mocokit.run import build
from mocokit.settings import methods, replace
from mocokit.settings.sizes import resolve

SMALL = {"net.backbone": "resnet_tiny", "net.dim": 8, "method.group_size": 8}
VIT = {"net.backbone": "test_vit", "net.stem": "imagenet", "views.size": 160}
STUBS = {
    stubs.SimSiam: {},
    stubs.MoCoV3: VIT | {"optim.name": "adamw", "train.batch_size": 40},
    stubs.Dense: {},
    stubs.MultiCrop: {},
}
BUILT_IN = ["moco", "simclr", "memorybank"]
QUICK = {**FAST, "log.every_steps": 1, "monitor.every_epochs": 1, "monitor.images": 32}


@pytest.fixture(autouse=True)
def nothing_is_known_from_outside(monkeypatch):
    monkeypatch.setattr(methods, "_outside", {})
    monkeypatch.setattr(methods, "_allowed", set())


def named(method):
    return f"{method.__module__}:{method.__qualname__}"


def built(method):
    if isinstance(method, str):
        name, changes = method, {}
    else:
        name, changes = named(method), STUBS[method]
        methods.use(name, method)
    settings = replace(recipes.mocov2_cifar10(), SMALL | changes | {"method.name": name})
    return build.build_method(settings, resolve(settings, 640)), build.view_specs(settings)


@pytest.mark.parametrize("method", [*BUILT_IN, *STUBS], ids=str)
def test_a_method_declares_what_it_is_asked_for(method):
    torch.manual_seed(0)
    method, specs = built(method)
    assert isinstance(method, Method) and isinstance(method.leak, KeyGroups | NoLeak)
    assert method.chance_loss is None or method.chance_loss > 0
    assert method.expectation and set(method.health().values()) <= {0.0, 0.99, 1.0}
    grouped = [p for group in method.parameter_groups() for p in group["params"]]
    assert {*map(id, grouped)} == {*map(id, method.trained())} and len(grouped) == len({*grouped})
    assert {*method.compiled} <= {*method.modules()} and [*method.compiled]
    views = [torch.randn(16, 3, spec.size, spec.size) for spec in specs.values()]
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    queues = {name: queue.rows.clone() for name, queue in method.queues.items()}
    output = method.train()(views, torch.arange(16), Step(0, 0, 16))
    assert isinstance(output, Output) and output.loss.isfinite() and output.loss.requires_grad
    for value in output.metrics.values():
        assert value.ndim == 0 and not value.requires_grad
    for name, parameter in method.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for name, queue in method.queues.items():
        assert torch.equal(queue.rows, queues[name]), name
    if isinstance(method.leak, KeyGroups):
        other = Step(0, 1, 16)
        once = method(views, torch.arange(16), other).loss
        with method.regrouped():
            again = method(views, torch.arange(16), other).loss
        assert torch.equal(once, method(views, torch.arange(16), other).loss)
        assert again.isfinite()
    output.loss.backward()
    method.update(output.keep, 0, 0.1)
    for name, queue in method.queues.items():
        assert int(queue.filled) == min(16 * queue.keys_per_image, len(queue.rows)), name


def test_views_differ_as_their_roles_say():
    """Each role's changes of `views.*`, and for the rest the settings."""
    _, specs = built(stubs.MultiCrop)
    assert [*specs] == ["large 1", "large 2", *(f"small {n}" for n in range(1, 7))]
    found = [(spec.size, spec.resize, spec.crop_area, spec.std) for spec in specs.values()]
    std = recipes.mocov2_cifar10().views.std
    assert found == [(32, 32, (0.3, 1.0), std)] * 2 + [(16, 16, (0.05, 0.3), std)] * 6
    # The small views' smallest crop, 16 / sqrt(0.05 x 3/4), wants more than the large ones'.
    assert build.largest_canvas(specs.values()) == 83
    assert build.largest_canvas([specs["large 1"]]) == 68


def trained(method, data, out, **given):
    changes = QUICK | SMALL | STUBS[method] | {"train.batch_size": 32} | STUBS[method]
    return mocokit.pretrain("demo", data, out, epochs=1, settings=changes, method=method, **given)


def interrupted_at(monkeypatch, method, last):
    update = method.update

    def stopping(self, keep, step, progress):
        update(self, keep, step, progress)
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(method, "update", stopping)


@pytest.mark.parametrize("method", STUBS)
def test_a_method_from_outside_trains_scores_and_resumes(method, toy_npz, tmp_path, monkeypatch):
    straight = trained(method, toy_npz, tmp_path / "straight")
    assert straight.result["finished"] and 0 <= straight.result["knn_backbone"] <= 1
    last = json.loads((straight.folder / "metrics.jsonl").read_text().splitlines()[-1])
    if isinstance(method.leak, NoLeak):
        assert f"statistics leak not checked: {method.leak.reason}" in last["verdict"]
    else:
        assert last["contrasted_images"] > 0 and "contrast_regrouped" in last
    assert ("positives_in_queue" in last) == (method in (stubs.Dense, stubs.MultiCrop))
    with Image.open(straight.folder / "views.png") as sheet:
        wide = sheet.width
    assert (wide > 2000) == (method is stubs.MultiCrop)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, method, 2)
        trained(method, toy_npz, tmp_path / "stopped")
    assert state_of(tmp_path / "stopped")["step"] == 3
    trained(method, toy_npz, tmp_path / "stopped")
    a, b = state_of(tmp_path / "straight"), state_of(tmp_path / "stopped")
    assert_same(a, b)
    methods._outside.clear()  # as in another process, which does not know the class
    assert mocokit.load(straight.folder).num_features == 64


def test_a_class_is_imported_only_if_this_command_says_so(toy_npz, tmp_path):
    run = trained(stubs.SimSiam, toy_npz, tmp_path / "run")
    config = str(run.folder / "config.yaml")
    assert "stubs:SimSiam" in Path(config).read_text()
    methods._outside.clear()
    with pytest.raises(UserError, match="stubs:SimSiam is code .*--allow-import stubs"):
        mocokit.pretrain(config, out=tmp_path / "again")
    again = mocokit.pretrain(config, out=tmp_path / "again", allow_import=["stubs"])
    assert_same(state_of(run.folder)["method"], state_of(again.folder)["method"])
    methods._outside.clear()
    settings = {**QUICK, **SMALL, "method.name": "stubs:SimSiam", "train.batch_size": 32}
    named_here = mocokit.pretrain("demo", toy_npz, tmp_path / "n", epochs=1, settings=settings)
    assert_same(state_of(run.folder)["method"], state_of(named_here.folder)["method"])
    assert methods.settings_class("stubs:MoCoV3") is methods.OutsideSettings  # a class, no module


@pytest.mark.parametrize(
    ("allowed", "imported"),
    [
        ((), ()),
        (("mine",), ("mine", "mine.deep", "mine.deeper", "mine.deep.er")),
        (("mine.deep",), ("mine.deep", "mine.deep.er")),
        (("mine.", "min", "Mine", "ine", "deep", ""), ()),
        (("other", "mine_too"), ("mine_too",)),
    ],
)
def test_allowed_are_a_module_and_what_lies_below_it(tmp_path, monkeypatch, allowed, imported):
    """And no module whose name only begins alike: each leaves a mark when it is imported."""
    marked = ["mine", "minefield", "mine_too", "mine.deep", "mine.deeper", "mine.deep.er"]
    for name in marked:
        package = tmp_path.joinpath(*name.split("."))
        package.mkdir()
        package.joinpath("__init__.py").write_text("from stubs import SimSiam as It\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        methods.allow(allowed)
        for name in marked:
            kept = methods.settings_class(f"{name}:It") is methods.OutsideSettings
            assert kept == (name not in imported), name
            assert kept == (f"{name}:It" not in methods._outside)
            assert name in sys.modules or kept
        below = {".".join(name.split(".")[:depth]) for name in imported for depth in (1, 2, 3)}
        assert {name for name in marked if name in sys.modules} == below
        methods.allow(["other"])  # by another call: what the first one allowed is past
        assert not any(methods.may_import(f"{name}:It") for name in marked)
    finally:
        for name in marked:
            sys.modules.pop(name, None)


def test_a_method_that_does_not_declare_its_leak_is_refused():
    class Silent(stubs.SimSiam):
        leak = None

    methods.use("stubs:Silent", Silent)
    settings = replace(recipes.mocov2_cifar10(), SMALL | {"method.name": "stubs:Silent"})
    with pytest.raises(UserError, match="stubs:Silent does not say .*leak"):
        build.build_method(settings, resolve(settings, 640))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:Method", "no_such_module:Method cannot be imported: No module"),
        ("stubs:Nothing", "stubs:Nothing cannot be imported: .*no attribute"),
        ("stubs:Queue", "stubs:Queue brings no settings"),
    ],
)
def test_a_class_that_cannot_be_used_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        mocokit.pretrain("demo", settings={"method.name": name})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"leak": KeyGroups()}, "has KeyGroups.. as its `leak`, and no regrouped"),
        ({"parameter_groups": lambda self: []}, "must hold each parameter that requires"),
        (
            {"parameter_groups": lambda self: [{"params": self.trained(), "wd": 0}]},
            "has the unknown wd",
        ),
        ({"views": (stubs.ViewRole("a"), stubs.ViewRole("a"))}, "two of its views the same name"),
    ],
)
def test_a_broken_contract_is_refused_at_build(changes, sentence):
    broken = type("Broken", (stubs.SimSiam,), {**changes, "__module__": "stubs"})
    methods.use("stubs:Broken", broken)
    settings = replace(recipes.mocov2_cifar10(), SMALL | {"method.name": "stubs:Broken"})
    with pytest.raises(UserError, match=f"stubs:Broken.*{sentence}"):
        build.build_method(settings, resolve(settings, 640))
        build.view_specs(settings)


def test_reserved_metrics_are_refused(toy_npz, tmp_path, monkeypatch):
    forward = stubs.SimSiam.forward
    monkeypatch.setattr(
        stubs.SimSiam,
        "forward",
        lambda *given: forward(*given)._replace(metrics={"epoch": torch.zeros(())}),
    )
    with pytest.raises(ValueError, match="SimSiam names a metric epoch: reserved"):
        trained(stubs.SimSiam, toy_npz, tmp_path / "run")


def test_groups_are_those_of_the_settings_whatever_a_method_does(toy_npz, tmp_path):
    """SimSiam sets no groups itself, and its predictor has a batch norm of its own."""
    seen = []

    class Watching(stubs.SimSiam):
        def __init__(self, encoder, dim):
            super().__init__(encoder, dim)
            self.predictor[1] = torch.nn.BatchNorm1d(16)

        def forward(self, views, index, step):
            norms = [m for m in self.modules() if "BatchNorm" in type(m).__name__]
            seen.append({(type(m).__name__, m.groups) for m in norms})
            return super().forward(views, index, step)

    settings = QUICK | SMALL | {"train.batch_size": 32, "method.groups": 4}
    mocokit.pretrain("demo", toy_npz, tmp_path, epochs=1, settings=settings, method=Watching)
    assert seen and all(found == {("GroupedBatchNorm2d", (8, 8, 8, 8))} for found in seen)


def test_a_method_with_momentum_of_its_own_is_repeated_from_its_config(toy_npz, tmp_path):
    small = {"net.backbone": "resnet_tiny", "train.batch_size": 32, "method.momentum": 0.5}

    class Plain(stubs.MoCoV3):
        def __init__(self, encoder, dim, temperature, momentum):
            encoder.backbone.patch_embed = torch.nn.Identity()
            super().__init__(encoder, dim, temperature, momentum)

    given = {"epochs": 1, "method": Plain}
    first = mocokit.pretrain("demo", toy_npz, tmp_path / "a", settings=QUICK | small, **given)
    config = first.folder / "config.yaml"
    assert "momentum: 0.5" in config.read_text() and "temperature: 0.2" in config.read_text()
    again = mocokit.pretrain(str(config), out=tmp_path / "b", method=Plain)
    assert_same(state_of(first.folder)["method"], state_of(again.folder)["method"])


def test_check_draws_the_views_of_a_method_that_it_may_import(toy_npz, tmp_path):
    from mocokit.check import check

    changes = {**SMALL, "method.name": "stubs:MultiCrop"}
    sheet = check("mocov2_cifar10", toy_npz, tmp_path / "views.png", changes, images=2, quick=True)
    with Image.open(sheet) as picture:
        assert picture.width > 2000
    run = trained(stubs.SimSiam, toy_npz, tmp_path / "run")
    methods._outside.clear()
    config = str(run.folder / "config.yaml")
    with pytest.raises(UserError, match="--allow-import stubs"):
        check(config, None, tmp_path / "again.png")
    check(config, None, tmp_path / "again.png", quick=True, allow_import=["stubs"])
    assert (tmp_path / "again.png").is_file()
