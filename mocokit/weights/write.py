"""The backbone as a file."""

import json
from pathlib import Path

from torch import nn

from mocokit.files import write_bytes
from mocokit.settings.schema import Settings


def write_backbone(path: Path, backbone: nn.Module, settings: Settings) -> None:
    """Write the weights as safetensors; the settings travel in the file's metadata."""
    from safetensors.torch import save

    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    metadata = {"mocokit": json.dumps(settings.model_dump(mode="json"))}
    write_bytes(path, save(state, metadata=metadata), sole_writer=True)
