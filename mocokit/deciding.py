"""What the first process decides for all: where a run goes, with what settings, on which images."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch

from mocokit import build, sizes
from mocokit.config import Settings
from mocokit.data.source import Index, Source, Splits, load_index, renumbered
from mocokit.engine.folder import RunFolder, next_folder, unfinished
from mocokit.errors import UserError


class Decision(NamedTuple):
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
        index = kept_index(self.folder, train)
        if index.fingerprint != self.fingerprint:
            raise UserError("a process sees other images than the first: give all of them the same")
        return index


def kept_index(folder: RunFolder, train: Source) -> Index:
    """The index that a run began with; the data's own if it was killed before it had one."""
    return load_index(folder.index) if folder.index.is_file() else train.index()


class Asking(NamedTuple):
    """A command's settings, those its user stated, its images, and the device to run on."""

    settings: Settings
    stated: Collection[str]
    splits: Splits
    device: torch.device
    restarted: bool  # by torchrun, after processes had failed

    def anew(self, folder: RunFolder) -> Decision:
        """A new run in this folder."""
        self.splits.check_classes()
        settings, notices = sizes.fit(self.settings, len(self.splits.train), self.stated)
        settings = build.settle(settings, self.device, None)
        notices = [*self.splits.train.notes, *notices]
        return Decision(folder, settings, self.splits.train.fingerprint, notices, True)

    def going_on(self, folder: RunFolder) -> tuple[Decision, list[str]]:
        """The run that this folder holds, on the images it began with; what speaks against it."""
        stored = folder.settings()
        index = kept_index(folder, self.splits.train)
        found = renumbered(self.splits.train, index)
        settings, notices = sizes.fit(self.settings, index.length, self.stated)
        settings = build.settle(settings, self.device, stored)
        conflicts = folder.conflicts(settings) + ([] if found else ["the data's images"])
        changed = [f"since the run began, {found[1]}"] if found and found[1] else []
        notices = [*self.splits.train.notes, *changed, *notices]
        return Decision(folder, settings, index.fingerprint, notices, False), conflicts


def decide(asking: Asking, out: str | Path | None, resume: bool) -> Decision:
    recipe, name = asking.settings.recipe, asking.splits.train.name
    if out is not None:
        folder = _named_folder(out, resume)
        if not folder.is_run:
            return asking.anew(folder)
        decision, conflicts = asking.going_on(folder)
        if conflicts:
            raise UserError(
                f"{folder.path} holds another run; it differs in {', '.join(conflicts)}; "
                "name another --out, or state the same settings"
            )
        return decision
    if not (resume or asking.restarted):
        return asking.anew(next_folder(recipe, name))
    for folder in unfinished(recipe, name):
        try:
            decision, conflicts = asking.going_on(folder)
        except UserError:
            continue  # another run's broken config.yaml
        if not conflicts:
            return decision
    if not resume:  # it ended before it had a folder
        return asking.anew(next_folder(recipe, name))
    raise UserError(
        f"--resume: runs/ holds no unfinished run of {recipe} on {name} with these "
        "settings; leave --resume out to start one"
    )


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
