"""A run about to go: settings decided, folder opened, parts built, newest checkpoint taken up."""

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit import build, settings as settings_, sizes
from mocokit.build import Parts
from mocokit.config import Settings
from mocokit.data.batch import Batch, look
from mocokit.data.packed import lacking
from mocokit.data.source import Source, Splits, renumbered, save_index
from mocokit.deciding import Asking, decide
from mocokit.engine import checkpoint
from mocokit.engine.average import average_statistics
from mocokit.engine.bad_images import BadImages
from mocokit.engine.folder import RunFolder, claim_folder, held
from mocokit.engine.health import check_weights
from mocokit.engine.record import Speaker
from mocokit.engine.runtime import choose_device, on_first, prepare
from mocokit.engine.upload import Upload
from mocokit.engine.world import World
from mocokit.errors import UserError
from mocokit.resident import Resident, hold
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
    bad: BadImages
    upload: Upload
    resident: Resident | None = None
    step: int = 0
    saved: int = -1  # the step of the checkpoint that was last read or written
    health: dict[str, Any] = field(default_factory=dict)  # as measured after the last step

    def canvases(self, batch: Batch) -> tuple[Tensor, NDArray[np.int64] | None]:
        """Pixels on the device, and where a batch's images begin; None: one after another."""
        if self.resident is not None:
            return self.resident.canvases(batch.index)
        return self.upload(batch.pixels), None

    def unread(self) -> Source:
        """The images to load: of those on the device already, the numbers alone."""
        return self.splits.train if self.resident is None else self.resident.unread

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
            "bad_images": self.bad.state(),
            "processes": self.world.size,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.parts.method.load_state_dict(state["method"])
        self.parts.optimizer.load_state_dict(state["optimizer"])
        self.parts.scaler.load_state_dict(state["scaler"])
        self.bad.load(state["bad_images"])
        self.step = self.saved = int(state["step"])

    def save(self) -> None:
        """Write a checkpoint of this step, if it is not the last one, and drop the old ones.

        Raises NonFiniteLoss rather than keep weights that are not finite.
        """
        self.bad.share()
        check_weights(self.parts.method, self.step)
        if not self.world.writes or self.saved == self.step:
            return
        self.saved = self.step
        checkpoint.save(self.folder.checkpoints, self.step, self.state())
        every = self.settings.save.milestone_epochs
        spe, epochs = self.effect.steps_per_epoch, self.settings.train.epochs
        milestones = frozenset(range(every * spe, epochs * spe + 1, every * spe) if every else ())
        checkpoint.prune(self.folder.checkpoints, self.settings.save.keep, milestones)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Work that leaves the state as it is: if it fails, what was trained before it is saved.

        Not with several processes, of which the others would wait for this one.
        """
        try:
            yield
        except Exception:
            if self.world.size == 1 and self.step > max(self.saved, 0):
                self.save()
                self.speaker.note(f"saved after step {self.step}, before what follows")
            raise

    def last_good(self) -> str:
        """Where a run that went wrong was still well, and what to try."""
        saved = checkpoint.steps(self.folder.checkpoints)
        where = self.folder.checkpoints / checkpoint.name_of(saved[-1]) if saved else None
        kept = f"the last good checkpoint is {where}" if where else "no checkpoint was due before"
        return f"{kept}; try a new run with a lower optim.lr or engine.precision=float32"

    def out_of_memory(self) -> str:
        """What to try when a step does not fit into the device's memory."""
        batch, groups = self.settings.train.batch_size, self.effect.groups
        if self.settings.method.batch_norm == "whole":
            return (
                f"step {self.step + 1} does not fit into the memory of {self.device}; lower "
                "train.batch_size, or set method.batch_norm=groups, which can be done in pieces"
            )
        held = self.settings.train.micro_batch or batch // self.world.size
        smallest = -(-batch // groups)
        what = f"step {self.step + 1} does not fit into the memory of {self.device}"
        if held <= smallest:
            remedy = "lower train.batch_size or views.size"
            return f"{what} even in pieces of one group of {smallest} images; {remedy}"
        piece = max(held // 2, smallest)
        return f"{what}; try --set train.micro_batch={piece}, which gives the same result in pieces"

    def average_statistics(self, images: int) -> None:
        """After a step on a batch of this many images: running statistics are the world's."""
        if self.world.size > 1:
            share = build.share_of_process(self.settings, self.world, images)
            average_statistics(self.parts.method, share)


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
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    asking = Asking(asked, stated, splits, device, restarted)
    decision = on_first(world, lambda: decide(asking, out, resume))
    folder, settings, notices = decision.folder, decision.settings, decision.notices
    found = renumbered(splits.train, decision.images(splits.train))
    if found is None:
        raise UserError("a process sees other images than the first: give all of them the same")
    splits = splits._replace(train=found[0]).numbered_by(found[0].classes)
    effect = sizes.in_effect(settings, len(splits.train))
    prepare(device, int(settings.engine.threads), settings.engine.deterministic)
    for notice in notices:
        speaker.note(notice)
    parts = build.build_parts(settings, effect, device)
    if out is None and decision.new:  # chosen some seconds ago: another may have taken it since
        folder = on_first(world, lambda: claim_folder(settings.recipe, splits.train.name))
    share, spe = settings.data.bad_share, effect.steps_per_epoch
    bad = BadImages(folder.bad_images, len(splits.train), share, spe, world)
    bound = canvas_bound(parts.spec)
    for lack in lacking(splits.train, bound):
        speaker.note(lack)
    upload = Upload(device)
    return Job(settings, effect, world, device, splits, folder, parts, speaker, bad, upload)


@contextlib.contextmanager
def begun(job: Job) -> Iterator[None]:
    """Hold the folder, write what comes before the first step, take up the newest checkpoint."""
    with held(job.folder) if job.world.writes else contextlib.nullcontext():
        if job.world.writes:
            _write_start(job)
        note = job.speaker.note
        state = _newest(job)
        if state is not None:
            job.load(state)
            if (before := state["processes"]) != job.world.size:
                now = "is 1" if job.world.size == 1 else f"are {job.world.size}"
                note(
                    f"the checkpoint was written by {before} process{'es' * (before > 1)}, now "
                    f"there {now}: the same computation, up to the order of sums"
                )
            del state  # or it would live as long as the run
        job.bad.check()
        job.resident = hold(job.splits.train, canvas_bound(job.parts.spec), job.device)
        yield


def _newest(job: Job) -> dict[str, Any] | None:
    """The newest good checkpoint, which the first process chooses: a disk may show others less."""
    state: dict[str, Any] | None = None

    def choose() -> int | None:
        nonlocal state
        state = checkpoint.load_newest(job.folder.checkpoints, tell=job.speaker.note)
        return None if state is None else int(state["step"])

    step = on_first(job.world, choose)
    if step is not None and state is None:
        return checkpoint.load(job.folder.checkpoints / checkpoint.name_of(step))
    return state


def _write_start(job: Job) -> None:
    """config.yaml, images.idx and views.png, before the first step."""
    job.folder.create(job.settings, job.effect.as_dict())
    if job.folder.index.is_file():
        return
    save_index(job.splits.train.index(), job.folder.index)
    spec = job.parts.spec
    canvases, _ = look(job.splits.train, SHEET_IMAGES, canvas_bound(spec))
    if canvases:
        seed, path = job.settings.seed, job.folder.sheet
        contact_sheet(spec, list(canvases.values()), list(canvases), seed, path)
