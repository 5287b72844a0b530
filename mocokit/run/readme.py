"""README.md of a run folder: its files, how to resume, what evaluations found. The one writer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocokit.engine.folder import RunFolder
from mocokit.engine.record import clock, read_lines
from mocokit.errors import UserError
from mocokit.files import (
    append_line,
    markdown,
    printable,
    reason_of,
    shell_word,
    show,
    write_text,
)
from mocokit.run import extend
from mocokit.run.state import RunState

HEADING = "## Evaluations"
NAMES = {
    "knn_raw_pixels": "raw pixels, centred",
    "knn_random_weights": "random weights, calibrated batch norm",
    "knn_head": "trained, head's output",
    "knn_backbone": "trained backbone",
}
JUDGED = ("verdict", "advice")


def _command(*words: str | Path) -> str:
    """A command of `mocokit`, to be called in any folder."""
    return " ".join(["mocokit", "pretrain", *map(shell_word, words)])


def write(run: RunState, result: Mapping[str, Any] | None = None) -> None:
    """Write the run folder's README.md; without a result, that of an unfinished run.

    A run does not stop for it: what cannot be written is said.
    """
    path = run.folder.readme
    try:
        write_text(path, text(run, result or {}))
    except (OSError, UserError) as error:
        run.console.note(f"{show(path)} could not be written ({reason_of(error)})")


def text(run: RunState, result: Mapping[str, Any]) -> str:
    """The README's text; an empty result means that the run is not finished."""
    path, settings = run.folder.path.resolve(), run.settings
    rows = [f"| {text} | {result[n]:.1%} |" for n, text in NAMES.items() if n in result]
    table = (
        ["| features | kNN |", "| --- | --- |", *rows, "", result["protocol"] + "."] if rows else []
    )
    going = _command(path / "config.yaml", "--out", path)
    going_on = ["Not finished. Resume with:", "", "```sh", going, "```", ""]
    lines = [
        f"# {markdown(path.name)}",
        "",
        f"{settings.recipe}, seed {settings.seed}, {len(run.splits.train):,} images of "
        f"{markdown(run.splits.train.name)}, {settings.train.epochs} epochs, "
        f"{run.effect.total_steps:,} steps.",
        "",
        *([f"{longer}.", ""] if (longer := extend.told(settings)) else []),
        *(table if result else going_on),
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
        _command(path / "config.yaml"),
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
        "| run.json | the run's own number, and what its image files were like |",
        "| bad_images.txt | images that could not be read, if there were any |",
        "| evaluations.jsonl | the results of `mocokit evaluate`, if there are any |",
        "",
    ]
    return "\n".join(map(printable, lines)) + section(run.folder)


def append(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Add a line to evaluations.jsonl and update the run's README. Raises OSError."""
    append_line(folder.evaluations, json.dumps(record))
    before = ""
    if folder.readme.is_file():
        before = folder.readme.read_text(encoding="utf-8", errors="replace")
    before = before.split(f"\n{HEADING}\n")[0].rstrip("\n")
    write_text(folder.readme, f"{before}\n{section(folder)}")


def section(folder: RunFolder) -> str:
    """The README's section of evaluations; empty if there are none."""
    lines: list[str] = []
    records, damaged = read_lines(folder.evaluations)
    for record in records:
        try:
            lines += _entry(record)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            damaged += 1
    if damaged:
        lines += [f"Damaged lines of evaluations.jsonl, left out here: {damaged:,}.", ""]
    return "\n".join(["", HEADING, "", *lines]) if lines else ""


def _entry(record: Mapping[str, Any]) -> list[str]:
    """An evaluation's lines. What names files and classes is from strangers."""
    columns, rows = _table(record)
    table = [columns, ["---"] * len(columns), *([markdown(str(c)) for c in row] for row in rows)]
    return [
        f"### {markdown(record['kind'])} on {markdown(record['data'])}, {record['date'][:10]}",
        "",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        f"{printable(record['protocol'])}. {clock(record['seconds'])} on "
        f"{printable(record['hardware'])}.",
        *(f"Note: {markdown(note)}." for note in record["notes"]),
        *(f"\n![{markdown(Path(p).stem)}]({printable(p)})" for p in record.get("pictures", ())),
        "",
    ]


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
