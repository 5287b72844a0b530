"""A transcription in float64, without torch, of what golden.json pins; run it to print the file.

Inputs are sines, so that any language can make them again.
"""

import json
import math

import numpy as np

SIZES = [(1, 1), (3, 5), (8, 64)]  # queries N, negatives K
TEMPERATURES = [0.07, 0.2, 1.0]
MOMENTA = [0.0, 0.5, 0.9, 0.99, 0.999, 1.0]


def unit(count, seed, dim=6):
    """(count, dim) unit rows of sines."""
    i, j = np.meshgrid(np.arange(count), np.arange(dim), indexing="ij")
    rows = np.sin(1.0 + 3.0 * i + 7.0 * j + 11.0 * seed + 0.5 * i * j)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def info_nce(q, k, bank, t):
    """MoCo v1, eq. 1, and its gradient by q."""
    loss, gradient = 0.0, np.zeros_like(q)
    for n in range(len(q)):
        rows = np.vstack([k[n], bank])
        weights = np.exp(rows @ q[n] / t)
        share = weights / weights.sum()
        loss -= math.log(share[0]) / len(q)
        gradient[n] = (share @ rows - k[n]) / t / len(q)
    return loss, gradient


def nt_xent(a, b, t):
    """SimCLR, eq. 1, averaged over all 2N views."""
    z, n, loss = np.vstack([a, b]), len(a), 0.0
    for i in range(2 * n):
        s = np.exp(z @ z[i] / t)
        loss -= math.log(s[(i + n) % (2 * n)] / (s.sum() - s[i])) / (2 * n)
    return loss


def follow(m, steps=3):
    """The key's value after some steps towards queries 1, 2, 3, from 10."""
    key = 10.0
    for query in range(1, steps + 1):
        key = m * key + (1 - m) * query
    return key


def schedules():
    """Learning rates of all 200 epochs: MoCo v1's steps, v2's cosine from 0, the notebook's."""
    return {
        "mocov1": [0.03 * 0.1 ** ((e >= 120) + (e >= 160)) for e in range(200)],
        "mocov2": [0.03 * 0.5 * (1 + math.cos(math.pi * e / 200)) for e in range(200)],
        "mocov2_cifar10": [
            0.06 * 0.5 * (1 + math.cos(math.pi * (e + 1) / 200)) for e in range(200)
        ],
    }


def values():
    contrast = []
    for n, k in SIZES:
        for t in TEMPERATURES:
            loss, gradient = info_nce(unit(n, 0), unit(n, 1), unit(k, 2), t)
            views = nt_xent(unit(n + 1, 0), unit(n + 1, 1), t)
            contrast.append(
                {"n": n, "k": k, "t": t, "loss": loss, "gradient": gradient.tolist(),
                 "nt_xent": views}
            )  # fmt: skip
    return {"contrast": contrast, "follow": [follow(m) for m in MOMENTA], "lr": schedules()}


if __name__ == "__main__":
    import sys

    json.dump(values(), sys.stdout, indent=1)
