"""The network that settings describe, with its first weights, and the views it expects."""

from typing import Any

import torch

from mocokit.chance import Slot
from mocokit.engine.hardware import room_for
from mocokit.engine.runtime import seed_libraries
from mocokit.errors import UserError
from mocokit.nets.backbones import build_backbone
from mocokit.nets.batchnorm import use_groups
from mocokit.nets.heads import Encoder, build_head
from mocokit.nets.modes import evaluating
from mocokit.settings.schema import Settings
from mocokit.settings.sizes import scoring_side
from mocokit.views.params import ViewSpec

COPIES = 4  # of weights in training: the keys' encoder, gradients, momentum


def view_spec(settings: Settings) -> ViewSpec:
    """How the settings' views are made, and how images are scored."""
    return ViewSpec(**settings.views.model_dump(), resize=scoring_side(settings))


def build_encoder(settings: Settings) -> Encoder:
    """Backbone and head with their initial weights, which follow from the seed."""
    net = settings.net
    seed_libraries(settings.seed, 0, Slot.INITIALISE)
    backbone = build_backbone(
        net.backbone, net.stem, settings.method.group_size, net.zero_init_last
    )
    features: Any = backbone.num_features
    hidden = net.hidden or int(features)
    numbers = int(features) * hidden + hidden * net.dim
    with room_for(f"a head of net.hidden {hidden} and net.dim {net.dim}", COPIES * 4 * numbers):
        head = build_head(net.head, int(features), net.hidden, net.dim)
    encoder = Encoder(backbone, use_groups(head, settings.method.group_size))
    try:
        with evaluating(encoder):
            encoder(torch.zeros(2, 3, settings.views.size, settings.views.size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"net.backbone {net.backbone} cannot take views of {settings.views.size} pixels "
            f"({str(error).splitlines()[0]}); set views.size, or another backbone"
        ) from None
    return encoder
