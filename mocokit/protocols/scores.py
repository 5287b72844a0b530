"""Scores of a set of predictions: accuracy, accuracy by class, and the confusion matrix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Scores:
    """Counts of (true class, predicted class). Every other score follows from them."""

    confusion: NDArray[np.int64]  # (C, C)

    @classmethod
    def of(cls, predicted: ArrayLike, labels: ArrayLike, classes: int) -> "Scores":
        """Predictions and labels (N,), both in [0, classes)."""
        pairs = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
        return cls(np.bincount(pairs, minlength=classes**2).reshape(classes, classes))

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The share of correct predictions; NaN without predictions."""
        return float(np.trace(self.confusion) / self.count) if self.count else float("nan")

    @property
    def per_class(self) -> NDArray[np.float64]:
        """The share of correct predictions for each class (C,); NaN for a class without images."""
        images = self.confusion.sum(1)
        right = np.diag(self.confusion).astype(np.float64)
        shares = np.full(len(right), np.nan)
        np.divide(right, images, out=shares, where=images > 0)
        return shares

    @property
    def balanced(self) -> float:
        """The mean accuracy over all classes that have images; each class counts the same."""
        present = self.per_class[~np.isnan(self.per_class)]
        return float(present.mean()) if len(present) else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {
            "accuracy": _rounded(self.accuracy),
            "balanced_accuracy": _rounded(self.balanced),
            "images": self.count,
            "per_class": [_rounded(float(share)) for share in self.per_class],
            "confusion": self.confusion.tolist(),
        }


def _rounded(share: float) -> float | None:
    return None if np.isnan(share) else round(share, 6)
