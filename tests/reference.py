"""Momentum contrast transcribed from the paper's Algorithm 1 (arXiv 1911.05722), to compare with.

Nothing here is shared with the package: batch norm is torch's own, and each group of images is a
forward of its own, as on the authors' GPUs.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F


class ReferenceMoCo:
    """Plain and slow: f_q, f_k, a queue as a list of columns, SGD."""

    def __init__(self, encoder: nn.Module, queue: torch.Tensor, m: float, t: float, groups: int):
        self.f_q, self.f_k = encoder, copy.deepcopy(encoder)
        self.queue, self.pointer = queue.T.clone(), 0  # C x K, as in the paper
        self.m, self.t, self.groups = m, t, groups

    def forward_in_groups(self, f: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([f(part) for part in x.tensor_split(self.groups)])

    def step(self, x_q, x_k, permutation, optimizer, follow_first=False):
        if follow_first:  # the order of the authors' code; the paper's follows at the end
            self.follow()
        q = F.normalize(self.forward_in_groups(self.f_q, x_q), dim=1)  # N x C
        with torch.no_grad():
            k = F.normalize(self.forward_in_groups(self.f_k, x_k[permutation]), dim=1)
            k = k[permutation.argsort()]  # N x C
        l_pos = torch.bmm(q[:, None], k[:, :, None])[:, 0]  # N x 1
        l_neg = torch.mm(q, self.queue.clone())  # N x K
        loss = F.cross_entropy(
            torch.cat([l_pos, l_neg], 1) / self.t, torch.zeros(len(q), dtype=torch.long)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not follow_first:
            self.follow()
        for key in k:  # one column at a time, wrapping
            self.queue[:, self.pointer] = key
            self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return loss.detach()

    def follow(self):
        with torch.no_grad():
            for k, q in zip(self.f_k.parameters(), self.f_q.parameters(), strict=True):
                k.copy_(self.m * k + (1 - self.m) * q)


def reference_simclr(encoder: nn.Module, a, b, t: float) -> torch.Tensor:
    """SimCLR's Algorithm 1 (arXiv 2002.05709), with one forward of all 2N views, image by image."""
    z = F.normalize(encoder(torch.cat([a, b])), dim=1)
    n, loss = len(a), 0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        s = (z @ z[i]) / t
        loss = loss - s[partner] + torch.cat([s[:i], s[i + 1 :]]).logsumexp(0)
    return loss / (2 * n)


def reference_endtoend(f: nn.Module, a, b, permutation, t: float, groups: int, symmetric: bool):
    """End-to-end with batch norm in groups, the second views shuffled over them."""

    def encode(x):
        return F.normalize(torch.cat([f(part) for part in x.tensor_split(groups)]), dim=1)

    q, k = encode(a), encode(b[permutation])[permutation.argsort()]
    if not symmetric:  # MoCo v1: row i is told from the other rows of the batch
        return F.cross_entropy(q @ k.T / t, torch.arange(len(q)))
    z = torch.cat([q, k])
    logits = (z @ z.T / t).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(q)))


class ReferenceBank:
    """InstDisc (arXiv 1805.01978): a vector for each image, moved after the scores."""

    def __init__(self, encoder: nn.Module, rows: torch.Tensor, t: float, groups: int):
        self.f, self.rows, self.t, self.groups, self.z = encoder, rows.clone(), t, groups, None

    def encode(self, x):
        return F.normalize(torch.cat([self.f(p) for p in x.tensor_split(self.groups)]), dim=1)

    def loss(self, q, index, drawn, noise):
        total = 0
        for i, image in enumerate(index.tolist()):
            own = (q[i] @ self.rows[image] / self.t).exp()
            if not noise:
                others = [j for j in drawn.tolist() if j != image]
                rest = (self.rows[others] @ q[i] / self.t).exp().sum()
                total = total - torch.log(own / (own + rest))
                continue
            rest = (self.rows[drawn[i]] @ q[i] / self.t).exp()
            share = len(rest) / len(self.rows)
            own, rest = own / self.z, rest / self.z
            total = total - torch.log(own / (own + share))
            total = total - torch.log(1 - rest / (rest + share)).sum()
        return total / len(index)

    def estimate(self, q, index, drawn):
        own = (q * self.rows[index]).sum(1, keepdim=True)
        rest = torch.stack([self.rows[row] @ v for row, v in zip(drawn, q, strict=True)])
        if self.z is None:
            mean = torch.cat([own, rest], 1).div(self.t).exp().mean()
            self.z = (mean * len(self.rows)).detach()

    @torch.no_grad()
    def blend(self, q, index):
        for v, image in zip(q, index.tolist(), strict=True):
            row = 0.5 * self.rows[image] + 0.5 * v
            self.rows[image] = row / row.norm()
