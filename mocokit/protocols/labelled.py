"""What a network is judged on: labelled images to learn from, and others to be tested on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mocokit.chance import Slot
from mocokit.data.source import Source
from mocokit.errors import UserError
from mocokit.protocols.split import hold_out, stratified

TEST_SHARE = 0.2  # of the labelled images, where there are no others to test on


@dataclass(frozen=True)
class LabelledSplit:
    """Numbers are the images' own, rising. With `leave_one_out` both sides are the same images."""

    train: Source
    train_numbers: NDArray[np.int64]
    test: Source
    test_numbers: NDArray[np.int64]
    classes: tuple[str, ...]
    description: str  # how it was split, in words
    leave_one_out: bool = False

    @property
    def train_labels(self) -> NDArray[np.int64]:
        return _labels(self.train)[self.train_numbers]

    @property
    def test_labels(self) -> NDArray[np.int64]:
        return _labels(self.test)[self.test_numbers]

    def check_classes(self) -> None:
        """Raises UserError where there is nothing to learn: fewer than two classes."""
        if len(np.unique(self.train_labels)) < 2:
            raise UserError("a classifier needs training images of at least two classes")

    def with_share(self, share: float, seed: int) -> "LabelledSplit":
        """The same test with a stratified share of the training images."""
        if share >= 1:
            return self
        kept = self.train_numbers[stratified(self.train_labels, share, seed, Slot.LABELS)]
        description = f"{len(kept):,} labelled images ({share:.3g} of each class, seed {seed}), "
        description += self.description.split(", ", 1)[1]
        return LabelledSplit(
            self.train, kept, self.test, self.test_numbers, self.classes, description
        )


def labelled_split(
    train: Source, validation: Source | None, *, seed: int, leave_one_out: bool = False
) -> LabelledSplit:
    """Train on the training images, test on the validation images.

    Without validation images, each training image is a query of its own against all others
    (`leave_one_out`), or a stratified fifth is held out. Raises UserError where labels are missing.
    """
    if train.labels is None:
        raise UserError(
            f"{train.name} has no labels, without which there is nothing to score; give a folder "
            "with a subfolder per class, one with train/ and val/, or an .npz with train_labels"
        )
    everything = np.arange(len(train))
    classes = _classes(train, validation)
    if validation is not None and validation.labels is not None and len(validation):
        description = f"{len(train):,} training images, {len(validation):,} test images"
        return LabelledSplit(
            train, everything, validation, np.arange(len(validation)), classes, description
        )
    if leave_one_out:
        if len(train) < 2:
            raise UserError(f"{train.name} has {len(train)} labelled image; a vote needs others")
        description = f"{len(train):,} training images, each left out of its own vote"
        return LabelledSplit(train, everything, train, everything, classes, description, True)
    kept, held = hold_out(train.labels, TEST_SHARE, seed, Slot.TEST)
    if not len(held):
        raise UserError(
            f"{train.name} has one image a class, so none can be held out; give validation images"
        )
    description = (
        f"{len(kept):,} training images, {len(held):,} test images held out by seed {seed}"
    )
    return LabelledSplit(train, kept, train, held, classes, description)


def _labels(source: Source) -> NDArray[np.int64]:
    assert source.labels is not None
    return source.labels


def _classes(train: Source, validation: Source | None) -> tuple[str, ...]:
    """Names of all classes that occur on either side."""
    sides = [side for side in (train, validation) if side is not None and side.labels is not None]
    names = max((side.classes for side in sides), key=len)
    count = max(int(_labels(side).max(initial=-1)) + 1 for side in sides)
    return (*names, *map(str, range(len(names), count)))
