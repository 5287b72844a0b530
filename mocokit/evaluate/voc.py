"""Transfer to detection: `mocokit evaluate voc`, and the same in Python."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mocokit.chance import Slot
from mocokit.detection.c4 import Detector
from mocokit.detection.open import DetectionData, open_boxes
from mocokit.detection.protocol import OLD_NAMES, Plan, plan_for, renamed
from mocokit.detection.train import Trainer
from mocokit.detection.trial import DetectionTrial
from mocokit.engine.folder import ROOT, RunFolder
from mocokit.engine.record import Console
from mocokit.engine.runtime import (
    choose_device,
    default_precision,
    default_workers,
    prepare,
    seed_libraries,
)
from mocokit.engine.stop import StopSignals
from mocokit.errors import UserError
from mocokit.evaluate.results import check_writable
from mocokit.evaluate.voc_results import Detected, DetectionReport
from mocokit.files import write_text
from mocokit.protocols.defaults import DetectorPrecision, Shared, Split, Voc
from mocokit.protocols.limits import check_numbers
from mocokit.settings.arguments import checked
from mocokit.weights.resolve import Opened, open_model


@checked
def evaluate_voc(
    run: str | Path,
    data: str | Path,
    *,
    split: Split = Voc.split,
    trials: int = Voc.trials,
    seed: int = Shared.seed,
    steps: int | None = None,
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    every: int = Voc.every,
    out: str | Path | None = None,
    device: str = Shared.device,
    precision: DetectorPrecision = Voc.precision,
    pictures: int = Voc.pictures,
    json: str | Path | None = None,
    iterations: int | None = None,
    ims_per_step: int | None = None,
) -> Detected:
    """Fine-tune a Faster R-CNN C4 from a backbone and measure its AP: the papers' second measure.

    `run` is as in `evaluate_knn`; `data` is VOCdevkit/, one folder of VOC's layout, or COCO's.
    Trials have the seeds seed, seed + 1, ...; `settings` changes any value of
    detection.protocol.Plan; every `every` steps a test is made on the way. The same call goes on
    with what was begun in `out`. Raises UserError, Interrupted once saved, and NonFiniteLoss.

    `iterations` and `ims_per_step` are the names that 0.1 had for `steps` and `batch_size`.
    """
    check_numbers(trials=trials, every=every, pictures=pictures, seed=seed, batch_size=batch_size)
    check_numbers(steps=steps, iterations=iterations, ims_per_step=ims_per_step)
    if json is not None:
        check_writable(json)
    sizes = {"steps": steps, "batch_size": batch_size}
    sizes |= {"iterations": iterations, "ims_per_step": ims_per_step}
    stated = renamed({name: value for name, value in sizes.items() if value is not None})
    plan = plan_for(split, **stated, settings=settings)
    console, started = Console(), time.perf_counter()
    with StopSignals() as stop, stop.before_the_first_step():
        place = choose_device(device)
        resolved = _precision(precision, place)
        opened = open_model(run, place, seed=seed)
        boxes = open_boxes(data, split, tuple(classes), console.counting)
        names = boxes.train.classes
        # A network that cannot be a detector is a UserError, before anything is written.
        Detector(opened.subject.network, len(names), plan)
        random = opened.untrained is None  # then each trial draws its own weights
        identity = _identity(opened, boxes, plan, resolved)
        home = opened.folder.path if opened.folder else ROOT
        folder = Path(out).expanduser() if out is not None else home / _name(identity)
        prepare(place, _claim(folder, identity), deterministic=False)

    def trainer(trial_seed: int) -> Trainer:
        again = random and trial_seed != seed
        subject = (open_model(run, place, seed=trial_seed) if again else opened).subject
        seed_libraries(trial_seed, 0, Slot.DETECTION_WEIGHTS)
        detector = Detector(subject.network, len(names), plan)
        normalisation = subject.spec.mean, subject.spec.std
        threads = default_workers(place)
        return Trainer(
            detector, plan, boxes.train, trial_seed, place, *normalisation, resolved, threads
        )

    report = DetectionReport(
        str(run), str(data), split, plan, boxes, opened, place, resolved, folder
    )
    report.start(console)
    results = []
    with StopSignals() as stop:
        for trial_seed in range(seed, seed + trials):
            run_folder = RunFolder(folder / f"trial-{trial_seed}")
            trial = DetectionTrial(run_folder, boxes.test, every, pictures, console, stop)
            with _room_for(plan, place):
                results.append(trial.run(partial(trainer, trial_seed)))
    return report.finish(results, time.perf_counter() - started, console, json)


@contextmanager
def _room_for(plan: Plan, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{plan.batch_size} images a step do not fit into the memory of {device}; try "
            f"--batch-size {max(1, plan.batch_size // 2)}, which is another protocol"
        ) from None


def _precision(asked: str, device: torch.device) -> str:
    best = default_precision(device)
    own = "float32" if best == "float16" else best  # in which gradients would vanish
    return own if asked == "auto" else asked


def _identity(opened: Opened, boxes: DetectionData, plan: Plan, precision: str) -> dict[str, Any]:
    """All that changes a trial's numbers, beside its seed."""
    subject = opened.subject
    return {
        "weights": subject.weights if opened.untrained else "random",
        "architecture": subject.architecture,
        "split": boxes.split,
        "train": boxes.train.fingerprint,
        "test": boxes.test.fingerprint,
        "precision": precision,
        "mean": list(subject.spec.mean),
        "std": list(subject.spec.std),
        **plan.model_dump(mode="json"),
    }


def _name(identity: Mapping[str, Any]) -> str:
    """The default folder. It is hashed under the old names, so that 0.1's folders are found."""
    old = {name: was for was, name in OLD_NAMES.items()}
    written = {old.get(name, name): value for name, value in identity.items()}
    text = json.dumps(written, sort_keys=True).encode()
    return f"voc-{hashlib.blake2b(text, digest_size=4).hexdigest()}"


def _claim(folder: Path, identity: Mapping[str, Any]) -> int:
    """Begin the folder, or go on with it; the number of threads, which sums on a CPU depend on.

    Raises UserError where another evaluation lies there.
    """
    path, threads = folder / "identity.json", torch.get_num_threads()
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**identity, "threads": threads}, indent=1)
            write_text(path, text + "\n")
            return threads
        there = renamed(json.loads(path.read_text(encoding="utf-8")), OLD_NAMES)
        differing = [name for name in identity if there[name] != identity[name]]
        threads = int(there["threads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot use {folder} ({error}); choose another --out") from None
    if differing:
        shown = ", ".join(f"{name} ({there[name]} there)" for name in differing)
        raise UserError(f"{folder} holds another evaluation: {shown}; give another --out")
    return threads
