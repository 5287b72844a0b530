"""Checkpoints: all that a run needs to resume as if it had never stopped, written atomically.

Each carries a checksum of its content. torch notices a file that was cut short, but not a flipped
bit. Beside the content lies a label: whose checkpoint it is. Two runs with the same settings have
the same content, and each has its own label.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mocokit.engine.tensors import from_torch
from mocokit.errors import MocokitError, UserError
from mocokit.files import reason_of, show, whole, writing

FORMAT = 2  # 1 had no checksum
Label = Mapping[str, Any]
# What a disk says that knows no links: exFAT, some network disks, Windows without the privilege.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_RESUME = "make room, and resume with the same command"
_NAME = re.compile(r"step-(\d{8})\.pt")
_LABEL, _LABEL_BYTES = "mocokit.json", 2**16  # its name in the file, and its length at most


class OtherRun(UserError):
    """A checkpoint belongs to another run than the folder that it lies in."""


def name_of(step: int) -> str:
    """The file name of the checkpoint after this many steps."""
    return f"step-{step:08d}.pt"


def save(folder: Path, step: int, state: Mapping[str, Any], label: Label | None = None) -> Path:
    """Write folder/step-XXXXXXXX.pt whole or not at all, and point last.pt beside folder at it.

    `label` says whose it is; `label_of` reads it. The folder that `folder` lies in is never made,
    so a run folder that was deleted does not come back. Raises MocokitError.
    """
    path = folder / name_of(step)
    content = {"format": FORMAT, "step": step, **_on_cpu(state)}
    content["checksum"] = digest(content)
    size = sum(x.nbytes for _, x in _leaves(content) if isinstance(x, Tensor))
    with writing(path, room=size, remedy=_RESUME):
        folder.mkdir(exist_ok=True)
        # Sole writer: rank 0 in a locked folder. What a killed attempt left is overwritten.
        with whole(path, sync=True, sole_writer=True) as file:
            _write(content, {**(label or {}), "step": step}, file)
    point(path)
    if not is_saved(folder, step):
        raise MocokitError(
            f"{show(path)} was written, and is not there: its disk cannot be trusted"
        )
    return path


def _write(content: Mapping[str, Any], label: Label, file: IO[bytes]) -> None:
    """Raises OSError, which torch's writer hides behind a RuntimeError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        raise _cause(error) from None
    with zipfile.ZipFile(file, "a") as archive:  # torch's format is a zip archive
        folder = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{folder}/{_LABEL}", json.dumps(label))


def _cause(error: BaseException) -> BaseException:
    """The OSError that led to another error; without one an OSError that says the same."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or OSError(0, str(error))


def label_of(path: Path) -> dict[str, Any] | None:
    """The label of a checkpoint, read from the end of the file; None if the file is cut short.

    Empty for what 0.1 wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(f"/{_LABEL}") and entry.file_size <= _LABEL_BYTES:
                    found = json.loads(archive.read(entry))
                    return found if isinstance(found, dict) else None
            return {}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
        return None


def is_saved(folder: Path, step: int) -> bool:
    """Whether a whole checkpoint of this step is there. Its content is not read."""
    label = label_of(folder / name_of(step))
    return label is not None and label.get("step", step) == step


def digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of every tensor, number and text of a state, with its place, type and shape."""
    found = hashlib.sha256()
    for place, leaf in _leaves(state):
        found.update(f"{place}\0".encode())
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(_bytes(leaf))
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    # As bytes, because numpy knows no bfloat16. reshape(-1), because a scalar has no bytes to view;
    # an expanded tensor has none either until it is contiguous.
    flat: Any = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    return memoryview(flat)


def _leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{place}/{name!r}")
    elif isinstance(tree, (list, tuple)):
        for number, branch in enumerate(tree):
            yield from _leaves(branch, f"{place}/{number}")
    else:
        yield place, tree


def _on_cpu(tree: Any) -> Any:
    """The same with its tensors on the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, Mapping):
        return {name: _on_cpu(branch) for name, branch in tree.items()}
    return type(tree)(map(_on_cpu, tree)) if isinstance(tree, (list, tuple)) else tree


def point(path: Path) -> None:
    """Make last.pt, beside the folder of checkpoints, a relative link to one of them.

    There is no moment in which there is none. A disk without links, such as a USB stick's, gets a
    copy. Raises MocokitError.
    """
    link = path.parent.parent / "last.pt"
    target = os.path.relpath(path, link.parent)
    with writing(link, room=1, remedy=_RESUME):
        if link.is_symlink() and os.readlink(link) == target:
            return
        # A link cannot be changed in place: a new one takes its place at once.
        temporary = link.with_name(link.name + ".partial")
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(target)
            os.replace(temporary, link)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(path, "rb") as file, whole(link, sync=True, sole_writer=True) as copy:
                shutil.copyfileobj(file, copy)


def prune(
    folder: Path, keep: int, milestones: frozenset[int] = frozenset(), newest: int | None = None
) -> str:
    """Delete all but the last `keep` checkpoints up to step `newest`, and the milestones.

    Those after `newest`, the one just written, are not this run's: they neither count nor go.
    Returns what to tell of those that cannot be deleted.
    """
    failed = ""
    own = [step for step in steps(folder) if newest is None or step <= newest]
    for step in own[:-keep]:
        if step not in milestones:
            path = folder / name_of(step)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                failed = f"{show(path)} is kept: it cannot be deleted ({reason_of(error)})"
    return failed


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, rising."""
    matches = (_NAME.fullmatch(path.name) for path in folder.glob("step-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Raises UserError where it is damaged, or would need unpickling of code."""
    return checked(from_torch(path, device), path)


def checked(content: Any, path: Path) -> dict[str, Any]:
    """The state that a file's content is, if it is a whole checkpoint. Raises UserError."""
    known = isinstance(content, dict) and content.get("format") == FORMAT
    if not known or type(content.get("step")) is not int:
        raise UserError(f"{show(path)} is not a checkpoint of this version of mocokit")
    state = {name: value for name, value in content.items() if name != "checksum"}
    if content.get("checksum") != digest(state):
        raise UserError(f"{show(path)} is damaged: its content is not what its checksum says")
    return state


def load_newest(
    folder: Path,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = lambda text: None,
    check: Callable[[dict[str, Any], Label], None] = lambda state, label: None,
) -> dict[str, Any] | None:
    """The newest good checkpoint, or None if there is no checkpoint.

    `check` is given each state and its label, and raises UserError if the run cannot use it. Newer
    checkpoints that are damaged or another run's are renamed, so that they neither count nor are
    overwritten, and logged. Raises UserError if none is good; then all stay as they are.
    """
    passed: list[tuple[int, UserError]] = []
    for step in reversed(steps(folder)):
        path = folder / name_of(step)
        try:
            state = load(path, device)
            if state.get("step") != step:
                raise UserError(f"{show(path)} does not hold the step that its name says")
            check(state, label_of(path) or {})
        except UserError as error:
            passed.append((step, error))
            continue
        for other, why in passed:
            where = _set_aside(folder / name_of(other), isinstance(why, OtherRun))
            log(f"{why}; {where}; resuming from the checkpoint before")
        with suppress(MocokitError):  # the next checkpoint would set it right
            point(path)  # after a kill, or where a newer one was set aside
        return state
    if passed and isinstance(passed[0][1], OtherRun):
        raise passed[0][1]
    if passed:
        raise UserError(f"no checkpoint in {show(folder)} can be read: {passed[0][1]}")
    return None


def _set_aside(path: Path, of_other_run: bool) -> str:
    """Rename a checkpoint that is passed over; returns what to tell of it."""
    stem = f"{path.name}.{'other-run' if of_other_run else 'damaged'}"
    names = (stem if count == 1 else f"{stem}-{count}" for count in range(1, 1000))
    name = next((one for one in names if not os.path.lexists(path.with_name(one))), stem)
    try:
        os.replace(path, path.with_name(name))
    except OSError as error:
        return f"it stays where it is ({error.strerror})"
    return f"it is now called {name}"
