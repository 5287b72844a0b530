"""What probes have in common in training: random views epoch by epoch, and where they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocokit import chance
from mocokit.chance import Slot
from mocokit.data.loader import read_batches
from mocokit.protocols.labelled import LabelledSplit
from mocokit.views.params import ViewSpec, draw_table, scoring_bound
from mocokit.views.views import make_views


@dataclass
class TrainingViews:
    """Batches of random views of the training images in one epoch, with their labels.

    `done` counts the batches that were read, from which an interrupted epoch resumes. Images that
    cannot be read are left out; a batch without any other is not yielded.
    """

    spec: ViewSpec
    split: LabelledSplit
    device: torch.device
    seed: int
    epoch: int
    batch_size: int
    workers: int
    done: int = 0

    def __len__(self) -> int:
        """The number of batches of the whole epoch."""
        return -(-len(self.split.train_numbers) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Views (n, 3, S, S) and labels (n,) on the device."""
        stream = chance.library_seed(self.seed, 1, Slot.EVALUATION)
        count = len(self.split.train_numbers)
        order = chance.Order(stream, self.epoch, count)
        numbers = self.split.train_numbers[order[np.arange(self.done * self.batch_size, count)]]
        train, labels = self.split.train, self.split.train.labels
        assert labels is not None
        bound = scoring_bound(self.spec)
        for batch in read_batches(train, numbers, self.batch_size, bound, self.workers):
            self.done += 1
            if len(batch.index):
                sizes = batch.heights, batch.widths
                table = draw_table(self.spec, stream, self.epoch, batch.index, 0, *sizes)
                views = make_views(self.spec, table, batch.pixels, *sizes, self.device)
                yield views, torch.from_numpy(labels[batch.index]).to(self.device)


@dataclass
class Epoch:
    """Where a probe is in its training, and the loss of the current epoch so far."""

    total: Tensor  # summed over images, a scalar on the device
    number: int = 0
    batches: int = 0  # of this epoch that are done
    seen: int = 0  # images of this epoch

    @classmethod
    def first(cls, device: torch.device) -> "Epoch":
        return cls(torch.zeros((), device=device))

    def add(self, loss: Tensor, images: int) -> None:
        """Note the mean loss of a step on so many images."""
        self.total += loss.detach() * images
        self.seen += images

    def end(self) -> float:
        """Go to the next epoch; the mean loss of this one."""
        mean = float(self.total) / max(self.seen, 1)
        self.total = torch.zeros_like(self.total)
        self.number, self.batches, self.seen = self.number + 1, 0, 0
        return mean

    def place(self, batches: int, epochs: int) -> tuple[int, str]:
        """The number of batches since the start, and in words where this is."""
        words = f"after epoch {self.number} of {epochs}"
        if self.batches:
            words = f"in epoch {self.number + 1} of {epochs}, after {self.batches} of {batches} "
            words += "steps"
        return self.number * batches + self.batches, words

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        self.total = state["total"].to(self.total.device)
        self.number, self.batches = state["number"], state["batches"]
        self.seen = state["seen"]
