"""Backbones by name: any timm model that pools to features, with a stem for small images."""

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mocokit.errors import UserError
from mocokit.nets.batchnorm import use_groups

OWN = ("resnet_tiny",)  # models that are not timm's


class ResNetTiny(nn.Module):
    """Three stages of one basic block, 16-32-64 channels: for 32-pixel images on a CPU.

    (N, 3, H, W) -> (N, 64). timm's block; a 3x3 stem of stride 2, so that most of the work is at a
    quarter of the resolution.
    """

    num_features = 64

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        from timm.models.resnet import BasicBlock

        self.conv1 = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        stages, before = [], widths[0]
        for number, width in enumerate(widths):
            stride = 1 if number == 0 else 2
            shortcut = None
            if stride != 1 or before != width:
                shortcut = nn.Sequential(
                    nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
                )
            stages.append(BasicBlock(before, width, stride=stride, downsample=shortcut))
            before = width
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 64, H / 8, W / 8)."""
        maps: Tensor = self.stages(self.act1(self.bn1(self.conv1(images))))
        return maps

    def forward_head(self, maps: Tensor) -> Tensor:
        """(N, 64, h, w) -> (N, 64)."""
        return maps.mean((2, 3))


def build_backbone(
    name: str, stem: str = "imagenet", group_size: int = 32, zero_init_last: bool = False
) -> nn.Module:
    """A randomly initialised backbone, (N, 3, H, W) -> (N, .num_features), with grouped batch norm.

    Raises UserError for an unknown name, or a stem that the model does not have.
    """
    if name == "resnet_tiny":
        model: nn.Module = ResNetTiny()
    else:
        model = _timm_model(name, zero_init_last)
        if stem == "small":
            _make_stem_small(model, name)
    # Some timm models end in a wider layer, after the maps whose width is num_features.
    width: Any = getattr(model, "head_hidden_size", None) or model.num_features
    model.num_features = int(width)  # type: ignore[assignment]
    return use_groups(model, group_size)


def check_model(name: str, problem: str, ours: Sequence[str] = OWN, prefix: str = "") -> None:
    """Raises UserError, `problem` with the closest name or a way to list them, for no model's name.

    Models are timm's and those of `ours`. `prefix` stands before a name where users write it.
    """
    import timm

    if name in ours or timm.is_model(name):
        return
    close = difflib.get_close_matches(name, [*timm.list_models(), *ours], n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else "timm.list_models() lists the names"
    raise UserError(f"{problem}; {hint}")


def _timm_model(name: str, zero_init_last: bool) -> nn.Module:
    import timm

    check_model(name, f"net.backbone: timm has no model {name!r}")
    options: dict[str, Any] = {"num_classes": 0}
    if "zero_init_last" in _init_options(name):
        options["zero_init_last"] = zero_init_last
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # timm's renamed models: still right
        model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _init_options(name: str) -> set[str]:
    """Only timm's ResNets take zero_init_last, which by default is on."""
    import timm

    module = timm.model_entrypoint(name).__module__
    return {"zero_init_last"} if module == "timm.models.resnet" else set()


def _make_stem_small(model: nn.Module, name: str) -> None:
    """A 3x3 convolution of stride 1 and no max-pool, as in the authors' CIFAR-10 notebook."""
    conv = getattr(model, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise UserError(
            f"net.stem: {name} has no stem that can be made small; "
            "take a ResNet such as resnet18, or stem=imagenet"
        )
    new = nn.Conv2d(3, conv.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = new
    model.maxpool = nn.Identity()
