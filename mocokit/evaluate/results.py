"""What an evaluation found: shown beside its protocol, kept as JSON and in the run's report."""

import datetime
import json
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
from mocokit.files import check_result, json_lines, reason_of, show, write_result
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
    """Append a result to the run's report, and write it to `path` if there is one.

    The run comes first, so that a failure of the copy loses nothing. Raises UserError and
    MocokitError where `path` cannot be written.
    """
    record = writable(record)
    if folder is not None:
        _add(record, console, folder)
    if path is not None:
        content = json.dumps(record, indent=1).encode() + b"\n"
        write_result(path, content, "--json", is_result)
        console.say(f"written: {show(path)}")
    elif folder is None:
        console.say("no run folder keeps this; --json FILE writes it down")
    took, memory = clock(record["seconds"]), record["peak_memory_gib"]
    console.say(f"{took} on {record['hardware']}, at most {memory:.1f} GiB")


def _add(record: Mapping[str, Any], console: Console, folder: RunFolder) -> None:
    """Add a result to a run's report. A result is valid without it: a failure is a note."""
    try:
        readme.append(folder, record)
        lines, damaged = json_lines(folder.evaluations)
        if lines[-1:] != [record]:
            raise OSError(f"{folder.evaluations.name} does not hold what was written")
    except (OSError, UserError) as error:  # for example another user's run
        reason = f"cannot add this to {show(folder.path)} ({reason_of(error)})"
        console.say(f"note: {reason}; --json FILE writes it elsewhere", "yellow")
        return
    console.say(f"added to {show(folder.readme)} and {folder.evaluations.name}")
    if damaged:
        many = f"{damaged} damaged line{'s' * (damaged != 1)}"
        console.say(f"note: {show(folder.evaluations)} has {many}, left out of README.md", "yellow")


def writable(value: Any) -> Any:
    """The same for a file in UTF-8.

    Bytes of a path that are no UTF-8 become Python's escapes, such as \\udce9 for the byte e9.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {writable(name): writable(one) for name, one in value.items()}
    return [*map(writable, value)] if isinstance(value, list | tuple) else value


def is_result(content: bytes) -> bool:
    """Whether this is the JSON of an evaluation."""
    try:
        found = json.loads(content)
        return isinstance(found["kind"], str) and "mocokit" in found["versions"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def check_writable(path: str | Path) -> None:
    """Raises UserError where a result could not be written: asked before hours of work."""
    check_result(path, "--json", is_result)


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
