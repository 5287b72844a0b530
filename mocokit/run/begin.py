"""What comes before the first step: the folder is held, its files written, a checkpoint taken."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist

from mocokit.data.batch import read_spread
from mocokit.engine import checkpoint, identity
from mocokit.engine.finite import check_progress
from mocokit.engine.folder import (
    differing,
    locked,
)
from mocokit.engine.identity import Identity
from mocokit.engine.runtime import decided_by_rank_zero, instruction_set
from mocokit.engine.world import World
from mocokit.errors import NonFiniteLoss, UserError
from mocokit.files import printable, reason_of, show
from mocokit.nets.batchnorm import (
    group_sizes,
    local_statistics,
    one_statistics_update,
    set_groups,
)
from mocokit.nets.heads import calibrate_head
from mocokit.run import build
from mocokit.run.marks import marks_of, places_of
from mocokit.run.resident import hold
from mocokit.run.state import RunState
from mocokit.settings import from_yaml
from mocokit.views.sheet import contact_sheet
from mocokit.weights.encoder import view_spec

SHEET_IMAGES = 8


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
        why = f"it lacks {error}" if isinstance(error, KeyError) else reason_of(error)
        raise UserError(
            f"{show(path)} does not fit the run's settings ({printable(why)}); it may "
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
    except NonFiniteLoss as error:
        raise UserError(f"{show(path)} is of no use: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{show(path)} is of no use: the optimiser's state cannot be read"
        ) from None


def _write_start(run: RunState, state: dict[str, Any] | None) -> None:
    """config.yaml, images.idx, run.json and views.png, before the first step."""
    folder = run.folder
    folder.create(run.settings, run.effect.as_dict())
    if not folder.index.is_file():
        run.write_index()
    if run.identity is None:
        run.identity = _identity(run, state)
        run.write_identity()
    assert run.hold is not None
    run.hold.number = run.identity.run
    if state is None and not folder.sheet.is_file():
        _write_sheet(run)


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
            set_groups(method.encoder, 1)  # until the loop sets those of its first batch
            calibrate_head(method.encoder, views[:first])
    if run.world.size > 1:
        for parameter in method.encoder.parameters():
            dist.broadcast(parameter.data, 0)
    method.encoder_replaced()
