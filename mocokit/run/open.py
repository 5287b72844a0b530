"""A run is started or resumed: where, with what settings, on which images; then it is built."""

import contextlib
import os
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mocokit.data.batch import read_spread
from mocokit.data.index import Index, load_index, save_index
from mocokit.data.source import Source, Splits
from mocokit.data.sources.packed import lacking
from mocokit.data.sources.several import renumbered
from mocokit.engine import checkpoint
from mocokit.engine.bad_images import BadImages
from mocokit.engine.folder import RunFolder, claim_folder, locked, next_folder, unfinished
from mocokit.engine.record import Console
from mocokit.engine.runtime import choose_device, decided_by_rank_zero, instruction_set, prepare
from mocokit.engine.world import World, attempts
from mocokit.errors import UserError
from mocokit.files import printable
from mocokit.nets.batchnorm import (
    group_sizes,
    local_statistics,
    one_statistics_update,
    set_groups,
)
from mocokit.nets.heads import calibrate_head
from mocokit.run import build, extend
from mocokit.run.resident import hold
from mocokit.run.state import RunState
from mocokit.settings import sizes
from mocokit.settings.schema import Settings
from mocokit.transfer import Upload
from mocokit.views.sheet import contact_sheet

SHEET_IMAGES = 8


class RunPlan(NamedTuple):
    """What the first process decides for all: where, how, on which images, and what to tell.

    It is sent to the others, so it names the images only: a large index is for each to read.
    """

    folder: RunFolder
    settings: Settings
    fingerprint: str  # of the images' index: the folder's if there is one, else the data's own
    notices: list[str]
    new: bool

    def images(self, train: Source) -> Index:
        """The index on this process. Raises UserError where it is another."""
        index = first_index(self.folder, self.settings, train)
        if index.fingerprint != self.fingerprint:
            raise UserError("a process sees other images than the first: give all of them the same")
        return index


def kept_index(folder: RunFolder, train: Source) -> Index:
    """The index that a run began with; the data's own if it was killed before it had one."""
    return load_index(folder.index) if folder.index.is_file() else train.index()


def first_index(folder: RunFolder, settings: Settings, train: Source) -> Index:
    """The index that a run began with, or begins with: its parent's where it lengthens one."""
    parents = None if folder.index.is_file() else extend.parents_index(settings, train)
    return kept_index(folder, train) if parents is None else parents


class RunRequest(NamedTuple):
    """A command's settings, those its user stated, its images, and the device to run on."""

    settings: Settings
    stated: Collection[str]
    splits: Splits
    device: torch.device
    restarted: bool  # by torchrun, after processes had failed

    def start(self, folder: RunFolder) -> RunPlan:
        """A new run in this folder."""
        self.splits.check_classes()
        index = first_index(folder, self.settings, self.splits.train)
        found = renumbered(self.splits.train, index)
        if found is None:  # a new folder has an index only if its run lengthens another
            raise UserError(
                f"the images are not those of {self.settings.train.parent}, which is lengthened; "
                "name their new location after it"
            )
        settings, notices = sizes.fit(self.settings, index.length, self.stated)
        settings = build.settle(settings, self.device, None)
        notices = [*self.splits.train.notes, *filter(None, [found[1]]), *notices]
        return RunPlan(folder, settings, index.fingerprint, notices, True)

    def resume(self, folder: RunFolder) -> tuple[RunPlan, list[str]]:
        """The run that this folder holds, on the images it began with; what speaks against it."""
        stored = folder.settings()
        index = first_index(folder, self.settings, self.splits.train)
        found = renumbered(self.splits.train, index)
        settings, notices = sizes.fit(self.settings, index.length, self.stated)
        settings = build.settle(settings, self.device, stored)
        conflicts = folder.conflicts(settings) + ([] if found else ["the data's images"])
        changed = [f"since the run began, {found[1]}"] if found and found[1] else []
        notices = [*self.splits.train.notes, *changed, *notices]
        return RunPlan(folder, settings, index.fingerprint, notices, False), conflicts


def decide(asking: RunRequest, out: str | Path | None, resume: bool) -> RunPlan:
    recipe, name = asking.settings.recipe, asking.splits.train.name
    if out is not None:
        folder = _named_folder(out, resume)
        if not folder.is_run:
            return asking.start(folder)
        decision, conflicts = asking.resume(folder)
        if conflicts:
            raise UserError(
                f"{folder.path} holds another run; it differs in {', '.join(conflicts)}; "
                f"name another --out, or state the same settings{_longer(asking.settings, folder)}"
            )
        return decision
    if not (resume or asking.restarted):
        return asking.start(next_folder(recipe, name))
    for folder in unfinished(recipe, name):
        try:
            decision, conflicts = asking.resume(folder)
        except UserError:
            continue  # another run's broken config.yaml
        if not conflicts:
            return decision
    if not resume:  # it ended before it had a folder
        return asking.start(next_folder(recipe, name))
    raise UserError(
        f"--resume: runs/ holds no unfinished run of {recipe} on {name} with these "
        "settings; leave --resume out to start one"
    )


def _longer(asked: Settings, folder: RunFolder) -> str:
    """The remedy for more epochs than a finished run has."""
    more = asked.train.epochs - folder.settings().train.epochs
    if more <= 0 or folder.result() is None:
        return ""
    words = printable(shlex.join(["mocokit", "pretrain", "--extend", str(more), str(folder.path)]))
    return f"; a finished run is lengthened by: {words}"


def _named_folder(out: str | Path, resume: bool) -> RunFolder:
    folder = RunFolder(Path(out))
    if not folder.is_run and folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    empty = folder.is_begun or not (folder.path.is_dir() and any(folder.path.iterdir()))
    if not folder.is_run and not empty:
        raise UserError(f"--out {out} holds other files and no run; name a new folder")
    if resume and not folder.is_run:
        raise UserError(f"--resume: there is no run in {out}; leave it out to start one")
    return folder


def open_run(
    asked: Settings,
    stated: Collection[str],
    splits: Splits,
    out: str | Path | None,
    resume: bool,
    world: World,
) -> RunState:
    """Decide and build; write nothing. Raises UserError for what cannot be run or gone on with."""
    console = Console(world.writes)
    device = choose_device(asked.engine.device, world)
    restarted = attempts(os.environ) != 0
    asking = RunRequest(asked, stated, splits, device, restarted)
    decision = decided_by_rank_zero(world, lambda: decide(asking, out, resume))
    folder, settings, notices = decision.folder, decision.settings, decision.notices
    found = renumbered(splits.train, decision.images(splits.train))
    if found is None:
        raise UserError("a process sees other images than the first: give all of them the same")
    splits = splits._replace(train=found[0]).numbered_by(found[0].classes)
    effect = sizes.resolve(settings, len(splits.train))
    prepare(device, int(settings.engine.threads), settings.engine.deterministic)
    for notice in notices:
        console.note(notice)
    parts = build.build_parts(settings, effect, device)
    extend.load_parent(settings, folder, parts.method)
    if out is None and decision.new:  # chosen some seconds ago: another may have taken it since
        folder = decided_by_rank_zero(
            world, lambda: claim_folder(settings.recipe, splits.train.name)
        )
    share, spe = settings.data.bad_share, effect.steps_per_epoch
    bad = BadImages(folder.bad_images, len(splits.train), share, spe, world)
    bound = build.largest_canvas(parts.specs.values())
    for lack in lacking(splits.train, bound):
        console.note(lack)
    upload = Upload(device)
    return RunState(settings, effect, world, device, splits, folder, parts, console, bad, upload)


@contextlib.contextmanager
def begun(run: RunState) -> Iterator[None]:
    """Hold the folder, write what comes before the first step, take up the newest checkpoint."""
    with locked(run.folder) if run.world.writes else contextlib.nullcontext():
        if run.world.writes:
            _write_start(run)
        note = run.console.note
        state = _newest(run)
        if state is not None:
            run.load(state)
            if (before := state["processes"]) != run.world.size:
                now = "is 1" if run.world.size == 1 else f"are {run.world.size}"
                note(
                    f"the checkpoint was written by {before} process{'es' * (before > 1)}, now "
                    f"there {now}: the same computation, up to the order of sums"
                )
            before, now = state.get("instruction_set"), instruction_set(run.device)
            if before is not None and before != now:  # 0.1 did not record it
                note(
                    f"the checkpoint was computed with {before}, and this machine has {now}: sums "
                    "are rounded in another order, so the run is no longer equal bit for bit"
                )
            del state  # or it would live as long as the run
        run.bad.check()
        run.resident = hold(run.splits.train, run.bound, run.device)
        yield


def _newest(run: RunState) -> dict[str, Any] | None:
    """The newest good checkpoint, which the first process chooses: a disk may show others less."""
    state: dict[str, Any] | None = None

    def choose() -> int | None:
        nonlocal state
        state = checkpoint.load_newest(run.folder.checkpoints, log=run.console.note)
        return None if state is None else int(state["step"])

    step = decided_by_rank_zero(run.world, choose)
    if step is not None and state is None:
        return checkpoint.load(run.folder.checkpoints / checkpoint.name_of(step))
    return state


def _write_start(run: RunState) -> None:
    """config.yaml, images.idx and views.png, before the first step."""
    run.folder.create(run.settings, run.effect.as_dict())
    if run.folder.index.is_file():
        return
    save_index(run.splits.train.index(), run.folder.index)
    canvases, _ = read_spread(run.splits.train, SHEET_IMAGES, run.bound)
    if canvases:
        seed, path = run.settings.seed, run.folder.sheet
        contact_sheet(run.parts.specs, list(canvases.values()), list(canvases), seed, path)


def calibrate_on_first_group(run: RunState) -> None:
    """Scale the head's start on the first group of the first batch, whatever a process's share."""
    method = run.parts.method
    if run.world.writes:
        known = run.settings, run.unread(), run.bound, World(), run.device, 0, run.bad.known
        views = run.views(0, build.build_loader(*known).batch_at(0))[0][:]
        first = group_sizes(run.images_of(0), run.effect.groups)[0]
        with one_statistics_update(method.encoder, 0), local_statistics(method.encoder):
            set_groups(method.encoder, 1)
            calibrate_head(method.encoder, views[:first])
        set_groups(method.encoder, None)  # as a resumed run has it: not every method sets them
    if run.world.size > 1:
        for parameter in method.encoder.parameters():
            dist.broadcast(parameter.data, 0)
    method.encoder_replaced()
