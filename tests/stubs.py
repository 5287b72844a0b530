"""Methods from outside the package, as short as the contract lets them be. Not exact to the papers.

They stand here to hold the contract (methods/method.py): each asks something else of it.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from mocokit.methods.losses import info_nce
from mocokit.methods.method import (
    KeyGroups,
    Method,
    MethodSettings,
    NoLeak,
    Output,
    ViewRole,
)
from mocokit.methods.parts import Queue, follow
from mocokit.methods.pieces import GroupPlan, keys_regrouped, normalise, shuffled_rows
from mocokit.nets.heads import Encoder
from mocokit.settings.section import setting
from mocokit.transfer import to_device


class SimSiam(Method):
    """No keys, no negatives, no queue, and none of MoCo's metrics (arXiv 2011.10566)."""

    settings = MethodSettings
    views = (ViewRole("first"), ViewRole("second"))
    leak = NoLeak("there are no negatives")
    expectation = "the loss falls from 0 towards -1."

    def __init__(self, encoder: Encoder, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, dim))

    @classmethod
    def build(cls, settings, context):
        return cls(context.encoder, context.dim)

    def forward(self, views, index, step):
        a, b = (self.encoder(view[:]) for view in views)
        p, q = (normalise(self.predictor(z)) for z in (a, b))
        loss = -((p * normalise(b).detach()).sum(1) + (q * normalise(a).detach()).sum(1)).mean() / 2
        return Output(loss, {"similarity": -loss.detach()})

    def update(self, keep, step, progress):
        pass


class MoCoV3Settings(MethodSettings):
    temperature: float = setting(0.2, "softmax temperature", gt=0)
    momentum: float = setting(0.99, "key encoder's momentum", ge=0, le=1)


class MoCoV3(Method):
    """A ViT without batch norm, keys from the batch, groups of parameters (arXiv 2104.02057)."""

    settings = MoCoV3Settings
    leak = NoLeak("the key encoder has no batch norm")
    expectation = "the loss starts near its level of chance."
    clip = 3.0

    def __init__(self, encoder: Encoder, dim: int, temperature: float, momentum: float) -> None:
        super().__init__()
        encoder.backbone.patch_embed.requires_grad_(False)  # frozen, as the authors advise
        self.encoder, self.key_encoder = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, dim))
        self.temperature, self.momentum = temperature, momentum

    @classmethod
    def build(cls, settings, context):
        return cls(context.encoder, context.dim, settings.temperature, settings.momentum)

    def forward(self, views, index, step):
        queries = [normalise(self.predictor(self.encoder(view[:]))) for view in views]
        with torch.no_grad():
            keys = [normalise(self.key_encoder(view[:])) for view in views]
        target = torch.arange(len(index), device=index.device)
        pairs = zip(queries, reversed(keys), strict=True)
        losses = [F.cross_entropy(q @ k.T / self.temperature, target) for q, k in pairs]
        return Output(2 * self.temperature * sum(losses), {})

    def update(self, keep, step, progress):
        follow(self.key_encoder, self.encoder, self.momentum)

    def parameter_groups(self):
        plain = [p for p in self.trained() if p.ndim <= 1]
        return [
            {"params": [p for p in self.trained() if p.ndim > 1]},
            {"params": plain, "weight_decay": 0.0, "lr_scale": 0.5},
        ]


class Dense(Method):
    """Two queues, a feature map, keys in shuffled groups (after DenseCL, arXiv 2011.09157)."""

    settings = MethodSettings
    expectation = "the queues start with random vectors."

    def __init__(self, encoder: Encoder, dim: int, count_groups) -> None:
        super().__init__()
        self.encoder, self.key_encoder = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.vectors, self.places = Queue(32, dim), Queue(32, encoder.num_features)
        self.count_groups, self.shuffle, self.whole = count_groups, True, False

    @classmethod
    def build(cls, settings, context):
        return cls(context.encoder, context.dim, context.count_groups)

    def forward(self, views, index, step):
        plan = GroupPlan(step.images, self.count_groups(step.images), None)
        order = plan.key_permutation(step, self.shuffle)
        maps, query = self.encoder.with_map(views[0][:])
        with torch.no_grad():
            images = shuffled_rows(views[1], order, plan)(slice(None))
            key_maps, key = (
                part[to_device(order.argsort(), part.device)]
                for part in self.key_encoder.with_map(images)
            )
        query, key = normalise(query), normalise(key)
        place, key_place = (normalise(m.mean((2, 3))) for m in (maps, key_maps))
        loss = info_nce(query, key, self.vectors.rows, 0.2)
        loss = loss + info_nce(place, key_place, self.places.rows, 0.2)
        hits = ((query * key).sum(1) > (query @ self.vectors.rows.T).amax(1)).float().mean()
        return Output(loss, {"contrast_top1": hits.detach()}, (key, key_place))

    def update(self, keep, step, progress):
        follow(self.key_encoder, self.encoder, 0.99)
        for queue, keys in zip(self.queues.values(), keep, strict=True):
            queue.enqueue(keys)

    leak = KeyGroups()

    def regrouped(self):
        return keys_regrouped(self)

    @property
    def queues(self):
        return {"vectors": self.vectors, "places": self.places}


class MultiCrop(Method):
    """Two large and six small views, of which the large ones give keys (arXiv 2006.09882)."""

    settings = MethodSettings
    leak = NoLeak("one group of batch norm: not a method to train with")
    expectation = "the queue starts with random vectors."

    def __init__(self, encoder: Encoder, dim: int) -> None:
        super().__init__()
        self.encoder, self.key_encoder = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.queue = Queue(32, dim, keys_per_image=2)

    @classmethod
    def roles(cls, settings):
        small = {"size": 16, "crop_area": (0.05, 0.3)}
        large = [ViewRole(f"large {n}", changes={"crop_area": (0.3, 1)}) for n in (1, 2)]
        return (*large, *(ViewRole(f"small {n}", changes=small) for n in range(1, 7)))

    @classmethod
    def build(cls, settings, context):
        return cls(context.encoder, context.dim)

    def forward(self, views, index, step):
        with torch.no_grad():
            keys = [normalise(self.key_encoder(view[:])) for view in views[:2]]
        losses = []
        for number, view in enumerate(views):
            query = normalise(self.encoder(view[:]))
            others = [key for n, key in enumerate(keys) if n != number]
            losses += [info_nce(query, key, self.queue.rows, 0.2) for key in others]
        return Output(torch.stack(losses).mean(), {}, torch.cat(keys))

    def update(self, keep, step, progress):
        follow(self.key_encoder, self.encoder, 0.99)
        self.queue.enqueue(keep)

    @property
    def queues(self):
        return {"queue": self.queue}
