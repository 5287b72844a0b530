"""From settings to a method: the mechanism, with encoder, loss and memory as they start."""

from functools import partial

import torch
from torch import nn

from mocokit.chance import Slot
from mocokit.config import Settings
from mocokit.engine.runtime import seed_libraries
from mocokit.errors import UserError
from mocokit.methods.losses import LOSSES, InfoNCE
from mocokit.methods.memorybank import MemoryBank
from mocokit.methods.method import Method
from mocokit.methods.moco import MoCo
from mocokit.methods.simclr import SimCLR
from mocokit.nets.backbones import build_backbone
from mocokit.nets.batchnorm import use_groups, use_whole
from mocokit.nets.heads import Encoder, build_head
from mocokit.nets.modes import evaluating
from mocokit.sizes import InEffect, count_groups


def build_encoder(settings: Settings) -> Encoder:
    """Backbone and head with their initial weights, which follow from the seed."""
    net = settings.net
    seed_libraries(settings.seed, 0, Slot.INITIALISE)
    backbone = build_backbone(
        net.backbone, net.stem, settings.method.group_size, net.zero_init_last
    )
    head = build_head(net.head, int(backbone.num_features), net.hidden, net.dim)  # type: ignore[arg-type]
    encoder = Encoder(backbone, _grouped(head, settings))
    try:
        with evaluating(encoder):
            encoder(torch.zeros(2, 3, settings.views.size, settings.views.size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"net.backbone {net.backbone} cannot take views of {settings.views.size} pixels "
            f"({str(error).splitlines()[0]}); set views.size, or another backbone"
        ) from None
    return encoder


def build_method(settings: Settings, effect: InEffect) -> Method:
    """The mechanism that the settings name, on the CPU."""
    build = {"moco": _moco, "simclr": _simclr, "memorybank": _memorybank}[settings.method.name]
    method = build(settings, effect)
    if settings.method.batch_norm == "whole":
        use_whole(method)
    return method


def _moco(settings: Settings, effect: InEffect) -> Method:
    method, net = settings.method, settings.net
    encoder = build_encoder(settings)
    predictor = None
    if net.predictor:
        width = net.hidden or encoder.num_features
        predictor = _grouped(build_head("mlp_bn", net.dim, width, net.dim), settings)
    assert method.queue_size is not None and effect.key_momentum is not None
    return MoCo(
        encoder,
        loss=LOSSES[method.loss](method.temperature),
        dim=net.dim,
        queue_size=method.queue_size,
        momentum=effect.key_momentum,
        momentum_to_one=method.momentum_schedule == "cosine",
        count_groups=partial(count_groups, settings),
        predictor=predictor,
        whole=method.batch_norm == "whole",
        shuffle=method.shuffle,
        symmetric=method.symmetric,
        enqueue=method.enqueue,
        micro_batch=settings.train.micro_batch,
        chunk=method.chunk,
    )


def _simclr(settings: Settings, effect: InEffect) -> Method:
    method = settings.method
    return SimCLR(
        build_encoder(settings),
        loss=LOSSES[method.loss](method.temperature),
        count_groups=partial(count_groups, settings),
        batch_size=settings.train.batch_size,
        whole=method.batch_norm == "whole",
        shuffle=method.shuffle,
        symmetric=method.symmetric,
        micro_batch=settings.train.micro_batch,
        chunk=method.chunk,
    )


def _memorybank(settings: Settings, effect: InEffect) -> Method:
    method = settings.method
    return MemoryBank(
        build_encoder(settings),
        loss=LOSSES.get(method.loss, InfoNCE)(method.temperature),
        images=effect.images,
        dim=settings.net.dim,
        negatives=method.bank_negatives,
        momentum=method.bank_momentum,
        count_groups=partial(count_groups, settings),
        noise=method.loss == "nce",
        whole=method.batch_norm == "whole",
        micro_batch=settings.train.micro_batch,
        chunk=method.chunk,
    )


def _grouped(head: nn.Module, settings: Settings) -> nn.Module:
    return use_groups(head, settings.method.group_size)
