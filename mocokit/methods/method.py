"""The contract of a method: what it declares, and the two functions that the loop calls.

`forward` computes and changes nothing; `update` changes what follows from a step. Everything else
that the package asks a method for is declared here by name. docs/adding/method.md has an example.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NotRequired, Protocol, Self, TypedDict, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocokit import chance
from mocokit.methods.parts import Queue
from mocokit.nets.heads import Encoder
from mocokit.settings.methods import MethodSettings

__all__ = [
    "Context",
    "KeyGroups",
    "Method",
    "MethodSettings",
    "NoLeak",
    "Output",
    "Step",
    "ViewRole",
    "Views",
    "as_float",
]


class Views(Protocol):
    """One view of each of n images: a tensor (n, 3, S, S), or an object that makes it on demand."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, rows: slice) -> Tensor: ...
    @overload
    def __getitem__(self, rows: NDArray[Any]) -> Tensor: ...


class ViewRole(NamedTuple):
    """One view of each image: its name, and how it differs from the settings `views`."""

    name: str  # as the contact sheet shows it
    changes: Mapping[str, Any] = {}  # of `views.*`, such as {"size": 96, "crop_area": (0.05, 0.14)}


QUERY_AND_KEY = (ViewRole("query"), ViewRole("key"))


class KeyGroups(NamedTuple):
    """Keys go through batch norm in groups, which `Method.regrouped` cuts differently."""


class NoLeak(NamedTuple):
    """Why batch statistics cannot reveal a query's key, or why that is not checked."""

    reason: str


@dataclass(frozen=True)
class Step:
    """A step, the same on every process, with its random numbers."""

    seed: int
    number: int  # counted from 0
    images: int  # in the global batch
    loss_scale: float = 1.0  # the loop multiplies the loss by it before it is differentiated

    def draw(self, slot: int, count: int) -> NDArray[np.float64]:
        """`count` numbers in [0, 1) for this purpose."""
        return chance.uniform(self.seed, self.number, np.arange(count), 0, slot)


class Output(NamedTuple):
    """What a forward gives: the loss to differentiate, metrics to record, and what update needs."""

    # A scalar whose mean over the processes is the mean over the global batch. Shares may be
    # uneven: a mean over n images here is weighted by n * processes / step.images.
    loss: Tensor
    # Detached scalars of this process's images. `contrast_top1`, the share of queries that are
    # nearest to their key, is shown and serves the leak check; `feature_std` serves the verdict.
    metrics: dict[str, Tensor]
    keep: Any = None  # handed to update() after the optimiser's step


class ParameterGroup(TypedDict):
    """Parameters that the optimiser treats alike; what is absent follows from `optim.*`."""

    params: list[nn.Parameter]
    lr_scale: NotRequired[float]  # times the schedule's learning rate
    fixed_lr: NotRequired[bool]  # the schedule does not lower it
    weight_decay: NotRequired[float]
    trust: NotRequired[float]  # lars: 0 leaves the gradient as it is


@dataclass(frozen=True)
class Context:
    """What `Method.build` is given, besides the method's own settings."""

    encoder: Encoder  # with its first weights
    dim: int  # of queries and keys
    images: int  # in the data
    batch_size: int  # over all processes
    count_groups: Callable[[int], int]  # batch-norm groups of a batch of so many images
    predictor: Callable[[], nn.Module | None]  # as `net.predictor` has it; drawn when called
    micro_batch: int | None = None


class Method(nn.Module, ABC):
    """A mechanism. Its `encoder` is trained, and `encoder.backbone` is what a user keeps."""

    settings: ClassVar[type[MethodSettings]]
    encoder: Encoder
    views: ClassVar[tuple[ViewRole, ...]] = QUERY_AND_KEY
    clip: float | None = None  # gradients are scaled down to this norm, all taken together

    @classmethod
    @abstractmethod
    def build(cls, settings: Any, context: Context) -> Self:
        """The method that its settings, an instance of `cls.settings`, describe; on the CPU."""

    @classmethod
    def roles(cls, settings: Any) -> tuple[ViewRole, ...]:
        """The views of each image that forward is given under these settings, in order."""
        return cls.views

    @abstractmethod
    def forward(self, views: Sequence[Views], index: Tensor, step: Step) -> Output:
        """Views of this process's images, each (n, 3, S, S), and the images' numbers (n,).

        Changes no parameter, queue or bank; only running batch-norm statistics move.
        """

    @abstractmethod
    def update(self, keep: Any, step: int, progress: float) -> None:
        """After the optimiser's step, and only if it was taken: what follows from it.

        progress in (0, 1]: the share of the run that is done.
        """

    @property
    @abstractmethod
    def leak(self) -> KeyGroups | NoLeak:
        """Whether batch statistics could reveal a query's key (MoCo v1, section 3.3).

        KeyGroups where keys go through batch norm in groups: the leak check compares them with
        other groups. NoLeak, with the reason, where nothing can leak or be checked.
        """

    def regrouped(self) -> AbstractContextManager[None]:
        """Within it, keys are shuffled over at least two batch-norm groups, however it trains.

        Which groups follows from the step. Needed with KeyGroups alone.
        """
        raise NotImplementedError(f"{type(self).__name__} has KeyGroups and no regrouped()")

    @property
    def queues(self) -> Mapping[str, Queue]:
        """Past keys, by name; empty where there are none."""
        return {}

    @property
    def compiled(self) -> Iterable[nn.Module]:
        """The modules worth compiling: their forwards are most of a step."""
        return [part for part in self.children() if isinstance(part, Encoder)]

    @property
    def chance_loss(self) -> float | None:
        """The loss of an encoder that maps every image to the same point, such as ln(1 + K)."""
        return None

    @property
    @abstractmethod
    def expectation(self) -> str:
        """What a person should expect of the loss, in a few sentences."""

    def encoder_replaced(self) -> None:
        """The encoder was given other weights before the first step: copy them where needed."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters that the optimiser changes, in groups that it treats alike."""
        return [{"params": self.trained()}]

    def health(self) -> dict[str, float]:
        """State worth recording that is not a metric of the batch.

        The verdict reads `key_momentum`. How full the queues are is recorded from `queues`.
        """
        return {}


def as_float(tensor: Tensor) -> Tensor:
    """float32 at least: double stays double, which is how the tests compare exactly."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
