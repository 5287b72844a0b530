"""Checkpoints: all that a run needs to resume as if it had never stopped, written atomically.

Each carries a checksum of its content. torch notices a file that was cut short, but not a flipped
bit.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocokit.engine.tensors import from_torch
from mocokit.errors import MocokitError, UserError
from mocokit.files import show, whole

FORMAT = 2  # 1 had no checksum
_NAME = re.compile(r"step-(\d{8})\.pt")


def name_of(step: int) -> str:
    """The file name of the checkpoint after this many steps."""
    return f"step-{step:08d}.pt"


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write folder/step-XXXXXXXX.pt whole or not at all, and point last.pt beside folder at it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name_of(step)
    content = {"format": FORMAT, "step": step, **_on_cpu(state)}
    content["checksum"] = digest(content)
    try:
        # Sole writer: rank 0 in a locked folder. What a killed attempt left is overwritten.
        with whole(path, sync=True, sole_writer=True) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch's writer hides the first behind the second
        size = sum(x.nbytes for _, x in _leaves(content) if isinstance(x, Tensor)) / 2**20
        raise MocokitError(
            f"cannot write {path} ({error}); it needs about {size:.0f} MiB; what was saved before "
            "is untouched: make room, and resume with the same command"
        ) from None
    _point(folder.parent / "last.pt", path)
    return path


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
    # As bytes, because numpy knows no bfloat16. reshape(-1), because a scalar has no bytes to view.
    flat: Any = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
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


def _point(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to target, without a moment in which there is none."""
    # A link cannot be changed in place: a new one takes its place at once.
    temporary = link.with_name(link.name + ".partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def prune(folder: Path, keep: int, milestones: frozenset[int] = frozenset()) -> None:
    """Delete all but the newest `keep` checkpoints and the milestones."""
    for step in steps(folder)[:-keep]:
        if step not in milestones:
            (folder / name_of(step)).unlink(missing_ok=True)


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
) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None if there is no checkpoint.

    Logs the damaged ones that it passes over. Raises UserError if all are damaged.
    """
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        try:
            state = load(folder / name_of(step), device)
        except UserError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            log(f"{text}; resuming from the checkpoint before")
        return state
    if damaged:
        raise UserError(f"no checkpoint in {folder} can be read: {damaged[0]}")
    return None
