"""The kNN monitor: the score of an encoder as it stands, and of what it must beat."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mocokit import chance
from mocokit.chance import Slot
from mocokit.data.source import Source
from mocokit.nets.batchnorm import calibrate
from mocokit.nets.heads import Encoder
from mocokit.nets.modes import evaluating
from mocokit.protocols.features import BATCH, compute_features, evaluation_batches
from mocokit.protocols.knn import knn_accuracy, suited
from mocokit.protocols.labelled import lacking_classes
from mocokit.protocols.table import CENTRE
from mocokit.views.params import ViewSpec

PIXEL_LIMIT = 64  # pixels a side; above, raw pixels are no baseline worth their memory
CALIBRATION = 8  # batches that give random weights their batch-norm statistics


def calibrated(
    network: nn.Module,
    source: Source,
    spec: ViewSpec,
    device: torch.device,
    numbers: NDArray[np.int64] | None = None,
) -> nn.Module:
    """The same network, its batch-norm statistics set to these images' (None: all).

    Of many, some at equal distances, since the first ones of a folder are of one class.
    """
    numbers = np.arange(len(source)) if numbers is None else numbers
    many = CALIBRATION * BATCH
    if len(numbers) > many:
        numbers = numbers[np.arange(many) * len(numbers) // many]
    calibrate(network, (views for _, views in evaluation_batches(source, numbers, spec, device)))
    return network


class KnnMonitor:
    """kNN with the training images as bank; `run` yields (name, accuracy).

    The queries are the validation images where there are any, else a tenth of the labelled training
    images, drawn from chance and left out of the bank. `k` None is what suits the bank.
    """

    def __init__(
        self,
        train: Source,
        validation: Source | None,
        spec: ViewSpec,
        device: torch.device,
        *,
        k: int | None,
        temperature: float,
        bank: int,
        seed: int,
        workers: int = 0,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        if train.labels is None:
            raise ValueError("a kNN monitor needs labels")
        self.spec, self.device, self.workers = spec, device, workers
        self.k, self.temperature, self.precision = k, temperature, precision
        everything = np.arange(len(train))
        order = np.argsort(chance.uniform(seed, 0, everything, 0, Slot.HOLD_OUT), kind="stable")
        order = order[train.labels[order] >= 0]  # the others have no class
        if validation is not None and validation.labels is not None:
            self.queries = validation
            self.query_numbers = np.flatnonzero(validation.labels >= 0)
            kept, self.split = order, "validation images"
        else:
            held = max(1, len(order) // 10)
            self.queries, self.query_numbers = train, np.sort(order[:held])
            kept, self.split = order[held:], "a held-out tenth of the labelled images"
        self.train, self.bank_numbers = train, np.sort(kept[:bank])
        bank_labels = train.labels[self.bank_numbers]
        # Why a score would mean nothing, of all images or of those in the bank.
        self.lacks = lacking_classes(train.labels, train.name)
        self.lacks = self.lacks or lacking_classes(bank_labels, f"the bank from {train.name}")
        self._suited = suited(bank_labels)
        # Those that could be read, once a score has been taken.
        self._counts = len(self.bank_numbers), len(self.query_numbers)

    @property
    def scored_images(self) -> int:
        """Queries of the last score."""
        return self._counts[1]

    @property
    def protocol(self) -> str:
        """How the numbers of the last score came about, in words."""
        bank, queries = self._counts
        k = self._suited[1] if self.k is None else min(self.k, bank)
        one = len(np.unique(self.queries.labels[self.query_numbers])) < 2  # type: ignore[index]
        return (
            f"kNN, k {k}, temperature {self.temperature:g}, "
            f"{bank:,} training images as bank, {queries:,} queries ({self.split}), "
            f"{CENTRE.describe(self.spec)}, final weights"
            + ("; all queries are of one class" if one else "")
        )

    def run(self, encoder: Encoder) -> Iterator[tuple[str, float]]:
        """Accuracy of the encoder's backbone features, and of its head's output."""
        with evaluating(encoder):
            yield from self._scores(encoder.both, ("knn_backbone", "knn_head"))

    def raw_pixels(self) -> float | None:
        """Accuracy of the centred pixels themselves; None where the images are large."""
        if self.spec.size > PIXEL_LIMIT:
            return None
        with torch.no_grad():
            scores = dict(self._scores(lambda views: (views.flatten(1),), ("pixels",), centre=True))
        return scores.get("pixels")

    def random_weights(self, encoder: Encoder) -> float | None:
        """Accuracy of an untrained encoder's backbone whose batch norm fits the data."""
        network = copy.deepcopy(encoder.backbone)
        with torch.no_grad():
            calibrated(network, self.train, self.spec, self.device, self.bank_numbers)
            network.eval()
            scores = dict(self._scores(lambda views: (network(views),), ("random",)))
        return scores.get("random")

    def _batches(self, source: Source, numbers: NDArray[np.int64]):  # type: ignore[no-untyped-def]
        return evaluation_batches(source, numbers, self.spec, self.device, self.workers)

    def _scores(
        self,
        network: Callable[[Tensor], tuple[Tensor, ...]],
        names: tuple[str, ...],
        centre: bool = False,
    ) -> Iterator[tuple[str, float]]:
        with self.precision():
            bank_index, banks = compute_features(
                network, self._batches(self.train, self.bank_numbers)
            )
            query_index, queries = compute_features(
                network, self._batches(self.queries, self.query_numbers)
            )
        self._counts = len(bank_index), len(query_index)
        labels = torch.from_numpy(self.train.labels[bank_index])  # type: ignore[index]
        query_labels = torch.from_numpy(self.queries.labels[query_index])  # type: ignore[index]
        if not banks or not queries:
            return  # nothing can be read: there is no score
        k = self._suited[0] if self.k is None else self.k
        for name, bank, query in zip(names, banks, queries, strict=True):
            if centre:
                bank, query = bank - bank.mean(0), query - bank.mean(0)
            yield (
                name,
                knn_accuracy(bank, labels, query, query_labels, k, self.temperature),
            )
