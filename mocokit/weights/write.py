"""The backbone as a file."""

import json
from pathlib import Path

from torch import nn

from mocokit.settings.schema import Settings


def write_backbone(path: Path, backbone: nn.Module, settings: Settings) -> None:
    """Write the weights as safetensors; the settings travel in the file's metadata."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    partial = path.with_suffix(".partial")
    metadata = {"mocokit": json.dumps(settings.model_dump(mode="json"))}
    save_file(state, str(partial), metadata=metadata)
    partial.replace(path)
