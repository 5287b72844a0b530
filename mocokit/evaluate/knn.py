"""The kNN vote by its public name; it lives in protocols/knn.py."""

from mocokit.protocols.knn import knn_scores

__all__ = ["knn_scores"]
