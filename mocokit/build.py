"""From settings to objects: the only place where constructors meet the settings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mocokit.chance import Slot
from mocokit.config import Settings
from mocokit.data.loader import Loader
from mocokit.data.source import Source, Splits
from mocokit.engine.due import Due
from mocokit.engine.optim import Schedule, build_optimizer
from mocokit.engine.runtime import (
    World,
    autocast,
    default_precision,
    default_threads,
    seed_libraries,
)
from mocokit.errors import UserError
from mocokit.evaluate.features import evaluating
from mocokit.evaluate.health import HealthMonitor
from mocokit.evaluate.monitor import KnnMonitor
from mocokit.methods.moco import MoCo
from mocokit.nets.backbones import build_backbone
from mocokit.nets.batchnorm import group_sizes, share_of_groups
from mocokit.nets.heads import Encoder, build_head
from mocokit.settings import get, replace
from mocokit.sizes import InEffect, count_groups
from mocokit.views.params import ViewSpec, canvas_bound

MAX_WORKERS = 8


@dataclass(frozen=True)
class Parts:
    """All that the loop works with."""

    method: MoCo
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    spec: ViewSpec


def settle(settings: Settings, device: torch.device, stored: Settings | None) -> Settings:
    """Replace every `auto` of the engine: by what the run to resume has, or by the device's."""
    defaults: dict[str, Callable[[], Any]] = {
        "engine.precision": lambda: default_precision(device),
        "engine.memory_format": lambda: "channels_last",
        "engine.compile": lambda: device.type == "cuda",
        "engine.threads": default_threads,
    }
    changes = {}
    for path, default in defaults.items():
        if get(settings, path) == "auto":
            changes[path] = default() if stored is None else get(stored, path)
    return replace(settings, changes)


def view_spec(settings: Settings) -> ViewSpec:
    return ViewSpec(**settings.views.model_dump())


def build_encoder(settings: Settings) -> Encoder:
    """Backbone and head with their initial weights, which follow from the seed."""
    net = settings.net
    seed_libraries(settings.seed, 0, Slot.INITIALISE)
    backbone = build_backbone(
        net.backbone, net.stem, settings.method.group_size, net.zero_init_last
    )
    head = build_head(net.head, int(backbone.num_features), net.hidden, net.dim)  # type: ignore[arg-type]
    encoder = Encoder(backbone, head)
    try:
        with evaluating(encoder):
            encoder(torch.zeros(2, 3, settings.views.size, settings.views.size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"net.backbone {net.backbone} cannot take views of {settings.views.size} pixels "
            f"({str(error).splitlines()[0]}); set views.size, or another backbone"
        ) from None
    return encoder


def build_schedule(settings: Settings, effect: InEffect) -> Schedule:
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


def build_parts(settings: Settings, effect: InEffect, device: torch.device) -> Parts:
    """The method on its device, its optimiser and schedule, as they are before the first step."""
    method, optim = settings.method, settings.optim
    moco = MoCo(
        build_encoder(settings),
        dim=settings.net.dim,
        queue_size=method.queue_size,
        temperature=method.temperature,
        momentum=effect.key_momentum,
        count_groups=partial(count_groups, settings),
        shuffle=method.shuffle,
        symmetric=method.symmetric,
        micro_batch=settings.train.micro_batch,
    )
    moco = moco.to(device)
    if settings.engine.memory_format == "channels_last":
        moco = moco.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.engine.compile:
        # Shapes learnt on the way would make a kernel depend on what the process saw before.
        moco.encoder.compile(dynamic=False)
        moco.key_encoder.compile(dynamic=False)
    optimizer = build_optimizer(
        optim.name, moco.encoder.parameters(), effect.lr, optim.momentum, optim.weight_decay
    )
    half = settings.engine.precision == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    schedule = build_schedule(settings, effect)
    return Parts(moco, optimizer, schedule, scaler, view_spec(settings))


def build_loader(
    settings: Settings, source: Source, world: World, device: torch.device, start_step: int
) -> Loader:
    """This process's share of every global batch, from `start_step` on: whole groups of images."""
    groups_of = partial(count_groups, settings)
    last = len(source) % settings.train.batch_size
    if world.size > groups_of(settings.train.batch_size):
        raise UserError(
            f"{world.size} processes for {groups_of(settings.train.batch_size)} batch-norm groups; "
            "a process holds whole groups, so start fewer, or lower method.group_size"
        )
    if settings.data.last == "keep" and last and world.size > groups_of(last):
        raise UserError(
            f"data.last=keep leaves a last batch of {last} images, too few for {world.size} "
            "processes; set data.last=drop"
        )

    def share(images: int) -> slice:
        sizes = group_sizes(images, groups_of(images))
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
        pin=device.type == "cuda",
    )


def groups_of_process(settings: Settings, world: World) -> int:
    """Batch-norm groups of a full batch that this process holds."""
    groups = count_groups(settings, settings.train.batch_size)
    return len(range(groups)[share_of_groups(groups, world.rank, world.size)])


def count_workers(settings: Settings, device: torch.device) -> int:
    """Decoding processes: as asked, or one beside a CPU that trains, several beside a GPU."""
    if settings.data.workers != "auto":
        return settings.data.workers
    return 1 if device.type == "cpu" else min(MAX_WORKERS, default_threads())


def build_due(settings: Settings, effect: InEffect, world: World) -> Due:
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
