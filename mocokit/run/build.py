"""From settings to objects: the only place where constructors meet the settings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mocokit.data.loader import Loader
from mocokit.data.source import Source, Splits
from mocokit.engine.due import Due
from mocokit.engine.hardware import room_for
from mocokit.engine.optim import Schedule, build_optimizer
from mocokit.engine.runtime import (
    autocast,
    default_precision,
    default_threads,
    default_workers,
)
from mocokit.engine.world import World
from mocokit.errors import UserError
from mocokit.health.knn_monitor import KnnMonitor
from mocokit.health.measures import HealthMonitor
from mocokit.methods.method import Context, KeyGroups, Method, NoLeak, ParameterGroup
from mocokit.methods.processes import rank_and_world
from mocokit.nets.batchnorm import group_sizes, share_of_groups, use_groups, use_whole
from mocokit.nets.heads import build_head
from mocokit.settings import get, replace
from mocokit.settings.methods import MethodSettings, implementation
from mocokit.settings.schema import Settings
from mocokit.settings.sizes import Resolved, check_processes, count_groups, count_shares
from mocokit.views.fused import can_compile
from mocokit.views.params import ViewSpec, canvas_bound
from mocokit.weights.encoder import build_encoder, view_spec


@dataclass(frozen=True)
class Parts:
    """All that the loop works with."""

    method: Method
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    specs: dict[str, ViewSpec]  # of the method's views, by name


def settle(settings: Settings, device: torch.device, stored: Settings | None) -> Settings:
    """Replace every `auto` of the engine: by what the run to resume has, or by the device's."""
    defaults: dict[str, Callable[[], Any]] = {
        "engine.precision": lambda: default_precision(device),
        "engine.memory_format": lambda: "channels_last",
        "engine.compile": lambda: device.type == "cuda" and can_compile(),
        "engine.threads": default_threads,
        "engine.cuda_graphs": lambda: device.type == "cuda" and rank_and_world()[1] == 1,
    }
    changes = {}
    for path, default in defaults.items():
        if get(settings, path) == "auto":
            # CUDA graphs change no number, and do not suit several processes.
            fresh = path == "engine.cuda_graphs"
            before = "auto" if stored is None or fresh else get(stored, path)
            changes[path] = default() if before == "auto" else before  # 0.1 stored fewer settings
    if stored is not None and settings.views.canvas is None:
        changes["views.canvas"] = stored.views.canvas  # of 0.1, which no recipe states
    return replace(settings, changes)


def build_schedule(settings: Settings, effect: Resolved) -> Schedule:
    """The learning rate of every step."""
    optim = settings.optim
    return Schedule(
        lr=effect.lr,
        kind=optim.schedule,
        per=optim.per,
        epochs=settings.train.epochs,
        steps_per_epoch=effect.steps_per_epoch,
        first_epoch=optim.first_epoch,
        drops=optim.drops,
        drop_factor=optim.drop_factor,
        warmup_epochs=optim.warmup_epochs,
    )


def build_parts(settings: Settings, effect: Resolved, device: torch.device) -> Parts:
    """The method on its device, its optimiser and schedule, as they are before the first step."""
    optim = settings.optim
    method = build_method(settings, effect).to(device)
    if settings.engine.memory_format == "channels_last":
        method = method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.engine.compile:
        # Both encoders share one count of graphs: with and without gradient, a partial last batch.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        graphs = device.type == "cuda" and settings.engine.cuda_graphs is True
        for part in method.compiled:
            # Shapes learnt on the way would make a kernel depend on what was seen before.
            part.compile(dynamic=False, options={"triton.cudagraphs": graphs})
    optimizer = build_optimizer(
        optim.name,
        method.parameter_groups(),
        effect.lr,
        optim.momentum,
        optim.weight_decay,
        optim.trust,
    )
    half = settings.engine.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    schedule = build_schedule(settings, effect)
    return Parts(method, optimizer, schedule, scaler, view_specs(settings))


def view_specs(settings: Settings) -> dict[str, ViewSpec]:
    """How each of the method's views is made, by name: `views`, with the role's own changes."""
    roles = method_class(settings.method).roles(settings.method)
    plain = replace(settings, {"monitor.resize": None})
    if len({role.name for role in roles}) < len(roles):
        raise UserError(f"method {settings.method.name} gives two of its views the same name")
    return {
        # A role's size may exceed the scoring view's, of which a role has none.
        role.name: view_spec(replace(plain, {f"views.{k}": v for k, v in role.changes.items()}))
        for role in roles
    }


def largest_canvas(specs: Iterable[ViewSpec]) -> int:
    """The short side in pixels beyond which no view gains from a canvas."""
    return max(canvas_bound(spec) for spec in specs)


def build_loader(
    settings: Settings,
    source: Source,
    bound: int,
    world: World,
    device: torch.device,
    start_step: int,
    known_bad: Callable[[int], NDArray[np.int64]],
    tell: Callable[[str], None] = lambda text: None,
) -> Loader:
    """This process's share of every global batch, from `start_step` on: whole groups of images.

    `bound`: the short side in pixels that canvases are reduced to.
    """
    shares_of = partial(count_shares, settings)
    last = len(source) % settings.train.batch_size
    check_processes(settings, world.size)
    if settings.data.last == "keep" and last and world.size > shares_of(last):
        raise UserError(
            f"data.last=keep leaves a last batch of {last} images, too few for {world.size} "
            "processes; set data.last=drop"
        )

    def share(images: int) -> slice:
        sizes = group_sizes(images, shares_of(images))
        mine = share_of_groups(len(sizes), world.rank, world.size)
        start = sum(sizes[: mine.start])
        return slice(start, start + sum(sizes[mine]))

    return Loader(
        source,
        seed=settings.seed,
        batch_size=settings.train.batch_size,
        epochs=settings.train.epochs,
        last=settings.data.last,
        bound=bound,
        workers=count_workers(settings, device),
        share=share,
        start_step=start_step,
        known_bad=known_bad,
        log=tell,
        pin=device.type == "cuda",
    )


def share_of_process(settings: Settings, world: World, images: int) -> float:
    """This process's part of a batch: by batch-norm groups, or without them by images."""
    shares = count_shares(settings, images)
    return len(range(shares)[share_of_groups(shares, world.rank, world.size)]) / shares


def count_workers(settings: Settings, device: torch.device) -> int:
    """Decoding processes: as asked, or one beside a CPU that trains, several beside a GPU."""
    if settings.data.workers != "auto":
        return settings.data.workers
    return default_workers(device)


def build_due(settings: Settings, effect: Resolved, world: World) -> Due:
    """When to record, score and save."""
    return Due(
        effect.total_steps,
        effect.steps_per_epoch,
        log_steps=settings.log.every_steps,
        monitor_epochs=settings.monitor.every_epochs,
        save_minutes=settings.save.minutes,
        save_epochs=settings.save.every_epochs,
        save_steps=settings.save.every_steps,
        milestone_epochs=settings.save.milestone_epochs,
        compare_steps=settings.engine.compare_steps,
        world=world.size,
    )


def build_monitor(settings: Settings, splits: Splits, device: torch.device) -> KnnMonitor | None:
    """The kNN monitor, if the training images have labels of several classes."""
    if splits.train.labels is None:
        return None
    monitor = _monitor(settings, splits, device)
    return None if monitor.lacks else monitor


def unscored(settings: Settings, splits: Splits, device: torch.device) -> list[str]:
    """Why a run has no kNN scores, as a notice; none where it has."""
    if splits.train.labels is None:
        reason = f"{splits.train.name} has no labels"
    else:
        reason = _monitor(settings, splits, device).lacks
    return [f"no kNN scores are taken: {reason}"] if reason else []


def _monitor(settings: Settings, splits: Splits, device: torch.device) -> KnnMonitor:
    return KnnMonitor(
        splits.train,
        splits.validation,
        view_spec(settings),
        device,
        k=settings.monitor.k,
        temperature=settings.monitor.temperature,
        bank=settings.monitor.bank,
        seed=settings.seed,
        workers=count_workers(settings, device),
        precision=partial(autocast, device, settings.engine.precision),
    )


def build_health(settings: Settings, splits: Splits, device: torch.device) -> HealthMonitor:
    """What measures health without labels."""
    return HealthMonitor(
        splits.train,
        view_spec(settings),
        device,
        images=settings.monitor.images,
        seed=settings.seed,
        workers=count_workers(settings, device),
        precision=partial(autocast, device, settings.engine.precision),
    )


def build_method(settings: Settings, effect: Resolved) -> Method:
    """The method that the settings name, on the CPU."""
    encoder = build_encoder(settings)
    context = Context(
        encoder,
        dim=settings.net.dim,
        images=effect.images,
        batch_size=settings.train.batch_size,
        count_groups=partial(count_groups, settings),
        predictor=partial(_predictor, settings, encoder.num_features),
        micro_batch=settings.train.micro_batch,
    )
    table = settings.method.table_bytes(effect.images, settings.net.dim)
    with room_for(f"method {settings.method.name}, by its sizes and net.dim,", table):
        method = method_class(settings.method).build(settings.method, context)
    _check(method, settings.method.name)
    use_groups(method, settings.method.group_size)  # what it made itself, such as a predictor
    if settings.method.batch_norm == "whole":
        use_whole(method)
    return method


def _check(method: Method, name: str) -> None:
    """Raise UserError where a method does not keep its contract."""
    if not isinstance(method.leak, KeyGroups | NoLeak):
        raise UserError(
            f"method {name} does not say how batch statistics could leak: its `leak` must be "
            "KeyGroups() or NoLeak(reason)"
        )
    if isinstance(method.leak, KeyGroups) and type(method).regrouped is Method.regrouped:
        raise UserError(f"method {name} has KeyGroups() as its `leak`, and no regrouped()")
    groups = method.parameter_groups()
    known = {"params", *ParameterGroup.__optional_keys__}
    if unknown := sorted({key for group in groups for key in group} - known):
        raise UserError(f"method {name}: parameter_groups() has the unknown {', '.join(unknown)}")
    listed = sorted(id(p) for group in groups for p in group["params"])
    if listed != sorted(map(id, method.trained())):
        raise UserError(
            f"method {name}: parameter_groups() must hold each parameter that requires a gradient, "
            "once, and no other"
        )


def method_class(settings: MethodSettings) -> type[Method]:
    """The class that implements a method, built-in or not. Raises UserError."""
    found = implementation(settings)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method {settings.name} is no subclass of mocokit.methods.method.Method")
    return found


def _predictor(settings: Settings, features: int) -> nn.Module | None:
    net = settings.net
    if not net.predictor:
        return None
    predictor = build_head("mlp_bn", net.dim, net.hidden or features, net.dim)
    return use_groups(predictor, settings.method.group_size)
