"""What is recorded of a run: a line every few steps, scores, and the result."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mocokit.data.sources.pack import is_pack
from mocokit.engine.record import Meter, Metrics, Progress, read_metrics, rounded
from mocokit.engine.runtime import decided_by_rank_zero, default_threads, peak_memory
from mocokit.errors import MocokitError
from mocokit.files import shell_word, show, writing
from mocokit.health.advice import SILENT, advise
from mocokit.health.verdict import verdict
from mocokit.methods.method import Method, Output
from mocokit.run import build, readme
from mocokit.run.state import RunState
from mocokit.weights.encoder import build_encoder
from mocokit.weights.write import write_backbone

WAIT_LIMIT = 0.1  # share of the time spent waiting for images that calls for advice
WAITS = 5  # records over which it is taken


# What a line of metrics.jsonl has of every method.
RESERVED = frozenset({
    "step", "epoch", "loss", "grad_norm", "chance_loss", "queue_filled", "lr", "images_per_s",
    "data_wait", "peak_memory_gib", "bad_images",
})  # fmt: skip


class Recording:
    """Writes the health line of recorded steps, and keeps the progress line up to date."""

    def __init__(self, run: RunState) -> None:
        self.run, self.meter = run, Meter()
        self.metrics = _opened(run) if run.world.writes else None
        effect, terminal = run.effect, run.console.terminal
        self.progress = Progress(terminal, effect.total_steps, run.step, effect.steps_per_epoch)
        self._waits: list[float] = []  # shares of time, of the last records
        self._advised = False

    def step(self, output: Output, images: int, waited: float, norm: Tensor | None) -> None:
        """After each step, with the seconds waited for its images.

        `norm`, of all gradients, is there if the step is to be recorded.
        """
        self.meter.step(images, waited)
        if norm is None:
            return
        line = self._line(output, images, norm)
        self._write(line)
        self.progress.show(self.run.step, line)
        self._advise(line["data_wait"])

    def _write(self, line: dict[str, Any]) -> None:
        """Raises MocokitError; then the line is kept for the next checkpoint."""
        if self.metrics is None:
            return
        self.run.check_folder()
        try:
            self.metrics.write(line)
        except MocokitError:
            self.run.unwritten.append(rounded(line))
            raise

    def _advise(self, share: float) -> None:
        """Once, what to do if the device waits for images; the first records have the start in."""
        self._waits.append(share)
        latest = self._waits[2:][-WAITS:]
        if self._advised or len(latest) < WAITS or sum(latest) / WAITS <= WAIT_LIMIT:
            return
        self._advised = True
        settings = self.run.settings
        workers, cores = build.count_workers(settings, self.run.device), default_threads()
        more = f"--set data.workers={min(2 * max(workers, 1), cores)}"
        remedies = [f"{more} (now {workers}) would read more at once"] if workers < cores else []
        if settings.data.path is not None and not is_pack(Path(settings.data.path)):
            remedies.append(
                f"`mocokit pack {shell_word(settings.data.path)} FILE` makes reading faster"
            )
        self.run.console.note(
            f"{sum(latest) / WAITS:.0%} of the time went into waiting for images; "
            + ("; ".join(remedies) or "more cores or a faster disk would help")
        )

    def scores(self, scores: dict[str, Any]) -> None:
        """What a diagnosis found, at an epoch's end, and what it means."""
        if self.metrics is None or not scores:
            return
        if self.run.step == self.run.effect.total_steps:
            self.run.health = scores  # for the result, which is the last line
            return
        epoch = self.run.step // self.run.effect.steps_per_epoch
        self.run.check_folder()
        self.metrics.write({"step": self.run.step, "epoch": epoch, **scores})
        accuracies = [f"{k} {v:.1%}" for k, v in scores.items() if k.startswith("knn_")]
        if accuracies:
            self.run.console.say(f"epoch {epoch}: {', '.join(accuracies)}")
        if found := verdict(read_metrics(self.run.folder.metrics)):
            self.run.console.say(
                f"epoch {epoch}: {found.text}", None if found.healthy else "yellow"
            )

    def unscored(self) -> bool:
        """Whether the scores due after the last step are missing; the first process decides."""
        if self.run.step == self.run.effect.total_steps:
            return True  # they would be in the result
        return self.run.step > 0 and decided_by_rank_zero(self.run.world, self.run.folder.unscored)

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        self.progress.close()

    def _line(self, output: Output, images: int, norm: Tensor) -> dict[str, Any]:
        run, method = self.run, self.run.parts.method
        share = build.share_of_process(run.settings, run.world, images) * run.world.size
        metrics = {name: value * share for name, value in output.metrics.items()}
        if taken := sorted(RESERVED & metrics.keys()):
            raise ValueError(f"{type(method).__name__} names a metric {', '.join(taken)}: reserved")
        values = {"loss": output.loss.detach(), **metrics, "grad_norm": norm}
        stacked = torch.stack([value.float() for value in values.values()])
        if run.world.size > 1:
            dist.all_reduce(stacked)
            stacked /= run.world.size
        numbers = dict(zip(values, stacked.tolist(), strict=True))
        return {
            "step": run.step,
            "epoch": (run.step - 1) // run.effect.steps_per_epoch,
            **numbers,
            **({} if method.chance_loss is None else {"chance_loss": method.chance_loss}),
            **_filled(method),
            **method.health(),
            "lr": run.parts.optimizer.param_groups[0]["lr"],
            **self.meter.read(),
            "peak_memory_gib": peak_memory(run.device),
            "bad_images": run.bad.count,
        }


def _opened(run: RunState) -> Metrics:
    """metrics.jsonl up to the run's step, with the lines that the checkpoint holds for it."""
    metrics = Metrics(run.folder.metrics, run.step, run.unwritten)
    run.unwritten = []
    if metrics.damaged:
        run.console.note(
            f"{show(run.folder.metrics)}: {count(metrics.damaged)} that nobody can read, left out"
        )
    return metrics


def count(lines: int) -> str:
    """1 line, 2 lines."""
    return f"{lines:,} line{'s' * (lines != 1)}"


def _filled(method: Method) -> dict[str, float]:
    """How full the emptiest queue is; a verdict waits until it is full."""
    shares = [float(queue.filled) / len(queue.rows) for queue in method.queues.values()]
    return {"queue_filled": min(shares)} if shares else {}


@contextmanager
def recording(run: RunState) -> Iterator[Recording]:
    record = Recording(run)
    try:
        yield record
    finally:
        record.close()


def finish(run: RunState) -> dict[str, Any]:
    """Score the final weights beside what they must beat; write the backbone and the README.

    Raises MocokitError where the backbone or the result cannot be written.
    """
    run.save()  # what a finished run stands on is there
    result: dict[str, Any] = {"step": run.step, "epoch": run.settings.train.epochs}
    if not run.world.writes:
        return result
    result |= run.health
    method = run.parts.method
    _write_backbone(run)
    monitor = build.build_monitor(run.settings, run.splits, run.device)
    if monitor is not None:
        run.console.say("scoring the final weights ...")
        result |= dict(monitor.run(method.encoder))
        untrained = build_encoder(run.settings).to(run.device)
        baselines = {
            "knn_random_weights": monitor.random_weights(untrained),
            "knn_raw_pixels": monitor.raw_pixels(),
        }
        result |= {name: score for name, score in baselines.items() if score is not None}
        result |= {"scored_images": monitor.scored_images, "protocol": monitor.protocol}
    lines = [*read_metrics(run.folder.metrics), result]
    found = verdict(lines)
    if found is not None:
        result["verdict"] = found.text
    sick = found is not None and not found.healthy
    result["advice"] = f"{SILENT} while it is not healthy" if sick else advise(lines)
    result["finished"] = True
    run.check_folder()
    readme.write(run, result)
    metrics = _opened(run)
    try:
        metrics.write(result)
    finally:
        metrics.close()
    return run.folder.result() or result  # with the digits that are kept


def _write_backbone(run: RunState) -> None:
    backbone = run.parts.method.encoder.backbone
    room = sum(tensor.nbytes for tensor in backbone.state_dict().values())
    remedy = "make room, and repeat the command: nothing is trained again"
    run.check_folder()
    with writing(run.folder.backbone, room=room, remedy=remedy):
        write_backbone(run.folder.backbone, backbone, run.settings)
