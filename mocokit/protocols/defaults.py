"""The defaults of `mocokit evaluate`: the command line, Python and the documents read them here.

Without torch, because `mocokit evaluate --help` shows them.
"""

from dataclasses import dataclass
from typing import Literal

Layer = Literal["backbone", "head"]
Precision = Literal["float32", "bfloat16", "float16"]
LinearProtocol = Literal["paper", "quick"]
TrainViews = Literal["crops", "centre"]
Split = Literal["07+12", "07"]
DetectorPrecision = Literal["auto", "float32", "bfloat16"]


# InstDisc and the authors' notebook let 200 vote; knn.suited lets fewer where classes are small.
NEIGHBOURS = 200


@dataclass(frozen=True)
class Shared:
    """What all evaluations of frozen features, and fine-tuning, have in common."""

    layer: Layer = "backbone"
    device: str = "auto"
    precision: Precision = "float32"
    size: int | None = None  # None: as the network was trained
    resize: int | None = None  # None: in the proportion of the recipe
    seed: int = 0
    baseline: bool = True
    cache: bool = True
    per_class: bool = False
    confusion: bool = False


@dataclass(frozen=True)
class Knn:
    k: tuple[int, ...] = ()  # as the run's settings state, or fitted to the images: knn.suited
    temperature: tuple[float, ...] = (0.1,)


@dataclass(frozen=True)
class Linear:
    """epochs and lr are those of the paper's protocol; `quick` finds its own."""

    protocol: LinearProtocol = "paper"
    train_views: TrainViews = "crops"
    epochs: int = 100
    lr: float = 30.0


@dataclass(frozen=True)
class FineTune:
    """Our own choice of values, not a paper's protocol."""

    percent: tuple[float, ...] = (1.0, 10.0, 100.0)
    epochs: int = 30
    lr: float = 0.05
    layer_decay: float = 1.0  # each layer's rate over that of the layer above it


@dataclass(frozen=True)
class Voc:
    """Steps and images a step follow from the split (detection/protocol.py)."""

    split: Split = "07+12"
    trials: int = 5
    every: int = 0
    precision: DetectorPrecision = "auto"
    pictures: int = 6
