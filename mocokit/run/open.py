"""A run is started or resumed: where, with what settings, on which images; then it is built."""

import contextlib
import os
import shlex
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mocokit.data import depth
from mocokit.data.batch import read_spread
from mocokit.data.index import Index, load_index, save_index
from mocokit.data.source import Source, Splits
from mocokit.data.sources.packed import lacking
from mocokit.data.sources.several import renumbered
from mocokit.engine import checkpoint, identity
from mocokit.engine.bad_images import BadImages
from mocokit.engine.finite import check_progress
from mocokit.engine.folder import (
    RunFolder,
    claim_folder,
    differing,
    locked,
    next_folder,
    unfinished,
)
from mocokit.engine.identity import Identity
from mocokit.engine.record import Console
from mocokit.engine.runtime import choose_device, decided_by_rank_zero, instruction_set, prepare
from mocokit.engine.world import World, attempts
from mocokit.errors import NonFiniteLoss, UserError
from mocokit.files import printable, reason_of, show, writing
from mocokit.nets.batchnorm import (
    group_sizes,
    local_statistics,
    one_statistics_update,
    set_groups,
)
from mocokit.nets.heads import calibrate_head
from mocokit.run import build, extend
from mocokit.run.marks import marks_of, places_of, replaced
from mocokit.run.resident import hold
from mocokit.run.state import RunState
from mocokit.settings import from_yaml, sizes
from mocokit.settings.schema import Settings
from mocokit.transfer import Upload
from mocokit.views.sheet import contact_sheet
from mocokit.weights.encoder import view_spec

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


@contextlib.contextmanager
def begun(run: RunState) -> Iterator[None]:
    """Hold the folder, write what comes before the first step, take up the newest checkpoint.

    Raises UserError where all checkpoints are damaged or another run's.
    """
    with contextlib.ExitStack() as stack:
        if run.world.writes:
            run.hold = stack.enter_context(locked(run.folder))
            run.identity = identity.read(run.folder.identity)
        state = _newest(run)
        if run.world.writes:
            _write_start(run, state)
        if state is not None:
            _load(run, state)
            run.unwritten = unwritten(run)
            _tell_of_other_machine(run, state)
            del state  # or it would live as long as the run
        if run.bad.damaged and run.world.writes:
            lines = f"{run.bad.damaged:,} line{'s' * (run.bad.damaged > 1)}"
            run.console.note(
                f"{show(run.folder.bad_images)}: {lines} that nobody can read, left out"
            )
        run.bad.check()
        run.resident = hold(run.splits.train, run.bound, run.device)
        yield


def _load(run: RunState, state: dict[str, Any]) -> None:
    """Raises UserError for a state that does not fit, as of another version of a method."""
    try:
        run.load(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        path = run.folder.checkpoints / checkpoint.name_of(int(state["step"]))
        raise UserError(
            f"{show(path)} does not fit the run's settings ({printable(reason_of(error))}); it may "
            "be of another version of the method: begin a new run"
        ) from error


def unwritten(run: RunState) -> list[dict[str, Any]]:
    """The lines that metrics.jsonl did not take before the checkpoint of this step."""
    path = run.folder.checkpoints / checkpoint.name_of(run.step)
    lines = (checkpoint.label_of(path) or {}).get("unwritten")
    lines = lines if isinstance(lines, list) else []
    return [line for line in lines if isinstance(line, dict) and type(line.get("step")) is int]


def _tell_of_other_machine(run: RunState, state: dict[str, Any]) -> None:
    """A checkpoint of other processes or another processor: the sums have another order."""
    note = run.console.note
    before: Any = state.get("processes")
    if isinstance(before, int) and before != run.world.size:
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


def _newest(run: RunState) -> dict[str, Any] | None:
    """The newest good checkpoint, which the first process chooses: a disk may show others less."""
    state: dict[str, Any] | None = None

    def choose() -> int | None:
        nonlocal state
        folder, note = run.folder.checkpoints, run.console.note
        state = checkpoint.load_newest(folder, log=note, check=partial(_check, run))
        return None if state is None else int(state["step"])

    step = decided_by_rank_zero(run.world, choose)
    if step is not None and state is None:
        return checkpoint.load(run.folder.checkpoints / checkpoint.name_of(step))
    return state


def _check(run: RunState, state: dict[str, Any], label: checkpoint.Label) -> None:
    """Raises OtherRun for a checkpoint of another run, and UserError for one to be passed over."""
    step = int(state["step"])
    path = run.folder.checkpoints / checkpoint.name_of(step)
    try:
        theirs = from_yaml(state["settings"], str(path))
        pairs = differing(theirs, run.settings)
        # 0.1 stored fewer settings, which are "auto" when they are read.
        found = [f"{k} ({a} there, {b} here)" for k, a, b in pairs if a != "auto"]
        if state["fingerprint"] != run.splits.train.fingerprint:
            found.append("the data's images")
    except (UserError, KeyError, TypeError, AttributeError):
        found = ["its settings, which cannot be read"]
    if run.identity is not None:
        found += run.identity.differences(label)
    if found:
        raise checkpoint.OtherRun(
            f"{show(path)} is a checkpoint of another run: it differs in {', '.join(found)}; move "
            "it away, or name another --out"
        )
    try:
        check_progress(state["optimizer"], state["scaler"], step)
    except (NonFiniteLoss, KeyError) as error:
        raise UserError(f"{show(path)} is of no use: {error}") from None


def _write_start(run: RunState, state: dict[str, Any] | None) -> None:
    """config.yaml, images.idx, run.json and views.png, before the first step."""
    folder, train = run.folder, run.splits.train
    folder.create(run.settings, run.effect.as_dict())
    if not folder.index.is_file():
        with writing(folder.index, room=_size(train.index())):
            save_index(train.index(), folder.index)
    if run.identity is None:
        run.identity = _identity(run, state)
        with writing(folder.identity, room=1):
            identity.write(run.identity, folder.identity)
    assert run.hold is not None
    run.hold.number = run.identity.run
    if state is None and not folder.sheet.is_file():
        _write_sheet(run)


def _size(index: Index) -> int:
    """Bytes of an index, before it is compressed."""
    names = 0 if index.names is None else index.names.text.nbytes + index.names.ends.nbytes
    return names + (0 if index.labels is None else index.labels.nbytes)


def _identity(run: RunState, state: dict[str, Any] | None) -> Identity:
    """What is known of a run that has no run.json: all of it if it is new, little if it is old.

    A folder that lost the file goes on under the number that its newest checkpoint has.
    """
    number, start, train = identity.new_number(), "", run.splits.train
    if state is None:
        start = checkpoint.digest(run.parts.method.state_dict())
    else:
        path = run.folder.checkpoints / checkpoint.name_of(int(state["step"]))
        label = checkpoint.label_of(path) or {}
        number, start = str(label.get("run") or number), str(label.get("start") or "")
        if label.get("run"):
            run.console.note(f"{show(run.folder.identity)} was missing: it is written again")
    return Identity(number, start, train.fingerprint, places_of(train), marks_of(train))


def _write_sheet(run: RunState) -> None:
    """A run does not stop for its contact sheet: what cannot be written is said."""
    canvases, _ = read_spread(run.splits.train, SHEET_IMAGES, run.bound)
    if not canvases:
        return
    seed, path, scored = run.settings.seed, run.folder.sheet, view_spec(run.settings)
    shown = list(canvases.values()), list(canvases)
    try:
        contact_sheet(run.parts.specs, *shown, seed, path, scored=scored)
    except OSError as error:
        run.console.note(f"{show(path)} could not be written ({reason_of(error)})")


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
