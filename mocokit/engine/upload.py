"""Pixels on their way to a device, while it computes."""

import torch
from torch import Tensor


class Upload:
    """Sends to a device; on CUDA by a stream of its own.

    The host is ahead of the device by a step or so, and on the device's main stream a copy would
    wait for all of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, pixels: Tensor) -> Tensor:
        """The same numbers on the device, to be used by its current stream; pinned, at no wait."""
        if self._stream is None:
            return pixels.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            sent = pixels.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        sent.record_stream(current)  # or its memory would be given away while it is still read
        return sent
