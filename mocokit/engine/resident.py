"""Small sets held on the device whole: a batch is gathered there, and nothing is sent to it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARE = 0.25  # of the free memory; the rest is for activations, which come later


class Resident:
    """Images of one size, (N, H, W, 3) or gray (N, H, W) uint8, on a device."""

    def __init__(self, images: NDArray[np.uint8], device: torch.device) -> None:
        parts = [
            torch.from_numpy(np.array(part)) for part in np.array_split(images, _parts(images))
        ]
        self.images = torch.cat([part.to(device) for part in parts])

    def gather(self, index: NDArray[np.int64]) -> Tensor:
        """The pixels of a batch as one flat buffer, one image (H, W, 3) after another."""
        rows, device = torch.from_numpy(index), self.images.device
        if device.type == "cuda":
            rows = rows.pin_memory()  # or the host would wait for the device
        images = self.images[rows.to(device, non_blocking=True)]
        if images.dim() == 3:
            images = images[..., None].expand(-1, -1, -1, 3)
        return images.reshape(-1)


def fits(images: NDArray[np.uint8], device: torch.device) -> bool:
    """Whether images are few enough for the memory that is free on the device now.

    On a CPU they are where they are needed already.
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= SHARE * free


def _parts(images: NDArray[np.uint8]) -> int:
    """Pieces of about 64 MiB: an array mapped from disk need not fit into memory twice."""
    return max(1, min(len(images), images.nbytes // 2**26))
