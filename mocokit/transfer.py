"""Numbers and pixels on their way to a device, without waiting for what the device computes."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = Tensor | NDArray[Any]


def to_device(numbers: Numbers, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers on the device, as `dtype` if one is given."""
    # Copied, because torch warns of arrays that cannot be written.
    tensor = numbers if isinstance(numbers, Tensor) else torch.from_numpy(np.array(numbers))
    tensor = tensor.to(dtype or tensor.dtype)
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        # From pageable memory CUDA copies while the host waits.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(numbers: Numbers) -> NDArray[Any]:
    """Numbers as a numpy array; waits for the device if they are on one."""
    return numbers.detach().cpu().numpy() if isinstance(numbers, Tensor) else np.asarray(numbers)


class Upload:
    """Sends pixels to a device; on CUDA by a stream of its own.

    The host is ahead of the device by a step or so, and on the device's main stream a copy would
    wait for all of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, pixels: Tensor) -> Tensor:
        """The same numbers on the device, for its current stream; the host waits unless pinned."""
        if self._stream is None:
            return pixels.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            sent = pixels.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        sent.record_stream(current)  # or its memory would be given away while it is still read
        return sent
