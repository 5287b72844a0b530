"""Labelled images for a probe: some to train on, others to test on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mocokit.chance import Slot
from mocokit.data.source import Source
from mocokit.errors import UserError
from mocokit.files import show
from mocokit.protocols.split import hold_out, stratified

TEST_SHARE = 0.2  # of the labelled images, held out if there are no validation images


@dataclass(frozen=True)
class LabelledSplit:
    """Numbers are those of the sources, ascending.

    With `leave_one_out`, training and test images are the same.
    """

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

    def remarks(self) -> list[str]:
        """What a reader must know beside the score."""
        tested, counts = np.unique(self.test_labels, return_counts=True)
        if len(tested) == 1:
            only = show(self.classes[int(tested[0])])
            return [f"all {len(self.test_numbers):,} test images are of one class, {only}"]
        if self.leave_one_out and (alone := int((counts == 1).sum())):
            what = f"{alone:,} of {len(self.test_numbers):,} images are the only one of their class"
            return [f"{what}, which nothing can vote for: they are counted as wrong"]
        return []

    def unreadable_test(self) -> UserError:
        return UserError(f"none of the test images of {self.test.name} can be read")

    def with_share(self, share: float, seed: int) -> "LabelledSplit":
        """The same test images, with a stratified share of the training images."""
        if share >= 1:
            return self
        kept = self.train_numbers[stratified(self.train_labels, share, seed, Slot.LABELS)]
        description = f"{len(kept):,} labelled images ({share:.3g} of each class, seed {seed}), "
        description += self.description.split(", ", 1)[1]
        return LabelledSplit(
            self.train, kept, self.test, self.test_numbers, self.classes, description
        )


def check_classes(labels: NDArray[np.int64], name: str) -> None:
    """Raises UserError if labelled images are of fewer than two classes."""
    if reason := lacking_classes(labels, name):
        raise UserError(f"{reason}; give images of at least two classes, each in its own folder")


def lacking_classes(labels: NDArray[np.int64], name: str) -> str:
    """Why images with these labels cannot be a bank or train a classifier; "" if they can."""
    labels = labels[labels >= 0]  # the others have no class
    if len(labels) and labels.min() < labels.max():
        return ""
    what = f"the {len(labels):,} labelled images of {name} are of one class"
    return f"{what}, so a score would mean nothing"


def labelled_split(
    train: Source, validation: Source | None, *, seed: int, leave_one_out: bool = False
) -> LabelledSplit:
    """Train on the training images, and test on the validation images if they have labels.

    Otherwise each training image is classified by all others (`leave_one_out`), or a stratified
    fifth of the training images is held out for the test. Raises UserError if labels are missing
    or all the same.
    """
    if train.labels is None:
        raise UserError(
            f"{train.name} has no labels, so it cannot be scored; give a folder "
            "with a subfolder per class, one with train/ and val/, or an .npz with train_labels"
        )
    check_classes(train.labels, train.name)
    everything = np.flatnonzero(train.labels >= 0)  # the others have no class
    classes = _classes(train, validation)
    known = None if validation is None else validation.labels
    if validation is not None and known is not None and (known >= 0).any():
        tested = np.flatnonzero(known >= 0)
        description = f"{len(everything):,} training images, {len(tested):,} test images"
        return LabelledSplit(train, everything, validation, tested, classes, description)
    if leave_one_out:
        if np.bincount(train.labels[everything]).max() < 2:
            raise UserError(
                f"{train.name} has one image per class, so no image has another one of its class "
                "that could vote for it; give validation images"
            )
        description = f"{len(everything):,} training images, each left out of its own vote"
        return LabelledSplit(train, everything, train, everything, classes, description, True)
    kept, held_out = hold_out(train.labels[everything], TEST_SHARE, seed, Slot.TEST)
    kept, held_out = everything[kept], everything[held_out]
    if not len(held_out):
        raise UserError(
            f"{train.name} has one image per class, so none can be held out; give validation images"
        )
    description = (
        f"{len(kept):,} training images, {len(held_out):,} test images held out by seed {seed}"
    )
    return LabelledSplit(train, kept, train, held_out, classes, description)


def _labels(source: Source) -> NDArray[np.int64]:
    assert source.labels is not None
    return source.labels


def _classes(train: Source, validation: Source | None) -> tuple[str, ...]:
    """The names of all classes that occur in the training or the validation images."""
    sides = [side for side in (train, validation) if side is not None and side.labels is not None]
    names = max((side.classes for side in sides), key=len)
    count = max(int(_labels(side).max(initial=-1)) + 1 for side in sides)
    return (*names, *map(str, range(len(names), count)))
