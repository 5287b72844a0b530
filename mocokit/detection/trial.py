"""One trial of detection in its folder: training, checkpoints, resuming, test and result."""

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image
from torch import Tensor

from mocokit.detection import pictures
from mocokit.detection.dataset import BoxDataset
from mocokit.detection.protocol import OLD_NAMES, renamed
from mocokit.detection.train import Trainer, detect_in
from mocokit.engine import checkpoint
from mocokit.engine.folder import RunFolder, locked
from mocokit.engine.record import Console, Meter, Metrics, StatusLine, clock, read_metrics
from mocokit.engine.runtime import peak_memory
from mocokit.engine.stop import StopSignals
from mocokit.errors import UserError
from mocokit.files import read_regular, reason_of, show, write_bytes, write_text, writing
from mocokit.protocols.voc_ap import Precisions

SAVE_SECONDS = 600.0  # between checkpoints; the time of a checkpoint changes no number
LOG_STEPS = 20
COLUMNS = ("AP50", "AP", "AP75")


def scored(scores: Precisions) -> dict[str, float]:
    """AP50, AP and AP75 in percent."""
    numbers = (scores.at(50), scores.ap, scores.at(75))
    return {name: round(100 * one, 3) for name, one in zip(COLUMNS, numbers, strict=True)}


@dataclass
class DetectionTrial:
    """A trial: every `every` steps it is tested; with 0, only at the end."""

    folder: RunFolder
    test_data: BoxDataset
    every: int
    pictures: int
    console: Console
    stop: StopSignals

    def __post_init__(self) -> None:
        self.result_path = self.folder.path / "result.json"
        self._status: StatusLine | None = None  # only one at a time on a terminal
        self._left = ""
        self._saved_at = time.monotonic()

    def run(self, make: Callable[[], Trainer]) -> dict[str, Any]:
        """The result of the trial: the one in its folder, or a new one.

        `make` returns the trainer before its first step. Raises Interrupted once it is saved.
        """
        if (found := self._finished()) is not None:
            return found
        with locked(self.folder):
            trainer = make()
            self._resume(trainer)
            metrics = Metrics(self.folder.metrics, trainer.step)
            self._status = StatusLine(self.console.terminal)
            try:
                self._train(trainer, metrics)
                result = self._result(trainer, started=time.perf_counter())
            finally:
                self._status.close()
                self._status = None
                metrics.close()
            with writing(self.result_path, remedy="make room, and repeat the same command"):
                write_text(self.result_path, json.dumps(result, indent=1) + "\n")
        return result

    def _finished(self) -> dict[str, Any] | None:
        """The result of an earlier call; a damaged one is made again, from the last checkpoint."""
        path = self.result_path
        try:
            found = json.loads(read_regular(path))
            if {"seed", "metric", "metrics", "classes", *COLUMNS} <= found.keys():
                return renamed(found, OLD_NAMES)
            reason = "it is no result"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            reason = reason_of(error)
        self.console.say(f"note: {show(path)} is damaged ({reason}): tested again", "yellow")
        return None

    def _resume(self, trainer: Trainer) -> None:
        """Go to the newest checkpoint. If none can be read, they are set aside, and it is told."""
        folder, name = self.folder.checkpoints, self.folder.path.name
        try:
            state = checkpoint.load_newest(folder, log=self.console.say)
        except UserError as error:
            with writing(folder, remedy="name another folder with --out"):
                for step in checkpoint.steps(folder):
                    path = folder / checkpoint.name_of(step)
                    path.replace(path.with_name(f"{path.name}.damaged"))
            self.console.say(f"note: {error}; set aside, and {name} begins anew", "yellow")
            return
        if state is not None:
            trainer.load(state)
            self.console.say(f"{name}: resumes after step {trainer.step}")

    def _train(self, trainer: Trainer, metrics: Metrics) -> None:
        meter, first, began = Meter(), trainer.step, time.monotonic()
        total, images = trainer.plan.steps, trainer.plan.batch_size
        self._test_if_due(trainer, metrics)
        for losses in trainer.steps():
            step = trainer.step
            meter.step(images, 0.0)
            if step % LOG_STEPS == 0 or step == total:
                trainer.check()
                line = {name: float(value) for name, value in losses.items()}
                line |= {"lr": trainer.plan.rate(step - 1), **meter.read()}
                del line["data_wait"]
                metrics.write({"step": step, **line, "bad_images": len(trainer.views.bad)})
            left = (time.monotonic() - began) / (step - first) * (total - step)
            self._left = f"{clock(left)} left"
            self._show(losses, step, total)
            due = time.monotonic() - self._saved_at >= SAVE_SECONDS
            if due or step == total or self.stop.asked or self._test_is_due(trainer):
                self._save(trainer)
            self._stop_if_signalled(trainer)
            self._test_if_due(trainer, metrics)

    def _show(self, losses: dict[str, Tensor], step: int, total: int) -> None:
        if step % LOG_STEPS == 0 or losses["loss"].device.type == "cpu":
            text = " · ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
            self._show_text(f"step {step}/{total} · {text} · {self._left}", step == total)

    def _show_text(self, text: str, last: bool = False) -> None:
        assert self._status is not None
        self._status.show(f"{self.folder.path.name} · {text}", last)

    def _save(self, trainer: Trainer) -> None:
        checkpoint.save(self.folder.checkpoints, trainer.step, trainer.state())
        checkpoint.prune(self.folder.checkpoints, 1, newest=trainer.step)
        self._saved_at = time.monotonic()

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        """Raises Interrupted after a signal. Called after a save or in a test: no step is lost."""
        if self.stop.asked:
            raise self.stop.error(trainer.step, self.folder.path.parent)

    def _test_is_due(self, trainer: Trainer) -> bool:
        """Whether an intermediate test is due. The test after the last step is the result."""
        step = trainer.step
        return self.every > 0 and step % self.every == 0 and step < trainer.plan.steps

    def _test_if_due(self, trainer: Trainer, metrics: Metrics) -> None:
        done = {line.get("step") for line in self._curve()}
        if not self._test_is_due(trainer) or trainer.step in done:
            return
        scores = self._test(trainer)[1]
        metrics.write({"step": trainer.step, **scores})
        numbers = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
        self.console.say(f"{self.folder.path.name}: step {trainer.step}: {numbers}")

    def _test(self, trainer: Trainer) -> tuple[Any, dict[str, float], dict[str, Precisions]]:
        def progress(what: str) -> Callable[[int, int], None]:
            def line(done: int, total: int) -> None:
                self._show_text(f"{what} {done:,} of {total:,}")
                self._stop_if_signalled(trainer)

            return line

        with trainer.precise(progress("precise batch norm: batch")):
            tested = detect_in(trainer, self.test_data, progress("test: image"))
        scores = tested.scores(self.test_data)
        main = next(iter(scores.values()))
        return tested, scored(main), {str(name): one for name, one in scores.items()}

    def _result(self, trainer: Trainer, started: float) -> dict[str, Any]:
        tested, main, scores = self._test(trainer)
        metric, first = next(iter(scores.items()))
        if self.pictures:
            sheet = pictures.sheet(self.test_data, tested, self.pictures)
            bars = pictures.bars(first, f"{self.test_data.name}, {metric}")
            self._draw({"predictions.png": sheet, "classes.png": bars})
        curve = self._curve()
        return {
            "seed": trainer.seed,
            "metric": metric,
            **main,
            "metrics": {name: scored(one) for name, one in scores.items()},
            "classes": {
                name: {
                    "boxes": first.wanted[at],
                    "AP50": round(100 * float(first.values[at, 0]), 3),
                    "AP": round(100 * float(first.values[at].mean()), 3),
                }
                for at, name in enumerate(first.classes)
            },
            "curve": curve,
            "steps": trainer.step,
            "unreadable_train": dict(trainer.views.bad),
            "unreadable_test": {self.test_data.samples[k].name: v for k, v in tested.bad.items()},
            "test_seconds": round(time.perf_counter() - started, 1),
            "peak_memory_gib": round(peak_memory(trainer.device), 2),
        }

    def _curve(self) -> list[dict[str, Any]]:
        """The tests on the way."""
        return [line for line in read_metrics(self.folder.metrics) if "AP50" in line]

    def _draw(self, drawn: Mapping[str, Image]) -> None:
        """Write pictures. A result is valid without them: a failure is a note."""
        for name, picture in drawn.items():
            content = io.BytesIO()
            picture.save(content, "PNG")
            try:
                write_bytes(self.folder.path / name, content.getvalue())
            except OSError as error:
                where = show(self.folder.path / name)
                self.console.say(f"note: cannot write {where} ({reason_of(error)})", "yellow")
