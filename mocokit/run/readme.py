"""README.md of a run folder: its files, how to resume, what evaluations found. The one writer."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocokit.engine.folder import RunFolder
from mocokit.engine.record import clock, read_metrics
from mocokit.files import printable, write_text
from mocokit.run.state import RunState

HEADING = "## Evaluations"
NAMES = {
    "knn_raw_pixels": "raw pixels, centred",
    "knn_random_weights": "random weights, calibrated batch norm",
    "knn_head": "trained, head's output",
    "knn_backbone": "trained backbone",
}
JUDGED = ("verdict", "advice")


def _command(run: RunState) -> str:
    """The command that resumes this run, in whatever folder it is called."""
    path = run.folder.path.resolve()
    return shlex.join(["mocokit", "pretrain", str(path / "config.yaml"), "--out", str(path)])


def write(run: RunState, result: Mapping[str, Any] | None = None) -> None:
    """Write the run folder's README.md; without a result, that of an unfinished run."""
    write_text(run.folder.readme, text(run, result or {}))


def text(run: RunState, result: Mapping[str, Any]) -> str:
    """The README's text; an empty result means that the run is not finished."""
    path, settings = run.folder.path.resolve(), run.settings
    rows = [f"| {text} | {result[n]:.1%} |" for n, text in NAMES.items() if n in result]
    table = (
        ["| features | kNN |", "| --- | --- |", *rows, "", result["protocol"] + "."] if rows else []
    )
    going = ["Not finished. Resume with:", "", "```sh", _command(run), "```", ""]
    lines = [
        f"# {path.name}",
        "",
        f"{settings.recipe}, seed {settings.seed}, {len(run.splits.train):,} images of "
        f"{run.splits.train.name}, {settings.train.epochs} epochs, "
        f"{run.effect.total_steps:,} steps.",
        "",
        *(table if result else going),
        *(f"{name.capitalize()}: {result[name]}." for name in JUDGED if name in result),
        "",
        "The backbone, in Python:",
        "",
        "```python",
        "import mocokit",
        "",
        f"backbone = mocokit.load({str(path)!r})  # eval mode; (N, 3, H, W) -> "
        f"(N, {run.parts.method.encoder.num_features})",
        "```",
        "",
        f"Pixels are divided by 255, then normalised by mean {settings.views.mean} and std "
        f"{settings.views.std}.",
        "",
        "The same run again:",
        "",
        "```sh",
        shlex.join(["mocokit", "pretrain", f"{path}/config.yaml"]),
        "```",
        "",
        "| file | what it holds |",
        "| --- | --- |",
        "| config.yaml | every setting, and what follows from them |",
        "| metrics.jsonl | a line of health every few steps; the last line is the result |",
        "| backbone.safetensors | the trained backbone, its settings in the metadata |",
        "| last.pt, checkpoints/ | everything that resuming needs |",
        "| views.png | what the network saw |",
        "| images.idx | which images, by number |",
        "| bad_images.txt | images that could not be read, if there were any |",
        "| evaluations.jsonl | the results of `mocokit evaluate`, if there are any |",
        "",
    ]
    return "\n".join(map(printable, lines)) + section(run.folder)


def append(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Add a line to evaluations.jsonl and update the run's README. Raises OSError."""
    with open(folder.evaluations, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    readme = folder.readme.read_text(encoding="utf-8") if folder.readme.is_file() else ""
    before = readme.split(f"\n{HEADING}\n")[0].rstrip("\n")
    write_text(folder.readme, f"{before}\n{section(folder)}")


def section(folder: RunFolder) -> str:
    """The README's section of evaluations; empty if there are none."""
    lines = []
    for record in read_metrics(folder.evaluations):
        columns, rows = _table(record)
        lines += [
            f"### {record['kind']} on {record['data']}, {record['date'][:10]}",
            "",
            *(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)),
            "",
            f"{record['protocol']}. {clock(record['seconds'])} on {record['hardware']}.",
            *(f"Note: {note}." for note in record["notes"]),
            *(part for path in record.get("pictures", ()) for part in ("", _picture(path))),
            "",
        ]
    return "\n".join(["", HEADING, "", *map(printable, lines)]) if lines else ""


def _picture(path: str) -> str:
    return f"![{Path(path).stem}]({path})"


def _table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows; a record with other scores than accuracies has its own table."""
    if "table" in record:
        columns, *rows = record["table"]
        return columns, rows
    return ["features", "accuracy"], [
        [label_of(result), f"{result['accuracy']:.1%}"]
        for result in record["results"]
        if result["accuracy"] is not None
    ]


def label_of(result: Mapping[str, Any]) -> str:
    """The features, with the settings in which this line differs from others."""
    names = {"k": "k", "temperature": "temperature", "labels": "labels"}
    shown = [f"{text} {result[name]}" for name, text in names.items() if name in result]
    return ", ".join([result["features"], *shown])
