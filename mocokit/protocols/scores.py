"""What a set of predictions is worth: accuracy, by class, and who is taken for whom."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Scores:
    """Counts of (true class, predicted class), from which everything else follows."""

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
        """Share of right predictions; NaN if there was none to judge."""
        return float(np.trace(self.confusion) / self.count) if self.count else float("nan")

    @property
    def per_class(self) -> NDArray[np.float64]:
        """Share of each class's images that were recognised (C,); NaN for a class without any."""
        images = self.confusion.sum(1)
        right = np.diag(self.confusion).astype(np.float64)
        shares = np.full(len(right), np.nan)
        np.divide(right, images, out=shares, where=images > 0)
        return shares

    @property
    def balanced(self) -> float:
        """Mean accuracy over the classes that there are: each class counts the same."""
        known = self.per_class[~np.isnan(self.per_class)]
        return float(known.mean()) if len(known) else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        return {
            "accuracy": _rounded(self.accuracy),
            "balanced_accuracy": _rounded(self.balanced),
            "images": self.count,
            "per_class": [_rounded(float(share)) for share in self.per_class],
            "confusion": self.confusion.tolist(),
        }


def _rounded(share: float) -> float | None:
    return None if np.isnan(share) else round(share, 6)
