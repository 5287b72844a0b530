"""How good is it: `mocokit evaluate`, and the same in Python."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocokit.config import Settings
from mocokit.data.source import Splits, open_data
from mocokit.engine.record import Speaker
from mocokit.engine.runtime import choose_device, default_threads, peak_memory, prepare
from mocokit.errors import NonFiniteLoss, UserError
from mocokit.evaluate import finetune, linear_paper, linear_quick
from mocokit.evaluate.features import evaluating
from mocokit.evaluate.knn import knn_grid, nearest
from mocokit.evaluate.linear_paper import Fitted
from mocokit.evaluate.monitor import calibrated
from mocokit.evaluate.scores import Scores
from mocokit.evaluate.subject import Layer, Subject
from mocokit.evaluate.table import Table, cache_folder, describe_view, features_of
from mocokit.evaluate.task import Task, task_of
from mocokit.evaluations import Evaluation, Result, publish
from mocokit.subjects import Opened, open_subject

PERCENTS = (1.0, 10.0, 100.0)
MAX_WORKERS = 8


@dataclass(frozen=True)
class Options:
    """What all evaluations share. `data` None is the run's own."""

    data: str | Path | None = None
    layer: Layer = "backbone"
    device: str = "auto"
    precision: str = "float32"
    size: int | None = None
    seed: int = 0
    baseline: bool = True
    cache: bool = True
    per_class: bool = False
    confusion: bool = False
    json: str | Path | None = None


def evaluate_knn(
    run: str | Path,
    data: str | Path | None = None,
    *,
    k: Sequence[int] = (200,),
    temperature: Sequence[float] = (0.1,),
    **options: Any,
) -> Evaluation:
    """The weighted vote of the nearest training images, for every k and temperature.

    `run` is a run folder, a checkpoint, an exported file, a timm model, or `random`; `data` is as
    in `pretrain`, None being the run's own. Options: layer, device, precision, size, seed,
    baseline, cache, per_class, confusion, json. Raises UserError.
    """
    if not k or min(k) < 1:
        raise UserError(f"k = {list(k)}: neighbours are counted from 1")
    if not temperature or min(temperature) <= 0:
        raise UserError(f"temperature = {list(temperature)}: it must be positive")
    room = _Room(run, Options(data, **options), leave_one_out=True)
    task = room.task
    shown = ", ".join(str(min(one, len(task.train_numbers))) for one in k)
    protocol = (
        f"kNN, k {shown}, temperature {', '.join(f'{t:g}' for t in temperature)}, "
        f"{room.opened.subject.layer} features; {describe_view(room.opened.subject.spec)}"
    )
    for subject in room.subjects():
        train, test = room.tables(subject)
        known = np.isin(task.train_numbers, train.good)
        numbers, labels = task.train_numbers[known], task.train_labels[known]
        queries, truth = linear_paper.test_features(task, test)
        own = torch.arange(len(numbers)) if task.leave_one_out else None
        found = nearest(train.take(numbers), queries, max(k), own, subject.device)
        grid = knn_grid(found, torch.from_numpy(labels), k, temperature, len(task.classes))
        for count, warmth, predicted in grid:
            setting = {"k": count, "temperature": warmth}
            room.add(subject, predicted.numpy(), truth, setting)
    return room.finish("knn", protocol)


def evaluate_linear(
    run: str | Path,
    data: str | Path | None = None,
    *,
    protocol: str = "paper",
    epochs: int = linear_paper.EPOCHS,
    lr: float = linear_paper.LR,
    **options: Any,
) -> Evaluation:
    """A linear classifier on frozen features: `paper` (random crops, 100 epochs) or `quick`.

    Arguments and options are as in `evaluate_knn`; epochs and lr belong to `paper` alone. Raises
    UserError, and NonFiniteLoss where the probe diverges.
    """
    if protocol not in ("paper", "quick"):
        raise UserError(f"protocol {protocol!r} is not one; take paper or quick")
    if protocol == "quick" and (epochs, lr) != (linear_paper.EPOCHS, linear_paper.LR):
        raise UserError("--epochs and --lr belong to --protocol paper; quick sets its own step")
    if epochs < 1 or lr <= 0:
        raise UserError(f"epochs {epochs} and lr {lr:g} must be positive")
    room = _Room(run, Options(data, **options))
    first = room.opened.subject
    if protocol == "paper":
        words = linear_paper.protocol(first, epochs, lr)
    else:
        words = linear_quick.protocol(first, room.options.seed)
    for subject in room.subjects():
        train, test = room.tables(subject, train=protocol == "quick")
        try:
            if protocol == "quick":
                assert train is not None
                fitted = linear_quick.fit_quick(
                    room.task, train, subject.device, seed=room.options.seed
                )
            else:
                fitted = linear_paper.fit_paper(
                    subject,
                    room.task,
                    seed=room.options.seed,
                    epochs=epochs,
                    lr=lr,
                    workers=room.workers,
                    tell=room.tell_epochs(subject),
                )
        except NonFiniteLoss as error:
            if subject is first:
                raise
            room.notes.append(f"{subject.name}: {error}")  # the baseline's fault costs no result
            continue
        room.add_fitted(subject, fitted, test)
    return room.finish(f"linear ({protocol})", words)


def evaluate_finetune(
    run: str | Path,
    data: str | Path | None = None,
    *,
    percent: Sequence[float] = PERCENTS,
    epochs: int = finetune.Plan.epochs,
    lr: float = finetune.Plan.lr,
    layer_decay: float = finetune.Plan.layer_decay,
    **options: Any,
) -> Evaluation:
    """Fine-tuning of all layers with each percentage of the labels.

    Arguments and options are as in `evaluate_knn`, without `layer`. Raises UserError, and
    NonFiniteLoss where training diverges.
    """
    if not percent or min(percent) <= 0 or max(percent) > 100:
        raise UserError(f"percent = {list(percent)}: shares of labels lie above 0, up to 100")
    if epochs < 1 or lr <= 0 or not 0 < layer_decay <= 1:
        raise UserError("epochs and lr must be positive, layer_decay above 0 and at most 1")
    room = _Room(run, Options(data, **options))
    plan = finetune.Plan(epochs=epochs, lr=lr, layer_decay=layer_decay)
    words = plan.describe(room.opened.subject, len(room.task.train_numbers))
    for share in percent:
        part = room.task.with_share(share / 100, room.options.seed)
        for subject in room.subjects(calibrate=False):
            predicted, truth, details = finetune.fine_tune(
                subject,
                part,
                plan,
                seed=room.options.seed,
                workers=room.workers,
                tell=room.tell_epochs(subject, f" {share:g} %"),
            )
            setting = {"labels": f"{share:g} %", "images": details["images"]}
            room.add(subject, predicted.numpy(), truth, setting, details)
    return room.finish("finetune", words)


class _Room:
    """What an evaluation works with, and what it has found so far."""

    def __init__(self, run: str | Path, options: Options, leave_one_out: bool = False) -> None:
        self.run, self.options = str(run), options
        self.speaker, self.started = Speaker(), time.perf_counter()
        self.device = choose_device(options.device)
        prepare(self.device, default_threads(), deterministic=False)
        self.workers = 1 if self.device.type == "cpu" else min(MAX_WORKERS, default_threads())
        self.opened: Opened = open_subject(
            run,
            self.device,
            layer=options.layer,
            precision=options.precision,
            size=options.size,
            seed=options.seed,
        )
        self.splits = labelled(options.data, self.opened.settings)
        self.task: Task = task_of(*self.splits, seed=options.seed, leave_one_out=leave_one_out)
        self.results: list[Result] = []
        self.notes: list[str] = []
        self._told = time.monotonic()
        self._untrained: dict[bool, Subject] = {}

    def subjects(self, calibrate: bool = True) -> list[Subject]:
        """The subject, and its random weights if they are wanted."""
        if not self.options.baseline or self.opened.untrained is None:
            return [self.opened.subject]
        if calibrate not in self._untrained:
            untrained = self.opened.untrained()
            if calibrate:
                with evaluating(untrained.network):
                    calibrated(untrained.network, self.task.train, untrained.spec, self.device)
            self._untrained[calibrate] = untrained
        return [self.opened.subject, self._untrained[calibrate]]

    def tables(self, subject: Subject, train: bool = True) -> tuple[Any, Table]:
        """Features of the training images, if wanted, and of the test images."""
        task = self.task
        folder = cache_folder() if self.options.cache else None
        tables = {}
        for source in (task.train, task.test) if train else (task.test,):
            if id(source) not in tables:
                tables[id(source)] = features_of(
                    subject,
                    source,
                    workers=self.workers,
                    folder=folder,
                    tell=lambda done, total: self._tell(
                        f"features of {subject.name}: {done:,} of {total:,} images", done == total
                    ),
                )
        return tables.get(id(task.train)), tables[id(task.test)]

    def tell_epochs(self, subject: Subject, what: str = "") -> Any:
        return lambda done, total, loss: self._tell(
            f"{subject.name}{what}: epoch {done} of {total}, loss {loss:.3f}", done == total
        )

    def _tell(self, text: str, last: bool) -> None:
        """A line every ten seconds of work."""
        now = time.monotonic()
        if now - self._told > 10:
            self._told = now
            self.speaker.say(text)

    def add_fitted(self, subject: Subject, fitted: Fitted, table: Table) -> None:
        queries, truth = linear_paper.test_features(self.task, table)
        predicted = fitted.predict(queries).numpy()
        self.add(subject, predicted, truth, {}, fitted.details)
        self.notes += [f"{subject.name}: {note}" for note in fitted.notes]

    def add(
        self,
        subject: Subject,
        predicted: Any,
        truth: Any,
        setting: dict[str, Any],
        details: dict[str, Any] | None = None,
    ) -> None:
        scores = Scores.of(predicted, truth, len(self.task.classes))
        self.results.append(Result(subject.name, setting, scores, details or {}))

    def finish(self, kind: str, protocol: str) -> Evaluation:
        """Print, write, append to the run's report."""
        split = f"{self.task.train.name}: {self.task.split}"
        unread = len(self.task.test_numbers) - self.results[0].scores.count
        if unread:
            self.notes.append(f"{unread} test images could not be read and count as neither")
        evaluation = Evaluation(
            kind=kind,
            run=self.run,
            data=str(self.options.data or self.task.train.name),
            protocol=f"{protocol}; {split}; {self.options.precision} on {self.device.type}",
            results=tuple(self.results),
            classes=self.task.classes,
            notes=tuple(self.notes),
            weights=self.opened.subject.weights,
            fingerprint=self.task.train.fingerprint,
            seconds=time.perf_counter() - self.started,
            peak_memory_gib=peak_memory(self.device),
        )
        options = self.options
        publish(
            evaluation,
            self.speaker,
            self.opened.folder,
            options.json,
            per_class=options.per_class,
            confusion=options.confusion,
        )
        return evaluation


def labelled(data: str | Path | None, settings: Settings | None) -> Splits:
    """The images to score on: those named, or the run's own; labels from folders where need be."""
    if data is None and settings is None:
        raise UserError("name the images to score on: only a run knows its own")
    own = settings is not None and data is None
    path = settings.data.path if own and settings is not None else data
    splits = open_data(path)
    if splits.train.labels is None and path is not None and Path(path).expanduser().is_dir():
        try:
            return open_data(path, "folders")
        except UserError:
            pass  # a flat folder, of which the caller says that it has no labels
    return splits
