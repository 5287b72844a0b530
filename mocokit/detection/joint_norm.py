"""A ResNet applied to several batches of images at once, with one set of batch statistics.

The images of a step differ in size. If all of them were padded to the largest, padding would fill
half of the maps, and batch norm would count it. Images are therefore processed in pairs of similar
shape, as on the authors' 8 GPUs. All pairs pass each layer before the next one, and each batch norm
sees the pixels of all pairs as one batch.
"""

from collections.abc import Sequence

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from mocokit.errors import UserError
from mocokit.nets.batchnorm import GroupedBatchNorm2d, use_groups, use_whole

_FIRST = ("conv1", "bn1", "act1", "maxpool")
# Layers of timm's blocks in order. The last one comes after the shortcut is added.
_BASIC = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "drop_path", "act2")
_BOTTLENECK = (
    *("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"),
    *("se", "drop_path", "act3"),
)


def joint(module: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """The output of the module for each of several batches (n_i, C, H_i, W_i).

    Batch norms use the statistics of all batches together, with the same weight for every pixel.
    """
    outputs = [*maps]
    # Containers are opened, so that all batches reach a batch norm at the same time.
    if isinstance(module, nn.Sequential):
        for child in module:
            outputs = joint(child, outputs)
        return outputs
    if isinstance(module, BasicBlock | Bottleneck):
        return _block(module, outputs)
    if isinstance(module, GroupedBatchNorm2d) and len(outputs) > 1:
        return _joint_norm(module, outputs)
    return [module(one) for one in outputs]


def _joint_norm(norm: GroupedBatchNorm2d, maps: list[Tensor]) -> list[Tensor]:
    """Normalise the pixels of all maps as the rows of a single image."""
    # Sizes differ, so only the pixels can be concatenated. In channels-last maps they are rows.
    rows = torch.cat([one.permute(0, 2, 3, 1).reshape(-1, norm.channels) for one in maps])
    normed = norm(rows[None, :, None].permute(0, 3, 1, 2))  # (1, C, pixels, 1)
    rows, outputs, start = normed.permute(0, 2, 3, 1).reshape(-1, norm.channels), [], 0
    for one in maps:
        images, _, height, width = one.shape
        part = rows[start : start + images * height * width]
        start += len(part)
        outputs.append(part.view(images, height, width, -1).permute(0, 3, 1, 2))
    return outputs


def _block(block: BasicBlock | Bottleneck, maps: list[Tensor]) -> list[Tensor]:
    names = _BOTTLENECK if isinstance(block, Bottleneck) else _BASIC
    shortcut = maps if block.downsample is None else joint(block.downsample, maps)
    for name in names[:-1]:
        if (layer := getattr(block, name)) is not None:  # se and drop_path may be off
            maps = joint(layer, maps)
    added = [one + short for one, short in zip(maps, shortcut, strict=True)]
    return joint(getattr(block, names[-1]), added)


def cut_resnet(network: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """(all up to the third stage, the fourth stage) of a timm ResNet, as C4 detectors use it.

    Afterwards every batch norm covers the whole step. Raises UserError for other networks.
    """
    if not isinstance(network, ResNet) or not all(
        {type(block) for block in layer} <= {BasicBlock, Bottleneck}
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4)
    ):
        name = type(network).__name__
        raise UserError(f"detection takes a ResNet such as resnet18, 34 or 50, not {name}")
    use_groups(network, 1)
    use_whole(network)
    for layer in network.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # its input is a view of the pixels of all batches
    first = [getattr(network, name) for name in _FIRST]
    body = nn.Sequential(*first, network.layer1, network.layer2, network.layer3)
    return body, network.layer4


def whole_norm(channels: int) -> GroupedBatchNorm2d:
    """A new batch norm that covers the whole step."""
    norm = GroupedBatchNorm2d(channels, 1)
    use_whole(nn.Sequential(norm))
    return norm
