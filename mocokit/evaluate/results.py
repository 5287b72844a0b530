"""What an evaluation found: shown beside its protocol, kept as JSON and in the run's report."""

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocokit.engine.folder import RunFolder
from mocokit.engine.hardware import cpu_name
from mocokit.engine.record import Console, clock
from mocokit.errors import UserError
from mocokit.files import write_text
from mocokit.protocols.scores import Scores
from mocokit.run import readme
from mocokit.run.readme import label_of
from mocokit.version import VERSION

SHOWN_CLASSES = 20  # of a confusion matrix; of more, only the commonest mistakes


@dataclass(frozen=True)
class Result:
    """The scores of one set of features at one setting."""

    features: str
    setting: Mapping[str, Any]
    scores: Scores
    details: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        return self.scores.accuracy


@dataclass(frozen=True)
class Evaluation:
    """Results with all that tells how they came about; the subject's come first."""

    kind: str
    run: str
    data: str
    protocol: str
    results: tuple[Result, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    weights: str
    fingerprint: str
    seconds: float
    peak_memory_gib: float

    @property
    def accuracy(self) -> float:
        """Of the subject, at its first setting."""
        return self.results[0].accuracy

    def as_dict(self, confusion: bool = False) -> dict[str, Any]:
        """For JSON; confusions only where they are asked for, since they grow with the square."""
        results = []
        for result in self.results:
            scores = result.scores.as_dict()
            if not confusion:
                del scores["confusion"]
            line = {"features": result.features, **result.setting, **scores}
            results.append(line | {"details": dict(result.details)})
        return {
            "kind": self.kind,
            "run": self.run,
            "data": self.data,
            "protocol": self.protocol,
            "results": results,
            "classes": list(self.classes),
            "notes": list(self.notes),
            "weights": self.weights,
            "data_fingerprint": self.fingerprint,
            "seconds": round(self.seconds, 1),
            "peak_memory_gib": round(self.peak_memory_gib, 2),
            **circumstances(),
        }


def circumstances() -> dict[str, Any]:
    """When, on what and with which versions a number came about."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(),
        "versions": {"mocokit": VERSION, "torch": torch.__version__},
    }


def publish(
    evaluation: Evaluation,
    console: Console,
    folder: RunFolder | None,
    path: str | Path | None,
    *,
    per_class: bool,
    confusion: bool,
) -> None:
    """Print it, write it to `path` if there is one, and append it to the run's report."""
    rows = [(_label(result), f"{result.accuracy:.1%}") for result in evaluation.results]
    console.table(f"{evaluation.run}: {evaluation.kind}", ["features", "accuracy"], rows)
    console.say(evaluation.protocol)
    for note in evaluation.notes:
        console.say(f"note: {note}", "yellow")
    if per_class:
        _show_classes(evaluation, console)
    if confusion:
        _show_confusion(evaluation, console)
    keep(evaluation.as_dict(confusion), console, folder, path)


def keep(
    record: Mapping[str, Any], console: Console, folder: RunFolder | None, path: str | Path | None
) -> None:
    """Write a result to `path` if there is one, and append it to the run's report."""
    if path is not None:
        try:
            write_text(Path(path).expanduser(), json.dumps(record, indent=1) + "\n")
        except OSError as error:
            why = f"cannot write {path} ({error.strerror})"
            raise UserError(f"{why}; choose another place with --json") from None
        console.say(f"written: {path}")
    if folder is None:
        if path is None:
            console.say("no run folder keeps this; --json FILE writes it down")
    else:
        try:
            readme.append(folder, record)
            console.say(f"added to {folder.readme} and {folder.evaluations.name}")
        except OSError as error:  # for example another user's run; the result is valid all the same
            reason = f"cannot add this to {folder.path} ({error.strerror})"
            console.say(f"note: {reason}; --json FILE writes it elsewhere", "yellow")
    took, memory = clock(record["seconds"]), record["peak_memory_gib"]
    console.say(f"{took} on {record['hardware']}, at most {memory:.1f} GiB")


def check_writable(path: str | Path) -> None:
    """Raises UserError where a file could not be written: asked before hours of work."""
    place = Path(path).expanduser()
    if place.is_dir():
        why = "it is a folder"
    elif not place.parent.is_dir():
        why = f"there is no folder {place.parent}"
    elif not os.access(place if place.exists() else place.parent, os.W_OK):
        why = "you may not write there"
    else:
        return
    raise UserError(f"cannot write {path} ({why}); choose another place with --json")


def _label(result: Result) -> str:
    return label_of({"features": result.features, **result.setting})


def _show_classes(evaluation: Evaluation, console: Console) -> None:
    scores = evaluation.results[0].scores
    shares, images = scores.per_class, scores.confusion.sum(1)
    rows = [
        (
            evaluation.classes[at],
            "-" if np.isnan(shares[at]) else f"{shares[at]:.1%}",
            str(images[at]),
        )
        for at in np.argsort(np.nan_to_num(shares, nan=2.0), kind="stable")
    ]
    name = _label(evaluation.results[0])
    console.table(f"{name}: by class, the weakest first", ["class", "accuracy", "images"], rows)


def _show_confusion(evaluation: Evaluation, console: Console) -> None:
    matrix, classes = evaluation.results[0].scores.confusion, evaluation.classes
    if len(classes) <= SHOWN_CLASSES:
        rows = [(classes[at], *map(str, row)) for at, row in enumerate(matrix.tolist())]
        title = "confusion: rows are what the images are, columns what they were taken for"
        console.table(title, ["", *classes], rows)
        return
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CLASSES]
    rows = [
        (
            f"{classes[at // len(classes)]} taken for {classes[at % len(classes)]}",
            str(wrong.flat[at]),
        )
        for at in order.tolist()
        if wrong.flat[at]
    ]
    console.table("the commonest mistakes", ["mistake", "images"], rows)


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads != 1)} of {cpu_name()}"
