"""A file of weights: what it holds is found out from its content, not from its name."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from mocokit import settings as settings_
from mocokit.engine import checkpoint, tensors
from mocokit.errors import UserError
from mocokit.files import brief, show
from mocokit.settings.schema import Settings
from mocokit.weights.layouts import read_resnet

_ENCODER, _BACKBONE = "encoder.", "encoder.backbone."


@dataclass(frozen=True)
class Stored:
    """The weights of a backbone, and what is known of it."""

    path: Path
    settings: Settings | None  # of the run that it came from; None: it is of others
    model: str  # the backbone's name
    backbone: dict[str, Tensor]
    encoder: dict[str, Tensor] | None = None  # with the head, which only checkpoints contain
    step: int | None = None  # of a checkpoint


def read_stored(path: Path) -> Stored:
    """What a file of ours or of others holds: torch's or safetensors. Raises UserError."""
    if tensors.is_safe(path):
        metadata, state = tensors.from_safetensors(path)
        if "mocokit" in metadata:
            settings = settings_.from_yaml(metadata["mocokit"], str(path))
            return Stored(path, settings, settings.net.backbone, state)
        return Stored(path, None, *read_resnet(state, path))
    content = tensors.from_torch(path)
    if isinstance(content, dict) and "format" in content and "step" in content:
        return _of_a_run(checkpoint.checked(content, path), path)
    return Stored(path, None, *read_resnet(content, path))


def _of_a_run(state: dict[str, object], path: Path) -> Stored:
    method, text = state.get("method"), state.get("settings")
    if not isinstance(method, dict) or not isinstance(text, str):
        what = "of a detector" if "detector" in state else "of something else"
        raise UserError(
            f"{show(path)} is a checkpoint {what}, not of pre-training; name the run folder of a "
            "pre-training, or its last.pt"
        )
    settings = settings_.from_yaml(text, str(path))
    named = {name: value for name, value in method.items() if isinstance(name, str)}
    encoder, backbone = (
        {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
        for prefix in (_ENCODER, _BACKBONE)
    )
    step = state["step"]
    return Stored(
        path, settings, settings.net.backbone, backbone, encoder,
        step if isinstance(step, int) else None,
    )  # fmt: skip


def fit(network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Load weights into a network. Raises UserError, which names the first that does not fit."""
    expected = network.state_dict()
    # Counts of batches, which old files lack, change no output.
    counts = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    state = {**counts, **state}
    problems = [f"lacks {key}" for key in expected if key not in state]
    for key, value in state.items():
        if key not in expected:
            problems.append(f"has {brief(key)} besides")
        elif not isinstance(value, Tensor):
            problems.append(f"has no tensor as {key}")
        elif value.shape != expected[key].shape:
            shape, wanted = brief(str([*value.shape]), 60), [*expected[key].shape]
            problems.append(f"has {key} in shape {shape}, not {wanted}")
        elif value.is_floating_point() != expected[key].is_floating_point() or value.is_complex():
            problems.append(f"has {key} as {value.dtype}, not {expected[key].dtype}")
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{show(path)} does not fit {brief(name)}: it {problems[0]}{more}")
    network.load_state_dict(state)
