"""A run is started or resumed: where, with what settings, on which images; then it is built.

`run.begin` then holds its folder and takes its newest checkpoint.
"""

import os
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

from mocokit.data import depth
from mocokit.data.index import Index, load_index
from mocokit.data.source import Source, Splits
from mocokit.data.sources.packed import lacking
from mocokit.data.sources.several import renumbered
from mocokit.engine import checkpoint, identity
from mocokit.engine.bad_images import BadImages
from mocokit.engine.folder import (
    RunFolder,
    claim_folder,
    next_folder,
    unfinished,
)
from mocokit.engine.record import Console
from mocokit.engine.runtime import choose_device, decided_by_rank_zero, prepare
from mocokit.engine.world import World, attempts
from mocokit.errors import UserError
from mocokit.files import printable, show
from mocokit.run import build, extend
from mocokit.run.marks import replaced
from mocokit.run.state import RunState
from mocokit.settings import sizes
from mocokit.settings.schema import Settings
from mocokit.transfer import Upload


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
    """The index that a run began with; the data's own where the folder has none."""
    return load_index(folder.index) if folder.index.is_file() else train.index()


def first_index(folder: RunFolder, settings: Settings, train: Source) -> Index:
    """The index that a run began with, or begins with: its parent's where it lengthens one."""
    parents = None if folder.index.is_file() else extend.parents_index(settings, train)
    return kept_index(folder, train) if parents is None else parents


def lost_index(folder: RunFolder, train: Source) -> str:
    """What to tell if the run had an index that is gone; empty if it never had one.

    Raises UserError for other images than those it began with, as far as their names tell.
    """
    before = identity.read(folder.identity)
    if folder.index.is_file() or (before is None and not checkpoint.steps(folder.checkpoints)):
        return ""
    if before is not None and before.fingerprint not in ("", train.fingerprint):
        raise UserError(
            f"{show(folder.index)} is missing, and {train.name} is not what the run began with, so "
            "nobody can tell which image had which number: restore the file, or the images"
        )
    return f"{show(folder.index)} was missing: it is written again from the images of {train.name}"


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
        lost = lost_index(folder, self.splits.train)
        index = first_index(folder, self.settings, self.splits.train)
        found = renumbered(self.splits.train, index)
        settings, notices = sizes.fit(self.settings, index.length, self.stated)
        settings = build.settle(settings, self.device, stored)
        conflicts = folder.conflicts(settings) + ([] if found else ["the data's images"])
        changed = [f"since the run began, {found[1]}"] if found and found[1] else []
        if found and (before := identity.read(folder.identity)):
            changed.append(replaced(before, self.splits.train))
        told = [*filter(None, [lost, *changed]), *notices, *sizes.scored_anew(settings)]
        notices = [*self.splits.train.notes, *told]
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
                f"{show(folder.path)} holds another run; it differs in {', '.join(conflicts)}; "
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
    if not folder.is_run and checkpoint.steps(folder.checkpoints):
        raise UserError(
            f"--out {out} has checkpoints, but its config.yaml is gone; put it back to resume, or "
            "name a new folder"
        )
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
    index = decision.images(splits.train)
    depth.keep(splits, index.top)
    found = renumbered(splits.train, index)
    if found is None:
        raise UserError("a process sees other images than the first: give all of them the same")
    splits = splits._replace(train=found[0]).numbered_by(found[0].classes)
    effect = sizes.resolve(settings, len(splits.train))
    prepare(device, int(settings.engine.threads), settings.engine.deterministic)
    for notice in [*notices, *build.unscored(settings, splits, device)]:
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
