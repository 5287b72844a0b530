"""A run with everything it needs, and what is saved of it."""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocokit import settings as settings_
from mocokit.data.batch import Batch
from mocokit.data.index import save_index
from mocokit.data.source import Source, Splits
from mocokit.engine import checkpoint, identity
from mocokit.engine.average import average_statistics
from mocokit.engine.bad_images import Bad, BadImages
from mocokit.engine.finite import check_progress, check_weights
from mocokit.engine.folder import Hold, RunFolder
from mocokit.engine.identity import Identity
from mocokit.engine.optim import check_fits
from mocokit.engine.record import Console
from mocokit.engine.runtime import instruction_set
from mocokit.engine.world import World
from mocokit.files import show, writing
from mocokit.nets.batchnorm import group_sizes, set_groups, share_of_groups
from mocokit.run import build
from mocokit.run.build import Parts
from mocokit.run.resident import Resident
from mocokit.settings import sizes as sizes_
from mocokit.settings.schema import Settings
from mocokit.transfer import Upload
from mocokit.views.params import draw_table
from mocokit.views.views import View, ViewsOnDemand, make_views

HELD_VIEWS = 2**30  # bytes of views that a step in pieces holds at once


@dataclass
class RunState:
    """A run with everything it needs. `step` counts finished steps."""

    settings: Settings
    effect: sizes_.Resolved
    world: World
    device: torch.device
    splits: Splits
    folder: RunFolder
    parts: Parts
    console: Console
    bad: BadImages
    upload: Upload
    resident: Resident | None = None
    step: int = 0
    saved: int = -1  # the step of the checkpoint that was last read or written
    health: dict[str, Any] = field(default_factory=dict)  # as measured after the last step
    hold: Hold | None = None  # on the folder; None until it is locked, and where none writes
    identity: Identity | None = None  # of the folder; None in the same cases
    unwritten: list[dict[str, Any]] = field(default_factory=list)  # lines that metrics.jsonl lacks

    @property
    def bound(self) -> int:
        """The short side in pixels that canvases are reduced to."""
        return build.largest_canvas(self.parts.specs.values())

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
            "instruction_set": instruction_set(self.device),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.parts.method.load_state_dict(state["method"])
        self.parts.optimizer.load_state_dict(state["optimizer"])
        check_fits(self.parts.optimizer)
        self.parts.scaler.load_state_dict(state["scaler"])
        self.bad.load(state["bad_images"])
        self.step = self.saved = int(state["step"])

    def save(self) -> None:
        """Write a checkpoint of this step, if it is not there, and drop the old ones.

        Raises NonFiniteLoss rather than keep what is not finite, and MocokitError where nothing
        can be written.
        """
        self.bad.share()
        check_weights(self.parts.method, self.step)
        parts = self.parts
        check_progress(parts.optimizer.state_dict(), parts.scaler.state_dict(), self.step)
        if not self.world.writes:
            return
        self.check_folder()
        self.write_missing()
        folder = self.folder.checkpoints
        if self.saved == self.step and checkpoint.is_saved(folder, self.step):
            checkpoint.point(folder / checkpoint.name_of(self.step))
            return
        label: dict[str, Any] = {} if self.identity is None else self.identity.label
        if self.unwritten:
            label["unwritten"] = self.unwritten
        checkpoint.save(folder, self.step, self.state(), label)
        self.saved = self.step
        every = self.settings.save.milestone_epochs
        spe, epochs = self.effect.steps_per_epoch, self.settings.train.epochs
        milestones = frozenset(range(every * spe, epochs * spe + 1, every * spe) if every else ())
        keep = self.settings.save.keep
        if kept := checkpoint.prune(folder, keep, milestones, newest=self.step):
            self.console.note(kept)

    def finished(self) -> dict[str, Any] | None:
        """The result of the run in the folder if it is finished, else None.

        A backbone that is gone is written again, where there is a checkpoint to take it from.
        """
        result = self.folder.result()
        if result is None or self.folder.backbone.is_file():
            return result
        there = checkpoint.is_saved(self.folder.checkpoints, int(result["step"]))
        return None if there else result

    def check_folder(self) -> None:
        """Raises MocokitError if the run's folder is gone, or is another run's by now."""
        if self.hold is not None:
            self.hold.check()

    def write_missing(self) -> None:
        """Write again what was deleted, while the run goes on, of the files that say what it is.

        What was put in their place stays. Raises MocokitError.
        """
        if self.hold is None:
            return
        if not os.path.lexists(self.folder.config):
            self.folder.write_config(self.settings, self.effect.as_dict())
        if not os.path.lexists(self.folder.index):
            self.write_index()
        if not os.path.lexists(self.folder.identity):
            self.write_identity()

    def write_index(self) -> None:
        """Which image has which number. Raises MocokitError."""
        index = self.splits.train.index()
        names = 0 if index.names is None else index.names.text.nbytes + index.names.ends.nbytes
        labels = 0 if index.labels is None else index.labels.nbytes
        with writing(self.folder.index, room=names + labels):
            save_index(index, self.folder.index)

    def write_identity(self) -> None:
        """Which run the folder holds. Raises MocokitError."""
        if self.identity is not None:
            with writing(self.folder.identity, room=1):
                identity.write(self.identity, self.folder.identity)

    def set_groups(self, images: int) -> None:
        """Cut the next batch, of this many images, as the settings say, whatever the method does.

        This process holds whole groups. A method that encodes in pieces sets its own.
        """
        whole = self.settings.method.batch_norm == "whole"
        sizes = group_sizes(images, sizes_.count_groups(self.settings, images))
        share = share_of_groups(len(sizes), self.world.rank, self.world.size)
        set_groups(self.parts.method, None if whole else tuple(sizes[share]))

    def views(self, step: int, batch: Batch) -> tuple[View, ...]:
        """The method's views of a batch, drawn from chance and made on the device.

        In a step that is done in pieces, views too large to hold are made again for each piece.
        """
        epoch, specs = step // self.effect.steps_per_epoch, list(self.parts.specs.values())
        sizes = batch.heights, batch.widths
        pixels, starts = self.canvases(batch)
        held = len(batch.index) * sum(spec.bytes for spec in specs)
        make: Callable[..., Tensor | ViewsOnDemand] = make_views
        if self.settings.train.micro_batch and held > HELD_VIEWS:
            make = ViewsOnDemand
        views = []
        for number, spec in enumerate(specs):
            table = draw_table(spec, self.settings.seed, epoch, batch.index, number, *sizes)
            images = make(spec, table, pixels, *sizes, self.device, starts)
            views.append(View(images, table, *sizes))
        return tuple(views)

    def batches(
        self, loader: Iterable[tuple[int, Batch]]
    ) -> Generator[tuple[int, Batch, float], None, None]:
        """The loader's (step, batch), with the seconds that each was waited for. Close it."""
        batches = iter(loader)
        try:
            while True:
                start = time.perf_counter()
                with self.between_steps():
                    item = next(batches, None)
                if item is None:
                    return
                yield *item, time.perf_counter() - start
        finally:
            if isinstance(batches, Generator):  # or a traceback would keep its workers alive
                batches.close()

    def note_bad(self, bad: Bad, logged: bool) -> None:
        """After a step: images that could not be read. All processes learn of them now and then."""
        self.bad.note(bad, self.step - 1)
        if logged or self.step % self.effect.steps_per_epoch == 0:
            self.bad.share()

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
                self.console.note(f"saved after step {self.step}, before what follows")
            raise

    def last_good(self) -> str:
        """Where a run that went wrong was still well, and what to try."""
        folder = self.folder.checkpoints
        saved = [step for step in checkpoint.steps(folder) if checkpoint.is_saved(folder, step)]
        kept = "no checkpoint was due before"
        if saved:
            kept = f"the last good checkpoint is {show(folder / checkpoint.name_of(saved[-1]))}"
        return f"{kept}; try a new run with a lower optim.lr or engine.precision=float32"

    def out_of_memory(self) -> str:
        """What to try when a step does not fit into the device's memory."""
        batch, groups = self.settings.train.batch_size, self.effect.groups
        if self.settings.method.batch_norm == "whole":
            return (
                f"step {self.step + 1} does not fit into the memory of {self.device}; lower "
                "train.batch_size, or set method.batch_norm=groups, which can be done in pieces"
            )
        share = batch // self.world.size
        held = min(self.settings.train.micro_batch or share, share)
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
