"""Lengthening: a new run that starts where a finished one ended.

It starts from the parent's last weights, key encoder and queue (the method's state), with a fresh
optimiser: the parent's momentum belongs to a rate that has fallen to almost nothing. Its seed is
another, so it repeats no order and no view of the parent. The parent is only read.
"""

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocokit.data.index import Index, load_index
from mocokit.data.source import Source
from mocokit.engine import checkpoint
from mocokit.engine.folder import RunFolder
from mocokit.errors import UserError
from mocokit.files import printable, show
from mocokit.methods.method import Method
from mocokit.settings import get
from mocokit.settings.schema import Settings

SHARE = 0.1  # of the recipe's learning rate, from which a cosine falls to its end
STATE = ("net.", "method.")  # settings on which the parent's state depends


def lengthened(
    run: str | None, epochs: int, changes: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The config.yaml of a finished run, and the changes by which a new run lengthens it.

    `epochs` are those of the new run. `changes` are the user's, and take precedence. Raises
    UserError if the run is not finished, or a change would not fit to its state.
    """
    if run is not None and Path(run).name == "config.yaml":
        run = str(Path(run).parent)
    if run is None or not RunFolder(Path(run)).is_run:
        named = "nothing" if run is None else show(run)
        raise UserError(f"--extend {epochs} needs a run folder, not {named}: name a finished run")
    folder = RunFolder(Path(run).resolve())
    settings, result = folder.settings(), folder.result()
    if not folder.metrics.is_file():
        raise UserError(
            f"{show(folder.metrics)} is not there, which tells whether that run is finished; "
            "restore it"
        )
    if result is None:
        raise UserError(
            f"{show(run)} is not finished, so it is resumed and not lengthened: "
            + printable(shlex.join(["mocokit", "pretrain", str(folder.config), "--out", run]))
        )
    _check(settings, changes)
    state = _last(folder)
    if state["step"] != result["step"]:
        raise UserError(f"the last checkpoint of {show(run)} is not that of its end; restore it")
    weights = checkpoint.digest(state["method"])
    # The rate of a lengthened run is a tenth of its recipe's already.
    rate = settings.optim.lr * (SHARE if settings.train.parent is None else 1)
    own = {"optim.lr": rate, "optim.lr_batch": settings.optim.lr_batch}
    return str(folder.config), {
        **({} if "optim.lr" in changes else own),
        "optim.schedule": "cosine",
        "optim.per": "step",
        "optim.first_epoch": 0,
        "optim.warmup_epochs": 0.0,
        "net.calibrate_head": False,
        "seed": _seed(settings.seed, weights),
        **changes,
        "train.epochs": epochs,
        "train.parent": str(folder.path),
        "train.parent_weights": weights,
    }


def _check(settings: Settings, changes: Mapping[str, Any]) -> None:
    if "train.epochs" in changes:
        raise UserError("--epochs and --extend are both numbers of epochs; keep --extend")
    for path, value in changes.items():
        if path.startswith("train.parent"):
            raise UserError(f"{path} follows from --extend; leave it out")
        if path.startswith(STATE) and str(value) != str(get(settings, path)):
            raise UserError(
                f"{path} is {get(settings, path)} in the run to lengthen, whose weights and queue "
                "belong to it; leave it out, or start a new run"
            )
    if changes.get("seed") == settings.seed:
        raise UserError(
            f"seed {settings.seed} is that of the run to lengthen, whose views would be repeated; "
            "leave it out, or name another"
        )


def _seed(before: int, weights: str) -> int:
    """Another seed, which follows from the parent's and its weights."""
    found = hashlib.sha256(f"{before}/{weights}".encode()).digest()
    return int.from_bytes(found[:6], "big")


def _last(folder: RunFolder) -> dict[str, Any]:
    steps = checkpoint.steps(folder.checkpoints)
    if not steps:
        raise UserError(f"{show(folder.path)} has no checkpoint, from which it could be lengthened")
    path = folder.checkpoints / checkpoint.name_of(steps[-1])
    state = checkpoint.load(path)
    if not isinstance(state.get("method"), Mapping):
        raise UserError(f"{show(path)} is no checkpoint of pre-training; restore it")
    return state


def load_parent(settings: Settings, folder: RunFolder, method: Method) -> None:
    """Give the method its parent's last state, if it has a parent and no checkpoint of its own.

    Raises UserError if that state is gone, or no longer the same.
    """
    parent = settings.train.parent
    if parent is None or checkpoint.steps(folder.checkpoints):
        return
    state = _last(RunFolder(Path(parent)))
    if checkpoint.digest(state["method"]) != settings.train.parent_weights:
        raise UserError(
            f"the last checkpoint of {show(parent)} is not the one that this run lengthens; "
            "restore it, or lengthen that run anew with --extend"
        )
    try:
        method.load_state_dict(state["method"])
    except RuntimeError:
        raise UserError(
            f"{show(parent)} has another method or architecture than this run"
        ) from None


def parents_index(settings: Settings, train: Source) -> Index | None:
    """The parent's index, by which the images keep their numbers; None without a parent."""
    if settings.train.parent is None:
        return None
    index = RunFolder(Path(settings.train.parent)).index
    return load_index(index) if index.is_file() else train.index()


def told(settings: Settings) -> str:
    """What a lengthened run is, in a sentence for the screen and its README; empty for others."""
    if settings.train.parent is None:
        return ""
    weights = str(settings.train.parent_weights)[:12]
    optim = settings.optim
    warmup = f"{optim.warmup_epochs:g} epochs of" if optim.warmup_epochs else "no"
    fall = "as a cosine" if optim.schedule == "cosine" else "in steps"
    return (
        f"Lengthens {show(settings.train.parent)} by {settings.train.epochs} epochs: starts from "
        f"its last weights ({weights}), queue and key encoder, with a fresh optimiser, another "
        f"seed, {warmup} warm-up, and a learning rate that falls {fall} from optim.lr {optim.lr:g}"
    )
