"""Images that could not be read: each is named once with the reason, and replaced from then on.

A failure is part of the run, like its weights. An error of the network or disk may pass, and a
resumed run that could read the image would differ from the run that was stopped. An image that
failed in one epoch is therefore replaced in all later ones, even if it can be read again. In
the epoch itself the image has one place, and there the attempt to read it decides.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mocokit.engine.world import World
from mocokit.errors import UserError
from mocokit.files import append_line, printable, read_regular, reason_of, show, writing

_LINE = re.compile(rb"(\d{1,18})\t.*\tstep (\d{1,18})", re.DOTALL)
Bad = tuple[tuple[int, str, str], ...]  # number, name, reason


class BadImages:
    """bad_images.txt of a run. Too many bad images end the run, once it is saved.

    `first` maps an image to the step, counted from 0, of its first failure. After `share` it is the
    same on all processes.
    """

    def __init__(
        self, path: Path, images: int, share: float, steps_per_epoch: int, world: World = World()
    ) -> None:
        self._path, self._steps_per_epoch, self._world = path, steps_per_epoch, world
        self._images, self.limit = images, max(10, int(share * images))
        # In a killed run, failures after the last checkpoint are only in this file.
        self.first, self.damaged = _lines(path, images)
        self._unwritten: list[str] = []
        self._unshared: list[tuple[int, int, str, str]] = []
        self._known: tuple[tuple[int, int], NDArray[np.int64]] = (0, 0), np.empty(0, np.int64)

    @property
    def count(self) -> int:
        return len(self.first)

    def known(self, step: int) -> NDArray[np.int64]:
        """The images, ascending, that must not be used at a step even if they can be read.

        They failed in an earlier epoch, or at this very step, which a resumed run then repeats.
        """
        start = step - step % self._steps_per_epoch
        again = [image for image, first in self.first.items() if first == step]
        if not again and self._known[0] == (start, self.count):
            return self._known[1]
        early = [image for image, first in self.first.items() if first < start]
        found = np.array(sorted({*early, *again}), np.int64)
        if not again:
            self._known = (start, self.count), found
        return found

    def note(self, bad: Bad, step: int) -> None:
        """Record what failed at a step on this process. `share` sends it to the others."""
        self._unshared += [(number, step, name, reason) for number, name, reason in bad]
        if self._world.size == 1:
            self.share()

    def share(self) -> None:
        """Send new failures to all processes; called by all of them together.

        Raises MocokitError where the file cannot be written.
        """
        found = self._unshared
        self._unshared = []
        if self._world.size > 1:
            parts: list[Any] = [None] * self._world.size
            dist.all_gather_object(parts, found)
            found = sorted(one for part in parts for one in part)
        for number, step, name, reason in found:
            if number not in self.first:
                self.first[number] = step
                why = printable(reason)  # which may come from a stranger's file
                self._unwritten.append(f"{number}\t{name!r}\t{why}\tstep {step + 1}")
        self._write()

    @property
    def too_many(self) -> bool:
        """Whether the run must end; the same on all processes, like `first`."""
        return self.count > self.limit

    def check(self) -> None:
        """Raises UserError if there are more bad images than the limit."""
        if self.too_many:
            enough = min(1.0, math.ceil(200 * self.count / self._images) / 100)
            raise UserError(
                f"{self.count} images so far cannot be read, more than the limit of {self.limit}; "
                f"{show(self._path)} names them, `mocokit check` counts them all; raise the limit "
                f"with --set data.bad_share={enough:g}"
            )

    def _write(self) -> None:
        """Raises MocokitError; then the next attempt writes the same lines."""
        while self._world.writes and self._unwritten:
            with writing(self._path, room=1, remedy="make room, and resume with the same command"):
                append_line(self._path, self._unwritten[0])
            del self._unwritten[0]

    def state(self) -> Tensor:
        """(n, 2) int64 for a checkpoint: the image, and the step of its first failure."""
        return torch.tensor(sorted(self.first.items()), dtype=torch.int64).reshape(-1, 2)

    def load(self, state: Tensor) -> None:
        """Raises an error of Python for what `state` never makes."""
        for image, step in state.tolist():
            if not 0 <= image < self._images or step < 0:
                raise ValueError(f"image {image} at step {step} is none of the data")
            self.first[image] = min(step, self.first.get(image, step))


def _lines(path: Path, images: int) -> tuple[dict[int, int], int]:
    """The step of each image's first failure, and how many lines are damaged and left out.

    Raises UserError for what is no file.
    """
    try:
        content = read_regular(path)
    except (FileNotFoundError, NotADirectoryError):  # the latter is told where it is written
        return {}, 0
    except OSError as error:
        why = reason_of(error)
        raise UserError(f"cannot read {show(path)} ({why}): move it away, or restore it") from None
    first: dict[int, int] = {}
    damaged = 0
    for line in content.split(b"\n"):
        match = _LINE.fullmatch(line)
        if match and int(match[1]) < images and int(match[2]) > 0:
            image, step = int(match[1]), int(match[2]) - 1
            first[image] = min(step, first.get(image, step))
        else:
            damaged += bool(line.strip())
    return first, damaged
