"""The names that others rely on (docs/design.md): they exist, with these parameters."""

import importlib
import inspect

import pytest

import mocokit

NAMES = {
    "mocokit.train.pretrain": ("recipe data out epochs batch_size device seed resume settings"),
    "mocokit.weights.resolve.load": "path",
    "mocokit.settings.difference": "a b",
    "mocokit.chance.uniform": "seed epoch index view slot",
    "mocokit.views.separable.crop_resize": "images boxes size flip",
    "mocokit.views.separable.gaussian_blur": "images sigma",
    "mocokit.views.colour.jitter": "images brightness contrast saturation hue order",
    "mocokit.methods.losses.info_nce": "query key negatives temperature",
    "mocokit.methods.losses.nt_xent": "a b temperature",
    "mocokit.methods.parts.follow": "key_module module momentum",
    "mocokit.evaluate.knn.knn_scores": "bank labels queries k temperature classes",
    "mocokit.evaluate.voc_ap.average_precision": "detections ground_truth iou metric",
    "mocokit.methods.parts.Queue": "size dim",
    "mocokit.recipes.mocov1": "",
    "mocokit.recipes.mocov2": "",
    "mocokit.recipes.mocov2_800": "",
    "mocokit.recipes.mocov2_cifar10": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    module, attribute = name.rsplit(".", 1)
    value = getattr(importlib.import_module(module), attribute)
    assert " ".join(inspect.signature(value).parameters) == NAMES[name]


def test_grouped_batch_norm_begins_with_channels_and_group_size():
    from mocokit.nets.batchnorm import GroupedBatchNorm2d

    assert list(inspect.signature(GroupedBatchNorm2d).parameters)[:2] == ["channels", "group_size"]


def test_public_names():
    for name in mocokit.__all__:
        assert getattr(mocokit, name) is not None
    assert callable(mocokit.pretrain) and callable(mocokit.load)
    assert mocokit.recipes.mocov2().recipe == "mocov2"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mocokit.nothing  # noqa: B018
