"""One evaluation in progress: the models, the images, and the results so far."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mocokit.data import depth, locations
from mocokit.data.open import Labels, open_data
from mocokit.data.source import Source, Splits
from mocokit.engine.record import Console
from mocokit.engine.runtime import (
    choose_device,
    default_threads,
    default_workers,
    peak_memory,
    prepare,
)
from mocokit.errors import NonFiniteLoss, UserError
from mocokit.evaluate.results import Evaluation, Result, check_writable, publish
from mocokit.evaluate.stopping import at_once
from mocokit.files import cache_folder, given
from mocokit.health.knn_monitor import PIXEL_LIMIT, calibrated
from mocokit.nets.modes import evaluating
from mocokit.protocols.defaults import Shared
from mocokit.protocols.labelled import LabelledSplit, check_classes, labelled_split
from mocokit.protocols.limits import check_numbers
from mocokit.protocols.linear_paper import EpochProgress, Fitted, test_features
from mocokit.protocols.scores import Scores
from mocokit.protocols.states import States
from mocokit.protocols.table import CENTRE, Table, Transform, features_of
from mocokit.run.open import kept_index
from mocokit.settings.schema import Settings
from mocokit.settings.sizes import scored_anew
from mocokit.weights.resolve import Opened, is_ours, open_model
from mocokit.weights.subject import FrozenModel, Pixels

PIXELS = "raw pixels, centred"
PIXEL_MEMORY = 2**31  # bytes
QUIET_SECONDS = 10.0  # at least, between progress lines


@dataclass(frozen=True)
class Options(Shared):
    """The defaults' table with the images and the file of one call. `data` None: the run's own."""

    _: KW_ONLY
    data: str | Path | None = None
    json: str | Path | None = None

    def __post_init__(self) -> None:
        check_numbers(size=self.size, resize=self.resize, seed=self.seed)


class Session:
    """What an evaluation works with, and its results so far."""

    @at_once
    def __init__(self, run: str | Path, options: Options, leave_one_out: bool = False) -> None:
        self.run, self.options = str(run), options
        if options.json is not None:
            check_writable(options.json)
        # Mistakes come before weights are fetched.
        self.tables = cache_folder() / "features" if options.cache else None
        ours = is_ours(run)
        known = None if options.data is None and ours else labelled(options.data, None)
        self.console, self.started = Console(), time.perf_counter()
        self.device = choose_device(options.device)
        self.workers = default_workers(self.device)
        self.opened: Opened = open_model(
            run,
            self.device,
            layer=options.layer,
            precision=options.precision,
            size=options.size,
            resize=options.resize,
            seed=options.seed,
        )
        settings = self.opened.settings
        # As many threads as the run was given: a small network gains little from more, and loses
        # much where another process has the core.
        stated = "auto" if settings is None else settings.engine.threads
        threads = default_threads() if stated == "auto" else min(stated, default_threads())
        prepare(self.device, threads, deterministic=False)
        self.splits = known or labelled(None, settings)
        if (folder := self.opened.folder) is not None and depth.top_of(*self.splits) is not None:
            run_index = kept_index(folder, self.splits.train)
            if run_index.fingerprint == self.splits.train.fingerprint:  # read as it was trained on
                depth.keep(self.splits, run_index.top)
        self.split: LabelledSplit = labelled_split(
            *self.splits, seed=options.seed, leave_one_out=leave_one_out
        )
        self.results: list[Result] = []
        self.notes: list[str] = self.split.remarks()
        if settings is not None and (options.size or options.resize) is None:
            self.notes += scored_anew(settings)
        self.calibrated = False
        self._logged = time.monotonic()
        self._untrained: dict[bool, FrozenModel] = {}
        self.states = States.at_home(self.console.say)

    def subjects(self, calibrate: bool = True) -> list[FrozenModel]:
        """The subject, and its random weights if they are wanted."""
        if self.opened.untrained is None:
            subject = self.opened.subject
            return [self._calibrate(subject) if calibrate else subject]
        if not self.options.baseline:
            return [self.opened.subject]
        if calibrate not in self._untrained:
            untrained = self.opened.untrained()
            self._untrained[calibrate] = self._calibrate(untrained) if calibrate else untrained
        return [self.opened.subject, self._untrained[calibrate]]

    def pixels(self) -> list[FrozenModel]:
        """The images themselves as features, where they are small and baselines are wanted."""
        first = self.opened.subject
        width = 3 * first.spec.size**2
        if not self.options.baseline or first.spec.size > PIXEL_LIMIT:
            return []
        if 4 * width * len(self.split.train) > PIXEL_MEMORY:
            self.notes.append("raw pixels are left out, which would take over 2 GiB")
            return []
        network = Pixels().to(self.device).eval()
        return [FrozenModel(PIXELS, network, width, first.spec, "pixels")]

    def _calibrate(self, subject: FrozenModel) -> FrozenModel:
        """Random weights are judged with batch-norm statistics that fit the images."""
        self.calibrated = True
        with evaluating(subject.network):
            calibrated(subject.network, self.split.train, subject.spec, self.device)
        return subject

    def table(self, subject: FrozenModel, source: Source, transform: Transform = CENTRE) -> Table:
        """Features of a source, from the cache where it holds them."""
        table = features_of(
            subject,
            source,
            transform,
            workers=self.workers,
            # Pixels are made as fast as they are read, and take much room.
            folder=self.tables if self.options.cache and subject.name != PIXELS else None,
            progress=lambda done, total: self._log(
                f"features of {subject.name}: {done:,} of {total:,} images"
            ),
            log=lambda text: self.console.say(text, "yellow"),
        )
        if source is self.split.train:
            numbers = self.split.train_numbers
            known = np.isin(numbers, table.good)
            unread = len(numbers) - int(known.sum())
            check_classes(self.split.train_labels[known], f"{source.name} that can be read")
            note = f"{_images(unread, 'training')} could not be read: left out"
            if unread and note not in self.notes:
                self.notes.append(note)
        return table

    def epoch_progress(self, subject: FrozenModel, what: str = "") -> EpochProgress:
        return lambda done, total, loss: self._log(
            f"{subject.name}{what}: epoch {done} of {total}, loss {loss:.3f}"
        )

    def _log(self, text: str) -> None:
        """Say it, unless the last line is too recent."""
        now = time.monotonic()
        if now - self._logged > QUIET_SECONDS:
            self._logged = now
            self.console.say(text)

    @contextmanager
    def baselines_fault_noted(self, subject: FrozenModel) -> Iterator[None]:
        """Training on a subject: a baseline's that diverges costs no result, only a note."""
        try:
            yield
        except NonFiniteLoss as error:
            if subject is self.opened.subject:
                raise
            self.notes.append(f"{subject.name}: {error}")

    def add_fitted(self, subject: FrozenModel, fitted: Fitted, table: Table) -> None:
        queries, truth = test_features(self.split, table)
        predicted = fitted.predict(queries).numpy()
        self.add(subject, predicted, truth, {}, fitted.details)
        self.notes += [f"{subject.name}: {note}" for note in fitted.notes]

    def add(
        self,
        subject: FrozenModel,
        predicted: ArrayLike,
        truth: ArrayLike,
        setting: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
    ) -> None:
        scores = Scores.of(predicted, truth, len(self.split.classes))
        self.results.append(Result(subject.name, setting, scores, details or {}))

    def finish(self, kind: str, protocol: str) -> Evaluation:
        """Print, write, append to the run's report."""
        split = f"{self.split.train.name}: {self.split.description}"
        where = f"seed {self.options.seed}, {self.options.precision} on {self.device.type}"
        if self.calibrated:
            where += "; random weights with batch-norm statistics of the training images"
        unread = len(self.split.test_numbers) - self.results[0].scores.count
        if unread:
            note = f"{_images(unread, 'test')} could not be read: neither right nor wrong"
            self.notes.append(note)
        evaluation = Evaluation(
            kind=kind,
            run=self.run,
            data=str(self.options.data or self.split.train.name),
            protocol="; ".join(filter(None, (self.opened.unfinished, protocol, split, where))),
            results=tuple(self.results),
            classes=self.split.classes,
            notes=tuple(self.notes),
            weights=self.opened.subject.weights,
            fingerprint=self.split.train.fingerprint,
            seconds=time.perf_counter() - self.started,
            peak_memory_gib=peak_memory(self.device),
        )
        options = self.options
        publish(
            evaluation,
            self.console,
            self.opened.folder,
            options.json,
            per_class=options.per_class,
            confusion=options.confusion,
        )
        self.states.forget()
        return evaluation


def labelled(data: str | Path | None, settings: Settings | None) -> Splits:
    """The images to score on: the given ones or the run's own. Folders may be their labels."""
    path, root = None if data is None else str(data), None
    labels: Labels = "auto"
    if data is None:
        if settings is None:
            raise UserError("name the images to score on; only a run folder records its own")
        path, root = settings.data.path, settings.data.root
        labels = "folders" if settings.data.labels == "folders" else "auto"
        if path is not None and not locations.exist(path):
            where = f"the training images are no longer at {path}"
            raise UserError(
                f"{where}; pass their new location, or other images, as the second argument"
            )
    if path is not None and (given(path) / "config.yaml").is_file():
        raise UserError(f"{path} is a run folder, not images; leave it out to take the run's own")
    splits = open_data(path, labels, root)
    if splits.train.labels is None and path is not None and given(path).is_dir():
        try:
            splits = open_data(path, "folders", root)
        except UserError as error:
            reason, _, _ = str(error).partition(":")
            what = f"{splits.train.name} has no labels ({reason})"
            raise UserError(f"{what}; put each image into a folder of its class") from None
    splits.check_classes("remove or rename it")
    return splits


def _images(count: int, which: str) -> str:
    return f"{count:,} {which} image{'s' * (count != 1)}"
