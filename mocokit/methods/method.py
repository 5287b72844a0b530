"""What the loop asks of a method: forward computes, update changes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocokit import chance
from mocokit.nets.heads import Encoder


class Views(Protocol):
    """One view of each of n images: a tensor (n, 3, S, S), or what makes some of it when asked."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, rows: slice) -> Tensor: ...
    @overload
    def __getitem__(self, rows: NDArray[Any]) -> Tensor: ...


class Output(NamedTuple):
    """What a forward gives: the loss to differentiate, metrics to record, and what update needs."""

    loss: Tensor  # scalar; its mean over the processes is the mean over the global batch
    metrics: dict[str, Tensor]  # detached scalars, of this process's images
    keep: Any  # handed to update() after the optimiser's step


@dataclass(frozen=True)
class Draw:
    """The chance numbers of a step, the same on every process."""

    seed: int
    step: int
    images: int  # in the global batch

    def __call__(self, slot: int, count: int) -> NDArray[Any]:
        """`count` numbers in [0, 1) for this purpose."""
        import numpy as np

        return chance.uniform(self.seed, self.step, np.arange(count), 0, slot)


class Method(nn.Module, ABC):
    """A mechanism. Its `encoder` is what is optimised, and `encoder.backbone` what is kept."""

    encoder: Encoder
    views = 2  # of each image, that a forward wants
    loss_scale = 1.0  # what the loop multiplies the loss by before it is differentiated

    @abstractmethod
    def forward(self, views: Sequence[Views], index: Tensor, draw: Draw) -> Output:
        """Views of this process's images, each (n, 3, S, S), and the images' numbers (n,).

        Changes no parameter, queue or bank; only running batch-norm statistics move.
        """

    @abstractmethod
    def update(self, keep: Any, step: int, progress: float) -> None:
        """After the optimiser's step, and only if it was taken: what follows from it."""

    def encoder_replaced(self) -> None:
        """The encoder was given other weights before the first step: take them over."""

    def trained(self) -> list[nn.Parameter]:
        """What the optimiser changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def health(self) -> dict[str, float]:
        """State worth recording that is not a metric of the batch."""
        return {}

    @property
    @abstractmethod
    def chance_loss(self) -> float:
        """The loss of an encoder that tells nothing apart, such as ln(1 + K)."""

    @property
    @abstractmethod
    def expectation(self) -> str:
        """What a person should expect of the loss, in a few sentences."""


def as_float(tensor: Tensor) -> Tensor:
    """float32 at least: double stays double, which is how the tests compare exactly."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
