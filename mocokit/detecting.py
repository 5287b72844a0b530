"""Transfer to detection: `mocokit evaluate voc`, and the same in Python."""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mocokit import evaluations, paper
from mocokit.chance import Slot
from mocokit.detection_trial import COLUMNS, DetectionTrial
from mocokit.engine.folder import ROOT, RunFolder
from mocokit.engine.record import Speaker
from mocokit.engine.runtime import (
    choose_device,
    default_precision,
    default_threads,
    peak_memory,
    prepare,
    seed_libraries,
)
from mocokit.engine.stop import StopSignals
from mocokit.errors import UserError
from mocokit.evaluate.voc_c4 import Detector
from mocokit.evaluate.voc_open import PAPER_IMAGES, Data, open_boxes
from mocokit.evaluate.voc_plan import Plan, plan_for
from mocokit.evaluate.voc_train import Trainer
from mocokit.subjects import Opened, open_subject

MAX_THREADS = 8
NAMED_PROBLEMS = 20


@dataclass(frozen=True)
class Detected:
    """What was found: percent, mean and standard deviation over trials by name of the column."""

    folder: Path
    mean: dict[str, float]
    std: dict[str, float]  # empty for one trial
    trials: tuple[dict[str, Any], ...]
    protocol: str
    notes: tuple[str, ...]


def evaluate_voc(
    run: str | Path,
    data: str | Path,
    *,
    split: str = "07+12",
    trials: int = 5,
    seed: int = 0,
    iterations: int | None = None,
    ims_per_step: int | None = None,
    settings: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    every: int = 0,
    out: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    pictures: int = 6,
    json: str | Path | None = None,
) -> Detected:
    """Fine-tune a Faster R-CNN R50-C4 from a backbone, and measure AP; MoCo's second measure.

    `run` is as in `evaluate_knn`; `data` is VOCdevkit/, one folder of VOC's layout, or COCO's.
    Trials have the seeds seed, seed + 1, ...; `settings` changes any value of voc_plan.Plan; `every`
    so many steps a test is made on the way. The same call goes on with what was begun in `out`.
    Raises UserError, Interrupted once saved, and NonFiniteLoss.
    """
    if trials < 1 or every < 0 or pictures < 0:
        raise UserError("trials are counted from 1; every and pictures from 0")
    if precision not in ("auto", "float32", "bfloat16"):
        raise UserError(f"precision {precision!r} is not one; take auto, float32 or bfloat16")
    plan = plan_for(split, iterations, ims_per_step, settings)
    evaluation = _Evaluation(run, data, split, seed, plan, tuple(classes), device, precision, out)
    with StopSignals() as stop:
        results = []
        for one in range(seed, seed + trials):
            results.append(evaluation.trial(one, every, pictures, stop).run())
    return evaluation.finish(results, json)


class _Evaluation:
    """The backbone, the data, the plan, and the folder that all trials lie in."""

    def __init__(
        self,
        run: str | Path,
        data: str | Path,
        split: str,
        seed: int,
        plan: Plan,
        classes: tuple[str, ...],
        device: str,
        precision: str,
        out: str | Path | None,
    ) -> None:
        self.run, self.data_path, self.split, self.seed, self.plan = run, data, split, seed, plan
        self.speaker, self.started = Speaker(), time.perf_counter()
        self.device = choose_device(device)
        best = default_precision(self.device)
        own = "float32" if best == "float16" else best  # gradients would vanish in float16
        self.precision = own if precision == "auto" else precision
        self.threads = 1 if self.device.type == "cpu" else min(MAX_THREADS, default_threads())
        self.opened: Opened = open_subject(run, self.device, seed=seed)
        prepare(self.device, torch.get_num_threads(), deterministic=False)
        self.data: Data = open_boxes(data, split, classes, self.speaker.counting)
        Detector(self.opened.subject.network, len(self.data.train.classes), plan)  # or a UserError
        identity = self._identity()
        text = json.dumps(identity, sort_keys=True).encode()
        home = self.opened.folder.path if self.opened.folder else ROOT
        named = home / f"voc-{hashlib.blake2b(text, digest_size=4).hexdigest()}"
        self.folder = Path(out).expanduser() if out is not None else named
        self._claim(identity)
        self._start()

    def _identity(self) -> dict[str, Any]:
        """All that changes a trial's numbers, beside its seed."""
        subject = self.opened.subject
        random = self.opened.untrained is None  # each trial draws its own
        return {
            "weights": "random" if random else subject.weights,
            "architecture": subject.architecture,
            "split": self.data.split,
            "train": self.data.train.fingerprint,
            "test": self.data.test.fingerprint,
            "precision": self.precision,
            "mean": list(subject.spec.mean),
            "std": list(subject.spec.std),
            **self.plan.model_dump(mode="json"),
        }

    def _claim(self, identity: dict[str, Any]) -> None:
        path = self.folder / "identity.json"
        try:
            if path.is_file():
                there = json.loads(path.read_text(encoding="utf-8"))
                differing = [k for k in identity if there.get(k) != identity[k]]
                if differing:
                    shown = ", ".join(f"{k} ({there.get(k)} there)" for k in differing)
                    raise UserError(f"{self.folder} holds another evaluation: {shown}; give --out")
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot use {self.folder} ({error}); choose another --out") from None

    def _start(self) -> None:
        say, plan, data = self.speaker.say, self.plan, self.data
        name = self.opened.subject.architecture.split()[0]
        say(f"{self.run}: Faster R-CNN, {name}-C4, {len(data.train.classes)} classes", "bold")
        say(
            f"{len(data.train.samples):,} training and {len(data.test.samples):,} test images, "
            f"{data.split}; {plan.iterations:,} steps of {plan.ims_per_step} images, lr "
            f"{plan.lr:g}; {self.precision} on {self.device}"
        )
        for note in self._data_notes(NAMED_PROBLEMS):
            say(f"note: {note}", "yellow")
        for difference in self.differences():
            say(f"another protocol than the paper's: {difference}", "yellow")
        say(f"folder: {self.folder}; the same command goes on with it")

    def _data_notes(self, most: int) -> list[str]:
        notes = []
        for side in (self.data.train, self.data.test):
            problems, rest = side.problems[:most], len(side.problems) - most
            if problems:
                more = f"; and {rest} more" if rest > 0 else ""
                text = f"{len(side.problems)} annotations left out: {'; '.join(problems)}{more}"
                notes.append(f"{side.name}: {text}")
            notes += side.notes
        return notes

    def differences(self) -> list[str]:
        """In what this is not the paper's protocol; precision is told beside the number."""
        found = []
        name = self.opened.subject.architecture.split()[0].partition(".")[0]
        if name != "resnet50":
            found.append(f"{name}, not resnet50")
        sizes = len(self.data.train.samples), len(self.data.test.samples)
        if not self.data.devkit or sizes != PAPER_IMAGES[self.split]:
            found.append(f"{sizes[0]:,} -> {sizes[1]:,} images, not VOC's own")
        theirs = plan_for(self.split).model_dump()
        changed = {k: (v, theirs[k]) for k, v in self.plan.model_dump().items() if v != theirs[k]}
        found += [f"{k} {_plain(ours)}, not {_plain(own)}" for k, (ours, own) in changed.items()]
        return found

    def trial(self, seed: int, every: int, pictures: int, stop: StopSignals) -> DetectionTrial:
        def make() -> Trainer:
            opened = self.opened
            if opened.untrained is None and seed != self.seed:
                opened = open_subject(self.run, self.device, seed=seed)
            subject = opened.subject
            seed_libraries(seed, 0, Slot.DETECTION_WEIGHTS)
            detector = Detector(subject.network, len(self.data.train.classes), self.plan)
            return Trainer(
                detector,
                self.plan,
                self.data.train,
                seed,
                self.device,
                subject.spec.mean,
                subject.spec.std,
                self.precision,
                self.threads,
            )

        folder = RunFolder(self.folder / f"trial-{seed}")
        return DetectionTrial(folder, make, self.data.test, every, pictures, self.speaker, stop)

    def finish(self, results: list[dict[str, Any]], path: str | Path | None) -> Detected:
        """Print beside the published numbers, write, append to the run's report."""
        mean = {name: statistics.fmean(one[name] for one in results) for name in COLUMNS}
        several = len(results) > 1
        std = {n: statistics.stdev(one[n] for one in results) for n in COLUMNS} if several else {}
        notes = self._notes(results)
        protocol = self._protocol(results)
        rows = [
            (f"seed {one['seed']}", *(f"{one[name]:.1f}" for name in COLUMNS)) for one in results
        ]
        if several:
            shown = (f"{mean[name]:.1f} ± {std[name]:.1f}" for name in COLUMNS)
            rows.append((f"mean of {len(results)}, ± std", *shown))
        rows += self._published()
        title = f"{self.run}: detection, {results[0]['metric']}"
        self.speaker.table(title, ["trial", *COLUMNS], rows)
        self.speaker.say(protocol)
        for note in notes:
            self.speaker.say(f"note: {note}", "yellow")
        opened = self.opened
        record = {
            "kind": "voc",
            "run": str(self.run),
            "data": str(self.data_path),
            "protocol": protocol,
            "table": [["trial", *COLUMNS], *map(list, rows)],
            "mean": mean,
            "std": std,
            "results": results,
            "notes": notes,
            "plan": self.plan.model_dump(mode="json"),
            "weights": opened.subject.weights,
            "data_fingerprint": self.data.train.fingerprint,
            "seconds": round(time.perf_counter() - self.started, 1),
            "peak_memory_gib": round(peak_memory(self.device), 2),
            "pictures": self._pictures(results),
            **evaluations.circumstances(),
        }
        evaluations.keep(record, self.speaker, opened.folder, path)
        return Detected(self.folder, mean, std, tuple(results), protocol, tuple(notes))

    def _protocol(self, results: list[dict[str, Any]]) -> str:
        plan = self.plan
        seeds = ", ".join(str(one["seed"]) for one in results)
        differences = self.differences()
        which = "the paper's protocol"
        if differences:
            which = f"another protocol than the paper's ({'; '.join(differences)})"
        others = [
            f"by the {name} metric " + " / ".join(f"{one:.1f}" for one in _mean(results, name))
            for name in results[0]["metrics"]
            if name != results[0]["metric"]
        ]
        return (
            f"Faster R-CNN {self.opened.subject.architecture.split()[0]}-C4 fine-tuned on "
            f"{self.data.split}, {plan.iterations:,} iterations of {plan.ims_per_step} images, "
            f"lr {plan.lr:g}, batch norm over the whole step, precise batch norm over "
            f"{plan.precise_bn} batches; {which}; {', '.join([*others, f'seeds {seeds}'])}; last "
            f"iteration; {self.precision} on {self.device.type}"
        )

    def _notes(self, results: list[dict[str, Any]]) -> list[str]:
        notes = self._data_notes(3)
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
        """The paper's rows, for VOC's own names alone; where the protocol is another, it says so."""
        if not self.data.devkit:
            return []
        other = " (another protocol)" if self.differences() else ""
        return [
            (f"paper: {row.name}{other}", f"{row.ap50:.1f}", f"{row.ap:.1f}", f"{row.ap75:.1f}")
            for row in paper.VOC[self.split]
        ]

    def _pictures(self, results: list[dict[str, Any]]) -> list[str]:
        """Of the first trial, as the run's report finds them."""
        folder = self.folder / f"trial-{results[0]['seed']}"
        there = [folder / name for name in ("predictions.png", "classes.png")]
        home = self.opened.folder
        paths = [path for path in there if path.is_file()]
        if home is not None and folder.absolute().is_relative_to(home.path.absolute()):
            root = home.path.absolute()
            return [str(path.absolute().relative_to(root)) for path in paths]
        return [str(path.absolute()) for path in paths]


def _mean(results: list[dict[str, Any]], metric: str) -> list[float]:
    return [statistics.fmean(one["metrics"][metric][name] for one in results) for name in COLUMNS]


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
