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
