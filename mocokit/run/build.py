"""From settings to objects: the only place where constructors meet the settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mocokit.data.loader import Loader
from mocokit.data.source import Source, Splits
from mocokit.engine.due import Due
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
from mocokit.methods.losses import LOSSES, InfoNCE
from mocokit.methods.memorybank import MemoryBank
from mocokit.methods.method import Method
from mocokit.methods.moco import MoCo
from mocokit.methods.processes import rank_and_world
from mocokit.methods.simclr import SimCLR
from mocokit.nets.batchnorm import group_sizes, share_of_groups, use_groups, use_whole
from mocokit.nets.heads import Encoder, build_head
from mocokit.settings import get, replace
from mocokit.settings.schema import Settings
from mocokit.settings.sizes import Resolved, count_groups, count_shares
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
    spec: ViewSpec


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
            before = "auto" if stored is None else get(stored, path)
            changes[path] = default() if before == "auto" else before  # 0.1 stored fewer settings
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
        for part in method.children():
            if isinstance(part, Encoder):
                # Shapes learnt on the way would make a kernel depend on what was seen before.
                part.compile(dynamic=False, options={"triton.cudagraphs": graphs})
    optimizer = build_optimizer(
        optim.name, method.trained(), effect.lr, optim.momentum, optim.weight_decay, optim.trust
    )
    half = settings.engine.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    schedule = build_schedule(settings, effect)
    return Parts(method, optimizer, schedule, scaler, view_spec(settings))


def build_loader(
    settings: Settings,
    source: Source,
    world: World,
    device: torch.device,
    start_step: int,
    known_bad: Callable[[int], NDArray[np.int64]],
    tell: Callable[[str], None] = lambda text: None,
) -> Loader:
    """This process's share of every global batch, from `start_step` on: whole groups of images."""
    shares_of = partial(count_shares, settings)
    last = len(source) % settings.train.batch_size
    if world.size > shares_of(settings.train.batch_size):
        raise UserError(
            f"{world.size} processes for {shares_of(settings.train.batch_size)} batch-norm groups; "
            "a process holds whole groups, so start fewer, or lower method.group_size"
        )
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
        bound=canvas_bound(view_spec(settings)),
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
    """The kNN monitor, if the training images have labels."""
    if splits.train.labels is None:
        return None
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
    """The mechanism that the settings name, on the CPU."""
    build = {"moco": _moco, "simclr": _simclr, "memorybank": _memorybank}[settings.method.name]
    method = build(settings, effect)
    if settings.method.batch_norm == "whole":
        use_whole(method)
    return method


def _moco(settings: Settings, effect: Resolved) -> Method:
    method, net = settings.method, settings.net
    encoder = build_encoder(settings)
    predictor = None
    if net.predictor:
        width = net.hidden or encoder.num_features
        predictor = use_groups(build_head("mlp_bn", net.dim, width, net.dim), method.group_size)
    assert method.queue_size is not None and effect.key_momentum is not None
    return MoCo(
        encoder,
        loss=LOSSES[method.loss](method.temperature),
        dim=net.dim,
        queue_size=method.queue_size,
        momentum=effect.key_momentum,
        momentum_to_one=method.momentum_schedule == "cosine",
        count_groups=partial(count_groups, settings),
        predictor=predictor,
        whole=method.batch_norm == "whole",
        shuffle=method.shuffle,
        symmetric=method.symmetric,
        enqueue=method.enqueue,
        micro_batch=settings.train.micro_batch,
        chunk=method.chunk,
    )


def _simclr(settings: Settings, effect: Resolved) -> Method:
    method = settings.method
    return SimCLR(
        build_encoder(settings),
        loss=LOSSES[method.loss](method.temperature),
        count_groups=partial(count_groups, settings),
        batch_size=settings.train.batch_size,
        whole=method.batch_norm == "whole",
        shuffle=method.shuffle,
        symmetric=method.symmetric,
        micro_batch=settings.train.micro_batch,
        chunk=method.chunk,
    )


def _memorybank(settings: Settings, effect: Resolved) -> Method:
    method = settings.method
    return MemoryBank(
        build_encoder(settings),
        loss=LOSSES.get(method.loss, InfoNCE)(method.temperature),
        images=effect.images,
        dim=settings.net.dim,
        negatives=method.bank_negatives,
        momentum=method.bank_momentum,
        count_groups=partial(count_groups, settings),
        noise=method.loss == "nce",
        whole=method.batch_norm == "whole",
        micro_batch=settings.train.micro_batch,
        chunk=method.chunk,
    )
