"""A small run as `pretrain` builds it from settings, to look at, or to train in this process."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from mocokit.data.open import open_data
from mocokit.engine.stop import StopSignals
from mocokit.engine.world import World
from mocokit.run import build
from mocokit.run.begin import begun
from mocokit.run.open import open_run
from mocokit.settings import replace
from mocokit.settings.schema import Settings
from mocokit.train import train

IMAGES, BATCH = 136, 32  # four steps an epoch, and 8 images left
# The schema's defaults otherwise, so that each setting can be told from its default.
SMALL = {
    "recipe": "small",
    "net.backbone": "resnet_tiny",
    "net.stem": "small",
    "net.dim": 8,
    "views.size": 16,
    "monitor.centre": 1.0,
    "views.blur_sigma": (0.1, 1.0),
    "method.group_size": 8,
    "train.batch_size": BATCH,
    "train.epochs": 2,
    "engine.device": "cpu",
    "engine.precision": "float32",
    "engine.threads": 1,
    "engine.memory_format": "contiguous",
    "engine.compile": False,
    "engine.cuda_graphs": False,
    "data.workers": 0,
    "monitor.every_epochs": 0,
}
QUEUE = {"method.queue_size": 48}
RATES = frozenset({"optim.lr", "method.momentum"})  # their recipe states the batch they go with


def small_npz(folder: Path, images: int = IMAGES) -> Path:
    """Labelled arrays of 20 pixels in blocks of any colours."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", images), ("test", 40)):
        blocks = draw.integers(0, 256, (count, 5, 5, 3), np.uint8)
        arrays[f"{split}_images"] = blocks.repeat(4, 1).repeat(4, 2)
        arrays[f"{split}_labels"] = np.arange(count) % 4
    path = folder / "small.npz"
    np.savez(path, **arrays)
    return path


def settings_of(changes):
    named = {"method.name": changes["method.name"]} if "method.name" in changes else {}
    queue = QUEUE if named.get("method.name", "moco") == "moco" else {}
    return replace(replace(Settings(), named), {**SMALL, **queue, **changes})


class Built:
    """What comes of SMALL with these changes, each built when it is asked for."""

    def __init__(self, data: Path, changes, out: Path):
        self.data, self.out, self.changes = data, out, dict(changes)
        self.settings = settings_of(self.changes)
        self.stated = (SMALL.keys() | self.changes.keys() | QUEUE.keys()) - RATES

    @cached_property
    def splits(self):
        return open_data(self.data, self.settings.data.labels)

    @cached_property
    def run(self):
        return open_run(self.settings, self.stated, self.splits, self.out, False, World())

    @property
    def method(self):
        return self.run.parts.method

    @property
    def optimizer(self):
        return self.run.parts.optimizer

    @property
    def group(self):
        return self.optimizer.param_groups[0]

    @property
    def schedule(self):
        return self.run.parts.schedule

    @property
    def specs(self):
        return self.run.parts.specs

    @cached_property
    def due(self):
        return build.build_due(self.run.settings, self.run.effect, World())

    @cached_property
    def monitor(self):
        return build.build_monitor(self.run.settings, self.splits, torch.device("cpu"))

    @cached_property
    def health(self):
        return build.build_health(self.run.settings, self.splits, torch.device("cpu"))

    @cached_property
    def loader(self):
        run = self.run
        known = run.settings, run.unread(), run.bound, World(), run.device, 0, run.bad.known
        return build.build_loader(*known)

    def trained(self):
        """The method after all steps, without the scores that follow."""
        with StopSignals() as stop, begun(self.run):
            train(self.run, stop)
        return self.run.parts.method
