"""Stratified random choices of labelled images, drawn by mocokit.chance."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mocokit import chance


def stratified(labels: ArrayLike, share: float, seed: int, slot: int) -> NDArray[np.int64]:
    """Positions of about `share` of each class, at least one of each class, ascending.

    A smaller share is part of every larger one, so that a curve over shares adds images and never
    exchanges them.
    """
    labels = np.asarray(labels, np.int64)
    drawn = chance.uniform(seed, 0, np.arange(len(labels)), 0, slot)
    order = np.lexsort((drawn, labels))  # class by class, in a random order within each class
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    wanted = np.maximum(1, np.rint(share * counts)).astype(np.int64)
    return np.sort(order[rank < np.repeat(wanted, counts)])


def hold_out(
    labels: ArrayLike, share: float, seed: int, slot: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions to keep and positions held out, ascending. A class of one image is kept."""
    labels = np.asarray(labels, np.int64)
    held_out = stratified(labels, share, seed, slot)
    singletons = np.flatnonzero(np.bincount(labels) == 1) if len(labels) else labels
    held_out = held_out[~np.isin(labels[held_out], singletons)]
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
