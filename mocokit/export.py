"""The backbone as a file, and back."""

import json
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from mocokit import settings as settings_
from mocokit.config import Settings
from mocokit.engine import checkpoint
from mocokit.errors import UserError
from mocokit.nets.backbones import build_backbone


def write_backbone(path: Path, backbone: nn.Module, settings: Settings) -> None:
    """Write the weights as safetensors; the settings travel in the file's metadata."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    partial = path.with_suffix(".partial")
    metadata = {"mocokit": json.dumps(settings.model_dump(mode="json"))}
    save_file(state, str(partial), metadata=metadata)
    partial.replace(path)


def load(path: str | Path) -> nn.Module:
    """The backbone of a run folder, a checkpoint or a backbone.safetensors, in eval mode.

    On the CPU. (N, 3, H, W), normalised as in the run's settings, -> (N, .num_features). Of a run
    folder, the finished backbone or else the newest checkpoint's. Raises UserError where there is
    none.
    """
    settings, state = read(path)
    net = settings.net
    backbone = build_backbone(net.backbone, net.stem, settings.method.group_size)
    backbone.load_state_dict(state)
    return backbone.eval()


def read(path: str | Path) -> tuple[Settings, dict[str, Tensor]]:
    """The settings of what `load` loads, and the backbone's weights. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        if (path / "config.yaml").is_file() and not (path / "last.pt").is_file():
            what = f"the run in {path} ended before its first checkpoint, so it has no weights yet"
            remedy = f"go on with it: mocokit pretrain {path}/config.yaml --out {path}"
            raise UserError(f"{what}; {remedy}")
        finished = path / "backbone.safetensors"
        path = finished if finished.is_file() else path / "last.pt"
    if not path.is_file():
        raise UserError(f"there is no backbone at {path}; give a run folder or a checkpoint")
    return _read_safe(path) if path.suffix == ".safetensors" else _read_run(path)


def _read_safe(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if "mocokit" not in metadata:
        raise UserError(f"{path} was not written by mocokit: its metadata holds no settings")
    return settings_.from_yaml(metadata["mocokit"], str(path)), state


def _read_run(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    state = checkpoint.load(path)
    prefix = "encoder.backbone."
    method = cast(dict[str, Tensor], state["method"])
    weights = {k.removeprefix(prefix): v for k, v in method.items() if k.startswith(prefix)}
    return settings_.from_yaml(state["settings"], str(path)), weights
