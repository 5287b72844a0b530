"""A run about to go: settings decided, folder opened, parts built, newest checkpoint taken up."""

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mocokit import build, settings as settings_, sizes
from mocokit.build import Parts
from mocokit.config import Settings
from mocokit.data.batch import look
from mocokit.data.index import load_index
from mocokit.data.source import Splits
from mocokit.engine import checkpoint
from mocokit.engine.folder import RunFolder, claim_folder, held, next_folder, unfinished
from mocokit.engine.health import check_weights
from mocokit.engine.record import Speaker
from mocokit.engine.runtime import World, choose_device, on_first, prepare
from mocokit.errors import UserError
from mocokit.views.params import canvas_bound
from mocokit.views.sheet import contact_sheet

SHEET_IMAGES = 8


@dataclass
class Job:
    """A run with everything it needs. `step` counts finished steps."""

    settings: Settings
    effect: sizes.InEffect
    world: World
    device: torch.device
    splits: Splits
    folder: RunFolder
    parts: Parts
    speaker: Speaker
    step: int = 0
    saved: int = -1  # the step of the checkpoint that was last read or written
    health: dict[str, Any] = field(default_factory=dict)  # as measured after the last step

    def images_of(self, step: int) -> int:
        """Images in the global batch of a step counted from 0; an epoch's last may have fewer."""
        batch = self.settings.train.batch_size
        return min(batch, self.effect.images - step % self.effect.steps_per_epoch * batch)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; numbers and text only."""
        return {
            "method": self.parts.method.state_dict(),
            "optimizer": self.parts.optimizer.state_dict(),
            "scaler": self.parts.scaler.state_dict(),
            "settings": settings_.to_yaml(self.settings),
            "fingerprint": self.splits.train.fingerprint,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.parts.method.load_state_dict(state["method"])
        self.parts.optimizer.load_state_dict(state["optimizer"])
        self.parts.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = int(state["step"])

    def save(self) -> None:
        """Write a checkpoint of this step, if it is not the last one, and drop the old ones.

        Raises NonFiniteLoss rather than keep weights that are not finite.
        """
        self.average_statistics()
        check_weights(self.parts.method, self.step)
        if not self.world.writes or self.saved == self.step:
            return
        self.saved = self.step
        checkpoint.save(self.folder.checkpoints, self.step, self.state())
        every = self.settings.save.milestone_epochs
        spe, epochs = self.effect.steps_per_epoch, self.settings.train.epochs
        milestones = frozenset(range(every * spe, epochs * spe + 1, every * spe) if every else ())
        checkpoint.prune(self.folder.checkpoints, self.settings.save.keep, milestones)

    def last_good(self) -> str:
        """Where a run that went wrong was still well, and what to try."""
        saved = checkpoint.steps(self.folder.checkpoints)
        where = self.folder.checkpoints / checkpoint.name_of(saved[-1]) if saved else None
        kept = f"the last good checkpoint is {where}" if where else "no checkpoint was due before"
        return f"{kept}; try a new run with a lower optim.lr or engine.precision=float32"

    def out_of_memory(self) -> str:
        """What to try when a step does not fit into the device's memory."""
        batch, groups = self.settings.train.batch_size, self.effect.groups
        held = self.settings.train.micro_batch or batch // self.world.size
        smallest = -(-batch // groups)
        what = f"step {self.step + 1} does not fit into the memory of {self.device}"
        if held <= smallest:
            remedy = "lower train.batch_size or views.size"
            return f"{what} even in pieces of one group of {smallest} images; {remedy}"
        piece = max(held // 2, smallest)
        return f"{what}; try --set train.micro_batch={piece}, which gives the same result in pieces"

    def average_statistics(self) -> None:
        """Make running statistics the mean over all groups of the world, before they are read."""
        if self.world.size == 1:
            return
        share = build.groups_of_process(self.settings, self.world) / self.effect.groups
        for name, tensor in self.parts.method.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.mul_(share)
                dist.all_reduce(tensor)


def open_job(
    asked: Settings,
    stated: Collection[str],
    splits: Splits,
    out: str | Path | None,
    resume: bool,
    world: World,
) -> Job:
    """Decide and build; write nothing. Raises UserError for what cannot be run or gone on with."""
    speaker = Speaker(world.writes)
    device = choose_device(asked.engine.device, world)
    fitted, notices = sizes.fit(asked, len(splits.train), stated)

    def decide() -> tuple[RunFolder, Settings]:
        folder = _choose_folder(fitted, splits, out, resume)
        stored = folder.settings() if folder.is_run else None
        settings = build.settle(fitted, device, stored)
        if stored is not None:
            _refuse_another_identity(folder, settings, splits)
        return folder, settings

    folder, settings = on_first(world, decide)
    effect = sizes.in_effect(settings, len(splits.train))
    prepare(device, int(settings.engine.threads), settings.engine.deterministic)
    for notice in notices:
        speaker.say(f"note: {notice}", "yellow")
    parts = build.build_parts(settings, effect, device)
    if out is None and not resume:  # chosen some seconds ago: another run may have taken it since
        folder = on_first(world, lambda: claim_folder(settings.recipe, splits.train.name))
    return Job(settings, effect, world, device, splits, folder, parts, speaker)


@contextlib.contextmanager
def begun(job: Job) -> Iterator[None]:
    """Hold the folder, write what comes before the first step, take up the newest checkpoint."""
    with held(job.folder) if job.world.writes else contextlib.nullcontext():
        if job.world.writes:
            _write_start(job)
        state = checkpoint.load_newest(job.folder.checkpoints)
        if state is not None:
            job.load(state)
            del state  # or it would live as long as the run
        yield


def _choose_folder(
    settings: Settings, splits: Splits, out: str | Path | None, resume: bool
) -> RunFolder:
    if out is not None:
        folder = RunFolder(Path(out))
        if not folder.is_run and folder.path.exists() and not folder.path.is_dir():
            raise UserError(f"--out {out} is a file; name a folder")
        if not folder.is_run and folder.path.is_dir() and any(folder.path.iterdir()):
            raise UserError(f"--out {out} holds other files and no run; name a new folder")
        if resume and not folder.is_run:
            raise UserError(f"--resume: there is no run in {out}; leave it out to start one")
        return folder
    name = splits.train.name
    if resume:
        for folder in unfinished(settings.recipe, name):
            try:
                stored = folder.settings()
            except UserError:
                continue  # another run's broken config.yaml
            device = torch.device("cpu")  # autos take the stored values, so the device is moot
            settled = build.settle(settings, device, stored)
            if not folder.conflicts(settled) and _same_data(folder, splits):
                return folder
        raise UserError(
            f"--resume: runs/ holds no unfinished run of {settings.recipe} on {name} with these "
            "settings; leave --resume out to start one"
        )
    return next_folder(settings.recipe, name)


def _same_data(folder: RunFolder, splits: Splits) -> bool:
    if not folder.index.is_file():
        return True  # killed before its first step: nothing to contradict
    return load_index(folder.index).fingerprint == splits.train.fingerprint


def _refuse_another_identity(folder: RunFolder, settings: Settings, splits: Splits) -> None:
    conflicts = folder.conflicts(settings)
    if not _same_data(folder, splits):
        conflicts.append("the data's images")
    if conflicts:
        raise UserError(
            f"{folder.path} holds another run; it differs in {', '.join(conflicts)}; "
            "name another --out, or state the same settings"
        )


def _write_start(job: Job) -> None:
    """config.yaml, images.idx and views.png, before the first step."""
    job.folder.create(job.settings, job.effect.as_dict())
    if job.folder.index.is_file():
        return
    job.splits.train.save_index(job.folder.index)
    spec = job.parts.spec
    canvases, _ = look(job.splits.train, SHEET_IMAGES, canvas_bound(spec))
    if canvases:
        seed, path = job.settings.seed, job.folder.sheet
        contact_sheet(spec, list(canvases.values()), list(canvases), seed, path)
