"""Every setting is effective: a value that is not the default arrives where it is used.

The parts are tested elsewhere with arguments given by hand, and settings by their values. Here one
setting at a time is changed, and what `pretrain` builds from it is looked at. A new setting without
a row fails `test_every_setting_has_a_row`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from built import BATCH, IMAGES, Built
from PIL import Image

import mocokit
from mocokit.engine import checkpoint
from mocokit.engine.optim import LARS
from mocokit.errors import UserError
from mocokit.methods import losses
from mocokit.methods.memorybank import MemoryBank
from mocokit.methods.method import Step
from mocokit.methods.moco import MoCo
from mocokit.methods.simclr import SimCLR
from mocokit.nets import batchnorm
from mocokit.run import build, open as open_
from mocokit.run.open import RunRequest, decide
from mocokit.settings import fields, get, is_incidental, replace
from mocokit.settings.methods import BUILT_IN
from mocokit.settings.schema import Settings

pytestmark = pytest.mark.usefixtures("no_scores")

SIMCLR, BANK = {"method.name": "simclr"}, {"method.name": "memorybank"}
ALL_OPS = ("crop", "flip", "jitter", "grayscale", "blur", "randaugment", "solarize")
EVERY_OP = {"views.order": ALL_OPS, "views.solarize_probability": 0.5}
LARS_ = {"optim.name": "lars"}
STEPS = {"optim.schedule": "steps", "optim.drops": (0.5,)}


class Wire(NamedTuple):
    """One setting, changed alone beside `base`; `seen` gives what must come of it."""

    path: str
    value: Any
    seen: Callable[[Built], Any]
    expected: Any
    base: Mapping[str, Any] = MappingProxyType({})

    def __str__(self):
        return "-".join([self.path, *map(str, self.base.values())])[:60]


def norms(module):
    return [m for m in module.modules() if isinstance(m, batchnorm._GroupedBatchNorm)]


def layers(module):
    return [type(layer).__name__ for layer in module]


def saved(built):
    """What RunState.save hands to the pruning: how many are kept, and which for good."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *rest: None)
        patch.setattr(checkpoint, "prune", lambda folder, *rest, **named: given.extend(rest))
        built.run.save()
    return given


def opened(built):
    """The arguments with which `pretrain` opens the data."""
    given = []

    class Enough(Exception):
        pass

    def watched(path, labels, root, counting):
        given.extend([path, labels, root])
        raise Enough

    stated = {p: get(built.settings, p) for p in built.stated if p not in ("recipe",)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr("mocokit.train.open_data", watched)
        mocokit.pretrain("demo", settings=stated)
    return given


def prepared(built):
    """The arguments with which torch's global options are set: threads, deterministic."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_, "prepare", lambda device, *rest: given.extend(rest))
        assert built.run
    return given


def compiled(built):
    """The compile options of each encoder, without compiling. Any graphs are a GPU's."""
    given = []
    settings, effect = built.settings, built.run.effect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda self, *a, **k: self)
        patch.setattr(torch.nn.Module, "compile", lambda self, **options: given.append(options))
        patch.setattr(torch.amp, "GradScaler", lambda device, enabled: None)
        build.build_parts(settings, effect, SimpleNamespace(type="cuda"))
    return given


def graphs(flag):
    return [{"dynamic": False, "options": {"triton.cudagraphs": flag}}] * 2


def named_folder(built):
    request = RunRequest(built.settings, built.stated, built.splits, torch.device("cpu"), False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(built.out.parent)
        return decide(request, None, False).folder.path.name


def autocast_of(monitor):
    with monitor.precision():
        return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")


def refused(built):
    with pytest.raises(UserError) as caught:
        assert built.run
    return str(caught.value).split(":")[0]


def refused_or_device(built):
    return str(built.run.device) if built.settings.engine.device == "cpu" else refused(built)


def chunks(built):
    """The chunks in which a forward compares queries with negatives."""
    found = set()
    compare = losses.Negatives.compare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            losses.Negatives,
            "compare",
            lambda self, *rest: found.add(self.chunk) or compare(self, *rest),
        )
        forward(built)
    return found


def forward(built, number=0):
    run = built.run
    batch = built.loader.batch_at(number)
    run.set_groups(len(batch.index))
    views = run.views(number, batch)
    return run.parts.method.train()(
        views, torch.from_numpy(batch.index), Step(built.settings.seed, number, len(batch.index))
    )


def groups_of(built):
    """Of a batch: as resolved, as the method counts, and as the layers are told."""
    built.run.set_groups(BATCH)
    told = {n.groups if n.groups is None else len(n.groups) for n in norms(built.method.encoder)}
    return built.run.effect.groups, built.method.count_groups(BATCH), told


def loss_of(built):
    loss = built.method.loss
    return type(loss), loss.temperature


def by_method(path, value, seen, expected, methods=("moco", "simclr", "memorybank"), base=None):
    return [
        Wire(path, value, seen, expected, {"method.name": name, **(base or {})}) for name in methods
    ]


VIEWS = {
    "size": (24, {}),
    "order": (("crop", "flip"), {}),
    "crop_area": ((0.5, 0.9), {}),
    "crop_ratio": ((0.5, 1.5), {}),
    "interpolation": ("bicubic", {}),
    "jitter_probability": (0.3, {}),
    "brightness": (0.9, {}),
    "contrast": (0.9, {}),
    "saturation": (0.9, {}),
    "hue": (0.5, {}),
    "grayscale_probability": (0.9, {}),
    "blur_probability": ((1.0, 0.2), {}),
    "blur_sigma": ((1.0, 1.5), {}),
    "solarize_probability": ((0.1, 0.9), {}),
    "randaugment": ((3, 4.0, 0.0), {}),
    "flip_probability": (0.1, {}),
    "mean": ((0.1, 0.2, 0.3), {}),
    "std": ((0.3, 0.2, 0.1), {}),
    "canvas": (18, {}),
}


def in_all_specs(name):
    def seen(built):
        specs = [*built.specs.values(), built.monitor.spec, built.health.spec]
        assert len(specs) == 4
        (found,) = {getattr(spec, name) for spec in specs}
        return found

    return seen


def first_views(built):
    """Pixels of all views of the first batch."""
    return [
        checkpoint.digest({"": view[:]}) for view in built.run.views(0, built.loader.batch_at(0))
    ]


def order_of(built):
    return built.loader.batch_at(4).index.tolist()


def epoch_order(seed):
    """Images of the first step of epoch 1."""
    return mocokit.chance.Order(seed, 1, IMAGES)[np.arange(BATCH)].tolist()


WIRES = [
    Wire("recipe", "mine", named_folder, "mine-small-001"),
    Wire("seed", 5, order_of, epoch_order(5)),
    Wire("seed", 5, lambda b: b.loader._reader.seed, 5),
    Wire("data.path", "/usr", lambda b: opened(b)[0], "/usr"),
    Wire("data.labels", "none", lambda b: opened(b)[1], "none"),
    Wire("data.root", "/some/where", lambda b: opened(b)[2], "/some/where"),
    Wire("data.last", "keep", lambda b: (b.run.effect.steps_per_epoch, len(b.loader)), (5, 10)),
    Wire(
        "data.workers",
        3,
        lambda b: (b.monitor.workers, b.health.workers, b.loader.workers),
        (3, 3, 3),
        {"data.labels": "folders"},
    ),
    Wire("data.bad_share", 0.5, lambda b: b.run.bad.limit, IMAGES // 2),
    *(
        Wire(f"views.{name}", value, in_all_specs(name), value, base)
        for name, (value, base) in VIEWS.items()
    ),
    Wire("net.backbone", "resnet18", lambda b: b.method.encoder.num_features, 512),
    Wire(
        "net.stem",
        "imagenet",
        lambda b: b.method.encoder.backbone.conv1.kernel_size,
        (7, 7),
        {"net.backbone": "resnet18"},
    ),
    Wire(
        "net.zero_init_last",
        True,
        lambda b: float(b.method.encoder.backbone.layer1[0].bn2.weight.detach().abs().max()),
        0.0,
        {"net.backbone": "resnet18"},
    ),
    Wire("net.head", "linear", lambda b: layers(b.method.encoder.head), ["Linear"]),
    Wire(
        "net.head",
        "mlp_bn",
        lambda b: layers(b.method.encoder.head),
        ["Linear", "GroupedBatchNorm2d", "ReLU", "Linear"],
    ),
    Wire(
        "net.predictor",
        True,
        lambda b: type(b.method.predictor).__name__,
        "Sequential",
    ),
    Wire("net.hidden", 24, lambda b: b.method.encoder.head[0].out_features, 24),
    Wire(
        "net.hidden", 24, lambda b: b.method.predictor[0].out_features, 24, {"net.predictor": True}
    ),
    Wire("net.dim", 12, lambda b: b.method.encoder.head[-1].out_features, 12),
    Wire("net.dim", 12, lambda b: tuple(b.method.queue.rows.shape), (48, 12)),
    Wire("net.dim", 12, lambda b: tuple(b.method.bank.rows.shape), (IMAGES, 12), BANK),
    Wire("net.dim", 12, lambda b: b.method.predictor[-1].out_features, 12, {"net.predictor": True}),
    Wire("net.calibrate_head", True, lambda b: calibrations(b), 1),
    Wire("optim.name", "adamw", lambda b: type(b.optimizer), torch.optim.AdamW),
    Wire("optim.name", "lars", lambda b: type(b.optimizer), LARS),
    Wire("optim.lr", 0.5, lambda b: b.schedule.lr, 0.5 * BATCH / 256),
    Wire("optim.lr", 0.5, lambda b: b.group["lr"], 0.5 * BATCH / 256),
    Wire("optim.lr_batch", 64, lambda b: b.schedule.lr, 0.03 * BATCH / 64),
    Wire("optim.scale", "none", lambda b: b.schedule.lr, 0.03),
    Wire("optim.scale", "sqrt", lambda b: b.schedule.lr, 0.03 * (BATCH / 256) ** 0.5),
    Wire("optim.momentum", 0.5, lambda b: b.group["momentum"], 0.5),
    Wire("optim.momentum", 0.5, lambda b: b.group["momentum"], 0.5, LARS_),
    Wire("optim.weight_decay", 0.2, lambda b: b.group["weight_decay"], 0.2),
    Wire("optim.weight_decay", 0.2, lambda b: b.group["weight_decay"], 0.2, LARS_),
    Wire(
        "optim.weight_decay", 0.2, lambda b: b.group["weight_decay"], 0.2, {"optim.name": "adamw"}
    ),
    Wire("optim.trust", 0.01, lambda b: b.group["trust"], 0.01, LARS_),
    Wire("optim.schedule", "steps", lambda b: b.schedule.kind, "steps"),
    Wire("optim.per", "step", lambda b: b.schedule.per, "step"),
    Wire("optim.first_epoch", 1, lambda b: b.schedule.first_epoch, 1),
    Wire("optim.drops", (0.25, 0.5), lambda b: b.schedule.drops, (0.25, 0.5), STEPS),
    Wire("optim.drop_factor", 0.5, lambda b: b.schedule(4) / b.schedule(0), 0.5, STEPS),
    Wire("optim.warmup_epochs", 0.5, lambda b: b.schedule.warmup_epochs, 0.5),
    Wire("train.epochs", 3, lambda b: b.schedule.epochs, 3),
    Wire("train.epochs", 3, lambda b: (b.due.total_steps, b.loader.total_steps), (12, 12)),
    Wire("train.batch_size", 16, lambda b: len(b.loader.batch_at(0).index), 16),
    Wire(
        "train.batch_size",
        16,
        lambda b: (b.due.steps_per_epoch, b.schedule.steps_per_epoch),
        (8, 8),
    ),
    Wire("train.batch_size", 16, lambda b: b.method.batch_size, 16, SIMCLR),
    *by_method("train.micro_batch", 8, lambda b: b.method.micro_batch, 8),
    Wire("engine.device", "cuda:7", refused_or_device, "device cuda"),
    Wire("engine.precision", "float16", lambda b: b.run.parts.scaler.is_enabled(), True),
    Wire("engine.precision", "bfloat16", lambda b: autocast_of(b.monitor), torch.bfloat16),
    Wire("engine.precision", "bfloat16", lambda b: autocast_of(b.health), torch.bfloat16),
    Wire("engine.precision", "bfloat16", lambda b: autocast_in_loop(b), torch.bfloat16),
    Wire(
        "engine.memory_format",
        "channels_last",
        lambda b: b.method.encoder.backbone.stages[1].conv1.weight.is_contiguous(
            memory_format=torch.channels_last
        ),
        True,
    ),
    Wire("engine.compile", True, compiled, graphs(False)),
    Wire("engine.cuda_graphs", True, compiled, graphs(True), {"engine.compile": True}),
    Wire("engine.deterministic", True, lambda b: prepared(b)[1], True),
    Wire("engine.threads", 3, lambda b: prepared(b)[0], 3),
    Wire("engine.compare_steps", 7, lambda b: b.due.compare_steps, 7),
    Wire("save.minutes", 0.5, lambda b: b.due.save_seconds, 30.0),
    Wire("save.every_epochs", 2, lambda b: b.due.save_epochs, 2),
    Wire("save.every_steps", 3, lambda b: b.due.save_steps, 3),
    Wire("save.keep", 5, lambda b: saved(b)[0], 5),
    Wire("save.milestone_epochs", 1, lambda b: b.due.milestone_epochs, 1),
    Wire("save.milestone_epochs", 1, lambda b: saved(b)[1], frozenset({4, 8})),
    Wire("save.milestone_epochs", 2, lambda b: saved(b)[1], frozenset({8})),
    Wire("log.every_steps", 3, lambda b: b.due.log_steps, 3),
    Wire("monitor.every_epochs", 1, lambda b: b.due.monitor_epochs, 1),
    Wire("monitor.images", 50, lambda b: len(b.health.numbers), 50),
    Wire("monitor.k", 7, lambda b: b.monitor.k, 7),
    Wire("monitor.temperature", 0.3, lambda b: b.monitor.temperature, 0.3),
    Wire("monitor.bank", 50, lambda b: len(b.monitor.bank_numbers), 50),
    Wire("monitor.resize", 20, lambda b: b.monitor.spec.resize, 20),
    Wire("monitor.centre", 0.5, lambda b: b.monitor.spec.resize, 32),
    Wire("method.name", "simclr", lambda b: type(b.method), SimCLR, {"method.name": "moco"}),
    Wire("method.name", "memorybank", lambda b: type(b.method), MemoryBank, SIMCLR),
    Wire("method.name", "moco", lambda b: type(b.method), MoCo, BANK),
    *by_method("method.batch_norm", "whole", lambda b: b.method.whole, True),
    *by_method("method.batch_norm", "whole", lambda b: {n.whole for n in norms(b.method)}, {True}),
    *by_method("method.batch_norm", "whole", groups_of, (1, 1, {None})),
    *by_method("method.group_size", 16, groups_of, (2, 2, {2})),
    *by_method("method.group_size", 16, lambda b: {n.group_size for n in norms(b.method)}, {16}),
    Wire(
        "method.group_size",
        16,
        lambda b: {n.group_size for n in norms(b.method.predictor)},
        {16},
        {"net.predictor": True},
    ),
    Wire(
        "method.group_size",
        16,
        lambda b: {n.group_size for n in norms(b.method.encoder.head)},
        {16},
        {"net.head": "mlp_bn"},
    ),
    *by_method("method.groups", 3, groups_of, (3, 3, {3})),
    *by_method("method.loss", "dcl", loss_of, (losses.DCL, 0.2)),
    *by_method("method.loss", "dclw", loss_of, (losses.DCLW, 0.2)),
    *by_method("method.loss", "align_uniform", loss_of, (losses.AlignUniform, 0.2)),
    *by_method("method.loss", "dual_temperature", loss_of, (losses.DualTemperature, 0.2)),
    Wire("method.loss", "nce", lambda b: b.method.noise, True, BANK | {"method.bank_negatives": 9}),
    *by_method("method.temperature", 0.4, loss_of, (losses.InfoNCE, 0.4)),
    Wire(
        "method.temperature",
        0.4,
        loss_of,
        (losses.InfoNCE, 0.4),
        BANK | {"method.loss": "nce", "method.bank_negatives": 9},
    ),
    *by_method("method.chunk", 5, chunks, {5}),
    Wire("method.chunk", 5, chunks, {5}, BANK | {"method.bank_negatives": 9}),
    Wire("method.chunk", 5, chunks, {5}, SIMCLR | {"method.symmetric": True}),
    Wire("method.queue_size", 40, lambda b: len(b.method.queue.rows), 40),
    Wire("method.momentum", 0.5, lambda b: b.method.momentum, 0.5 ** (BATCH / 256)),
    Wire("method.momentum_batch", 16, lambda b: b.method.momentum, 0.999**2),
    Wire("method.momentum_batch", None, lambda b: b.method.momentum, 0.999),
    Wire("method.momentum_schedule", "cosine", lambda b: b.method.momentum_to_one, True),
    *by_method("method.symmetric", True, lambda b: b.method.symmetric, True, ("moco", "simclr")),
    Wire(
        "method.symmetric",
        True,
        lambda b: (b.method.queue.keys_per_image, len(forward(b).keep)),
        (2, 2 * BATCH),
    ),
    Wire("method.enqueue", "one", lambda b: b.method.enqueue, "one", {"method.symmetric": True}),
    Wire(
        "method.enqueue",
        "one",
        lambda b: (b.method.queue.keys_per_image, len(forward(b).keep)),
        (1, BATCH),
        {"method.symmetric": True},
    ),
    *by_method("method.shuffle", False, lambda b: b.method.shuffle, False, ("moco", "simclr")),
    Wire("method.bank_negatives", 9, lambda b: b.method.negatives, 9, BANK),
    Wire("method.bank_momentum", 0.9, lambda b: b.method.momentum, 0.9, BANK),
]


def calibrations(built):
    """How often a run scales its head's start."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mocokit.train.calibrate_on_first_group", found.append)
        built.trained()
    return len(found)


def autocast_in_loop(built):
    """The precision of the encoders in the loop."""
    found = set()
    whole = type(built.method).forward

    def watched(self, *rest):
        found.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return whole(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(built.method), "forward", watched)
        built.trained()
    (dtype,) = found
    return dtype


def paths():
    """Every setting of every built-in method."""
    found = {}
    for name in BUILT_IN:
        found |= dict(fields(replace(Settings(), {"method.name": name})))
    return found


def test_every_setting_has_a_row():
    of_extension = {"train.parent", "train.parent_weights"}  # they need a parent: test_extend.py
    assert {wire.path for wire in WIRES} == paths().keys() - of_extension
    assert {f"views.{name}" for name in VIEWS} == {p for p in paths() if p.startswith("views.")}


def test_every_method_has_a_row_for_its_own_settings():
    """A setting that several methods have is wired by each of them."""
    rows = {(wire.base.get("method.name", "moco"), wire.path) for wire in WIRES}
    of_method = {
        (name, path)
        for name in BUILT_IN
        for path, _ in fields(replace(Settings(), {"method.name": name}))
        if path.startswith("method.") and path != "method.name"
    }
    assert of_method <= rows


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_a_setting_arrives(small, tmp_path, wire):
    data = photos(tmp_path) if wire.path == "data.workers" else small
    before = wire.seen(Built(data, wire.base, tmp_path / "before"))
    after = wire.seen(Built(data, {**wire.base, wire.path: wire.value}, tmp_path / "after"))
    assert after == (
        pytest.approx(wire.expected, rel=1e-12)
        if isinstance(wire.expected, float)
        else wire.expected
    )
    assert before != wire.expected, "the row would pass without its setting"


def photos(folder):
    for number in range(IMAGES):
        place = folder / "photos" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number, 0, 0)).save(place / f"{number}.png")
    return folder / "photos"


def test_the_seed_arrives_everywhere(small, tmp_path):
    """In the images of kNN's bank and of health, the first weights, and each step's numbers."""
    seen = []
    for seed in (0, 5):
        built = Built(small, {"seed": seed, "monitor.bank": 40, "monitor.images": 40}, tmp_path)
        seen.append(
            [
                built.monitor.bank_numbers.tolist(),
                built.health.numbers.tolist(),
                built.method.encoder.head[0].weight.tolist(),
                built.method.queue.rows.tolist(),
                order_of(built),
                first_views(built),
            ]
        )
    assert all(a != b for a, b in zip(*seen, strict=True))


# What acts elsewhere than on the weights that are trained on a CPU: a GPU's settings, and which
# images are there. Those of `views` are seen in the pixels below.
NOT_IN_WEIGHTS = {
    "data.labels", "data.path", "data.root", "engine.device", "engine.memory_format",
    "engine.compile", "engine.cuda_graphs", "engine.deterministic", "engine.threads",
}  # fmt: skip
# Those that round sums in another order: their results are as near as float32 has them.
ROUNDED = {"train.micro_batch", "method.chunk"}
TINY = {"net.backbone": "resnet18", "train.epochs": 1, "views.size": 8}


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """What comes of eight steps on the same images under these changes; each is done once."""
    states = {}

    def state(changes):
        key = repr(sorted(changes.items()))
        if key not in states:
            out = tmp_path_factory.mktemp("run")
            data = small if changes.get("data.labels") != "folders" else photos(out)
            states[key] = Built(data, changes, out / "run").trained().state_dict()
        return states[key]

    return state


@pytest.mark.parametrize(
    "wire",
    {
        (wire.path, wire.base.get("method.name")): wire
        for wire in reversed(WIRES)
        if wire.path not in NOT_IN_WEIGHTS and not wire.path.startswith("views.")
    }.values(),
    ids=str,
)
def test_the_identity_changes_the_weights_and_nothing_else_does(trained, wire):
    base = wire.base
    if wire.path == "net.backbone" or "net.backbone" in base:  # a larger one
        base = base | {**TINY, "net.backbone": base.get("net.backbone", "resnet_tiny")}
    before, after = trained(base), trained({**base, wire.path: wire.value})
    same = checkpoint.digest(before) == checkpoint.digest(after)
    if wire.path in ROUNDED:
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, atol=2e-3, rtol=1e-3)
    else:
        assert same == is_incidental(paths()[wire.path])


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "canvas"])
def test_every_setting_of_views_changes_pixels(small, tmp_path, name):
    value, base = VIEWS[name]
    base = {**EVERY_OP, **base}
    pixels = [
        first_views(Built(small, changes, tmp_path))
        for changes in (base, {**base, f"views.{name}": value})
    ]
    assert len(pixels[0]) == 2
    assert all(a != b for a, b in zip(*pixels, strict=True)), "both views follow the settings"
