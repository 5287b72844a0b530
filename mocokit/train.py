"""Pre-training: the loop. Read `train` first; all else prepares it or tells of it.

A run is a function of its settings: every random number comes from `chance`, so stopping, resuming
and the number of workers change nothing. Methods plug into the loop through two functions, forward
and update (methods/method.py); they never fork it.
"""

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mocokit.data.open import open_data
from mocokit.data.source import Source, Splits, as_splits
from mocokit.engine.average import GradientAverage, compare_replicas
from mocokit.engine.finite import FiniteWatch, gradient_norm
from mocokit.engine.optim import set_lr
from mocokit.engine.record import Console
from mocokit.engine.runtime import autocast, decided_by_rank_zero, joined_world, seed_libraries
from mocokit.engine.stop import Stopped, StopSignals
from mocokit.errors import NonFiniteLoss, UserError
from mocokit.methods.method import Method, Output, Step
from mocokit.protocols.limits import check_numbers
from mocokit.run import build, command, messages, recording
from mocokit.run.begin import begun, calibrate_on_first_group
from mocokit.run.diagnosis import diagnose
from mocokit.run.extend import lengthened
from mocokit.run.open import open_run
from mocokit.run.state import RunState
from mocokit.settings import methods
from mocokit.settings.arguments import checked
from mocokit.transfer import to_device


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and its last scores by name."""

    folder: Path
    result: dict[str, Any]


@checked
def pretrain(
    recipe: str | None = None,
    data: str | Path | Source | Splits | None = None,
    out: str | Path | None = None,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    seed: int | None = None,
    resume: bool = False,
    extend: int | None = None,
    settings: Mapping[str, Any] | None = None,
    method: type[Method] | None = None,
    allow_import: Collection[str] = (),
) -> Run:
    """Train a backbone; the same as the command `mocokit pretrain`.

    `recipe` is a recipe's name, a config.yaml, or the data itself; `data` names images, or is a
    Source of your own (docs/adding/source.md); `settings` holds {"a.b": value}; `method` is a class
    of your own (docs/adding/method.md), and `allow_import` names modules from which one that a
    config.yaml names may come. With `extend`, `recipe` is the folder of a finished run, and a new
    run of so many epochs starts from its end. Raises UserError for mistakes, Interrupted once a
    stopped run is saved, and NonFiniteLoss.
    """
    flags: dict[str, Any] = {
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "engine.device": device,
        "seed": seed,
    }
    if method is not None:
        flags["method.name"] = f"{method.__module__}:{method.__qualname__}"
        methods.use(flags["method.name"], method)
    changes = command.merge(flags, settings or {})
    check_numbers(extend=extend)
    if extend is not None:
        recipe, changes = lengthened(recipe, extend, changes)
    given = None if data is None or isinstance(data, str | Path) else as_splits(data)
    path = None if data is None or given is not None else str(data)
    source = None if given is None else given.train.name
    asked, stated = command.asked(recipe, path, changes, allowed=allow_import, source=source)
    with StopSignals() as stop, joined_world(asked.engine.device) as world:
        with stop.before_the_first_step():
            console, where = Console(world.writes), asked.data
            splits = given or open_data(where.path, where.labels, where.root, console.counting)
            run = open_run(asked, stated, splits, out, resume, world)
        result = decided_by_rank_zero(world, run.finished)
        if result is None:
            with begun(run):
                messages.start(run)
                try:
                    train(run, stop)
                    with stop.interruptible():
                        result = recording.finish(run)
                except NonFiniteLoss as error:
                    raise NonFiniteLoss(f"{error}; {run.last_good()}") from None
                except torch.OutOfMemoryError:
                    raise UserError(run.out_of_memory()) from None
                except Stopped:
                    raise stop.error(run.step, run.folder.path) from None
        messages.result(run, result)
    return Run(run.folder.path, result)


def train(run: RunState, stop: StopSignals) -> None:
    """Go from the run's step to the last: views, loss, gradient, update; then record, score, save.

    Raises Interrupted once saved, if asked to stop, UserError for too many bad images, likewise,
    and NonFiniteLoss.
    """
    settings, parts, device = run.settings, run.parts, run.device
    method, optimizer, scaler = parts.method.train(), parts.optimizer, parts.scaler
    monitor = build.build_monitor(settings, run.splits, device) if run.world.writes else None
    known, note = run.bad.known, run.console.note
    loader = build.build_loader(
        settings, run.unread(), run.bound, run.world, device, run.step, known, note
    )
    if run.step == 0 and settings.net.calibrate_head:
        calibrate_on_first_group(run)
    average = GradientAverage(method.trained())
    watch, due = FiniteWatch(device), build.build_due(settings, run.effect, run.world)

    def score() -> None:
        scored = monitor if due.monitor(run.step) else None  # the last: by recording.finish
        with run.between_steps():
            record.scores(diagnose(run, loader, scored, stop))

    with recording.recording(run) as record, closing(run.batches(loader)) as batches:
        if due.health(run.step) and record.unscored():  # a stop came before they were finished
            score()
        for step, batch, waited in batches:
            seed_libraries(settings.seed, step)
            set_lr(optimizer, parts.schedule(step))
            images = run.images_of(step)
            views = run.views(step, batch)
            index = to_device(batch.index, device)
            now = Step(settings.seed, step, images, scaler.get_scale())
            run.set_groups(images)
            with autocast(device, settings.engine.precision):
                output: Output = method(views, index, now)
            watch.note(step + 1, output.loss)
            torch.autograd.backward(scaler.scale(output.loss))
            average.finish()
            scaler.unscale_(optimizer)
            logged = due.log(step + 1)
            norm = gradient_norm(method.trained()) if logged else None
            if method.clip is not None:
                torch.nn.utils.clip_grad_norm_(method.trained(), method.clip)
            if optimizer_step(scaler, optimizer):
                method.update(output.keep, step, (step + 1) / run.effect.total_steps)
            run.average_statistics(images)
            optimizer.zero_grad(set_to_none=True)
            run.step = step + 1
            if logged or device.type == "cpu":
                watch.check()
            with run.between_steps():  # a full disk
                run.note_bad(batch.bad, logged)
                record.step(output, images, waited, norm)
            if due.compare(run.step):
                compare_replicas(method, run.step)
            if due.health(run.step):
                score()
            save, end = due.save_or_stop(run.step, stop.asked)
            if save or run.bad.too_many:
                watch.check()
                run.save()
            run.bad.check()
            if end:
                raise stop.error(run.step, run.folder.path)


def optimizer_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Take the optimiser's step; false if float16 gradients overflowed and it was skipped."""
    if not scaler.is_enabled():
        optimizer.step()
        return True
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before
