"""Which labelled images a probe may learn from: stratified, and drawn from chance."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mocokit import chance


def stratified(labels: ArrayLike, share: float, seed: int, slot: int) -> NDArray[np.int64]:
    """Positions of about `share` of each class, at least one of each, rising.

    Of a larger share the smaller one is a part, so that curves over shares compare like with like.
    """
    labels = np.asarray(labels, np.int64)
    drawn = chance.uniform(seed, 0, np.arange(len(labels)), 0, slot)
    order = np.lexsort((drawn, labels))  # class by class, each in an order from chance
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    wanted = np.maximum(1, np.rint(share * counts)).astype(np.int64)
    return np.sort(order[rank < np.repeat(wanted, counts)])


def hold_out(
    labels: ArrayLike, share: float, seed: int, slot: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to keep and positions held out, rising; a class of one image is kept."""
    labels = np.asarray(labels, np.int64)
    held = stratified(labels, share, seed, slot)
    alone = np.flatnonzero(np.bincount(labels) == 1) if len(labels) else labels
    held = held[~np.isin(labels[held], alone)]
    return np.setdiff1d(np.arange(len(labels)), held), held
