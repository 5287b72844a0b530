"""What is said of a detection evaluation: before it, and of its trials beside the paper's."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mocokit import published
from mocokit.detection.open import DetectionData
from mocokit.detection.protocol import Plan, plan_for
from mocokit.detection.trial import COLUMNS
from mocokit.engine.record import Console
from mocokit.engine.runtime import peak_memory
from mocokit.evaluate.results import circumstances, keep
from mocokit.weights.resolve import Opened

MAX_NAMED = 20  # problems with annotations, before training; all are counted


@dataclass(frozen=True)
class Detected:
    """What was found: percent, mean and standard deviation over trials by name of the column."""

    folder: Path
    mean: dict[str, float]
    std: dict[str, float]  # empty for one trial
    trials: tuple[dict[str, Any], ...]
    protocol: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class DetectionReport:
    """What an evaluation consists of, in words."""

    run: str
    data_path: str
    split: str
    plan: Plan
    data: DetectionData
    opened: Opened
    device: torch.device
    precision: str
    folder: Path

    @property
    def _network(self) -> str:
        return self.opened.subject.architecture.split()[0]

    @property
    def _stage(self) -> str:
        """Whose weights these are, where their run had steps to go."""
        return f"{self.opened.unfinished}, " if self.opened.unfinished else ""

    def start(self, console: Console) -> None:
        """What will run, what is wrong with the annotations, and what differs from the paper."""
        say, plan, data = console.say, self.plan, self.data
        say(
            f"{self.run}: {self._stage}Faster R-CNN {self._network}-C4, "
            f"{len(data.train.classes)} classes",
            "bold",
        )
        say(
            f"{len(data.train.samples):,} training and {len(data.test.samples):,} test images, "
            f"{data.split}; {plan.steps:,} steps of {plan.batch_size} images, lr "
            f"{plan.lr:g}; {self.precision} on {self.device}"
        )
        if self._network.startswith("resnet50"):
            say(f"about {memory_gib(plan, self.precision):.0f} GiB for what a step keeps")
        for note in self._of_data(MAX_NAMED):
            say(f"note: {note}", "yellow")
        if found := self.differences():
            say(f"another protocol than the paper's: {'; '.join(found)}", "yellow")
        say(f"folder: {self.folder}; the same command goes on with it")

    def differences(self) -> list[str]:
        """In what this is not the paper's protocol; the precision is told beside the number."""
        found = []
        name = self._network.partition(".")[0]
        if name != "resnet50":
            found.append(f"{name}, not resnet50")
        sizes = len(self.data.train.samples), len(self.data.test.samples)
        if not self.data.devkit or sizes != published.VOC_IMAGES[self.split]:
            found.append(f"{sizes[0]:,} -> {sizes[1]:,} images, not VOC's own")
        theirs, ours = plan_for(self.split).model_dump(), self.plan.model_dump()
        changed = [name for name in ours if ours[name] != theirs[name]]
        return found + [f"{n} {_plain(ours[n])}, not {_plain(theirs[n])}" for n in changed]

    def finish(
        self,
        results: list[dict[str, Any]],
        seconds: float,
        console: Console,
        path: str | Path | None,
    ) -> Detected:
        """Print beside the published numbers, write to `path`, append to the run's report."""
        mean = {name: statistics.fmean(one[name] for one in results) for name in COLUMNS}
        several = len(results) > 1
        std = {n: statistics.stdev(one[n] for one in results) for n in COLUMNS} if several else {}
        rows = [(f"seed {one['seed']}", *_cells(one)) for one in results]
        if several:
            shown = (f"{mean[name]:.1f} ± {std[name]:.1f}" for name in COLUMNS)
            rows.append((f"mean of {len(results)} ± std", *shown))
        rows += self._published()
        protocol, notes = self._protocol(results), self._notes(results)
        if self.data.devkit:
            spread = " / ".join(map(str, published.VOC_DEVIATIONS))
            source = published.VOC_SOURCE[self.split]
            notes.append(f"published: {source}; its authors expect deviations of {spread}")
        title = f"{self.run}: {self._stage}detection, {results[0]['metric']}"
        console.table(title, ["trial", *COLUMNS], rows)
        console.say(protocol)
        for note in notes:
            console.say(f"note: {note}", "yellow")
        record = {
            "kind": "voc",
            "run": self.run,
            "data": self.data_path,
            "protocol": protocol,
            "table": [["trial", *COLUMNS], *map(list, rows)],
            "mean": mean,
            "std": std,
            "results": results,
            "notes": notes,
            "plan": self.plan.model_dump(mode="json"),
            "weights": self.opened.subject.weights,
            "data_fingerprint": self.data.train.fingerprint,
            "seconds": round(seconds, 1),
            "peak_memory_gib": round(peak_memory(self.device), 2),
            "pictures": self._pictures(results),
            **circumstances(),
        }
        keep(record, console, self.opened.folder, path)
        return Detected(self.folder, mean, std, tuple(results), protocol, tuple(notes))

    def _protocol(self, results: list[dict[str, Any]]) -> str:
        plan, metric = self.plan, results[0]["metric"]
        found = self.differences()
        which = (
            f"another protocol than the paper's ({'; '.join(found)})" if found else "the paper's"
        )
        others = [
            f"{name} metric {' / '.join(_means(results, name))}"
            for name in results[0]["metrics"]
            if name != metric
        ]
        seeds = ", ".join(str(one["seed"]) for one in results)
        return "; ".join([
            f"{self._stage}Faster R-CNN {self._network}-C4, all layers fine-tuned on "
            f"{self.data.split}",
            f"{plan.steps:,} steps of {plan.batch_size} images, lr {plan.lr:g}",
            f"batch norm over the whole step, made precise over {plan.precise_bn} batches",
            which,
            f"AP of the {metric} metric, over IoU .50:.05:.95",
            *others,
            f"seeds {seeds}, last step, {self.precision} on {self.device.type}",
        ])  # fmt: skip

    def _of_data(self, most: int) -> list[str]:
        notes = []
        for side in (self.data.train, self.data.test):
            named, rest = "; ".join(side.problems[:most]), len(side.problems) - most
            if named:
                more = f"; and {rest} more" if rest > 0 else ""
                notes.append(f"{side.name}: {len(side.problems)} left out: {named}{more}")
            notes += side.notes
        return notes

    def _notes(self, results: list[dict[str, Any]]) -> list[str]:
        notes = self._of_data(3)
        for side in ("train", "test"):
            bad = {k: v for one in results for k, v in one[f"unreadable_{side}"].items()}
            if bad:
                first = "; ".join(f"{k} ({v})" for k, v in [*bad.items()][:3])
                notes.append(f"{len(bad)} {side} images cannot be read: {first}")
        absent = [k for k, one in results[0]["classes"].items() if not one["boxes"]]
        if absent:
            notes.append(f"no test image has {', '.join(absent)}: left out of the means")
        return notes

    def _published(self) -> list[tuple[str, ...]]:
        """The paper's rows beside VOC, with a word where ours is not its protocol."""
        if not self.data.devkit:
            return []
        other = " (another protocol)" if self.differences() else ""
        return [
            (f"paper: {row.name}{other}", f"{row.ap50:.1f}", f"{row.ap:.1f}", f"{row.ap75:.1f}")
            for row in published.VOC[self.split]
        ]

    def _pictures(self, results: list[dict[str, Any]]) -> list[str]:
        """Of the first trial, as the run's report finds them."""
        folder = (self.folder / f"trial-{results[0]['seed']}").absolute()
        there = [folder / name for name in ("predictions.png", "classes.png")]
        home = self.opened.folder.path.absolute() if self.opened.folder else None
        inside = home is not None and folder.is_relative_to(home)
        paths = [path for path in there if path.is_file()]
        return [str(path.relative_to(home) if inside and home else path) for path in paths]


def memory_gib(plan: Plan, precision: str) -> float:
    """What autograd keeps in a step of R50-C4, from counts on a CPU (docs/log.md, 2026-11-24).

    For images of 4 to 3 at the largest side; buffers of kernels come on top.
    """
    pixels = max(plan.sides) ** 2 * 4 / 3 / 1e6
    regions = plan.roi_batch * (plan.pooled / 14) ** 2
    kept = plan.batch_size * (0.777 * pixels + 0.00253 * regions)
    return kept * (2 if precision == "float32" else 1)


def _cells(scores: Mapping[str, float]) -> list[str]:
    return [f"{scores[name]:.1f}" for name in COLUMNS]


def _means(results: list[dict[str, Any]], metric: str) -> list[str]:
    every = [one["metrics"][metric] for one in results]
    return _cells({name: statistics.fmean(one[name] for one in every) for name in COLUMNS})


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
