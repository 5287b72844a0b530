"""Recipes for photos of about 224 pixels: MoCo, the rows of its tables, and what it replaces."""

from mocokit.recipes.derive import derive
from mocokit.settings.schema import Settings

AUG_PLUS = {  # the paper's "aug+": blur, and gray after a colour jitter not always applied
    "views.order": ("crop", "jitter", "grayscale", "blur", "flip"),
    "views.jitter_probability": 0.8,
    "views.hue": 0.1,
    "views.blur_probability": 0.5,
}
MLP = {  # the paper's "MLP" row (a), at the temperature that is best with it
    "net.head": "mlp",
    "method.temperature": 0.2,
}
COSINE = {"optim.schedule": "cosine"}


def mocov1() -> Settings:
    """MoCo v1: momentum contrast with InstDisc's augmentation (arXiv 1911.05722).

    Command: mocokit pretrain mocov1 IMAGENET/
    Cost: about 53 h on eight V100 for 200 epochs (the authors' README).
    Published: ImageNet linear 60.6 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    changes = {
        "net.backbone": "resnet50",
        "net.head": "linear",
        "net.dim": 128,
        "method.temperature": 0.07,
        "method.queue_size": 65536,
        "method.momentum": 0.999,
        "method.group_size": 32,  # the authors' 256 images on 8 GPUs
        "views.size": 224,
        "views.order": ("crop", "grayscale", "jitter", "flip"),
        "views.crop_area": (0.2, 1.0),
        "views.jitter_probability": 1.0,
        "views.hue": 0.4,
        "views.blur_probability": 0.0,
        "optim.name": "sgd",
        "optim.lr": 0.03,
        "optim.weight_decay": 1e-4,
        "optim.schedule": "steps",  # a tenth after epochs 120 and 160 of 200
        "train.epochs": 200,
        "train.batch_size": 256,
    }
    return derive(Settings(), "mocov1", changes)


def mocov2() -> Settings:
    """MoCo v2: MoCo v1 with an MLP head, stronger augmentation, cosine (arXiv 2003.04297).

    Command: mocokit pretrain mocov2 IMAGES/
    Cost: about 53 h on eight V100 for 200 epochs of ImageNet (the authors' README).
    Published: ImageNet linear 67.5 (Table 1, row d).
    Measured: not measured.
    """
    return derive(mocov1(), "mocov2", MLP | AUG_PLUS | COSINE)


def mocov2_800() -> Settings:
    """MoCo v2 for 800 epochs (arXiv 2003.04297).

    Command: mocokit pretrain mocov2_800 IMAGES/
    Cost: four times mocov2.
    Published: ImageNet linear 71.1 (Table 1, row e).
    Measured: not measured.
    """
    return derive(mocov2(), "mocov2_800", {"train.epochs": 800})


def ablation_a() -> Settings:
    """Table 1, row a: MoCo v1 with the MLP head, at its best temperature 0.2.

    Command: mocokit pretrain ablation_a IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 66.2 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return derive(mocov1(), "ablation_a", MLP)


def ablation_b() -> Settings:
    """Table 1, row b: MoCo v1 with the stronger augmentation, head and temperature as in v1.

    Command: mocokit pretrain ablation_b IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 63.4 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return derive(mocov1(), "ablation_b", AUG_PLUS)


def ablation_c() -> Settings:
    """Table 1, row c: MoCo v1 with MLP head and stronger augmentation, without cosine.

    Command: mocokit pretrain ablation_c IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 67.3 (arXiv 2003.04297, Table 1). Rows d, e are mocov2, mocov2_800.
    Measured: not measured.
    """
    return derive(mocov1(), "ablation_c", MLP | AUG_PLUS)


def mocov2_symmetric() -> Settings:
    """MoCo v2 with each view once query and once key: about twice the work of each epoch.

    Command: mocokit pretrain mocov2_symmetric IMAGES/
    Cost: about twice mocov2.
    Published: ImageNet linear 69.9 at 200 epochs (arXiv 2011.10566, Table 4, their implementation).
    Measured: not measured.
    """
    return derive(mocov2(), "mocov2_symmetric", {"method.symmetric": True})


def mocov2plus() -> Settings:
    """MoCo v2+: MoCo v2 with BYOL's heads and rising key momentum (megvii's revisitAIRL).

    Symmetric; the keys of one view, drawn at random in each step, join the queue. The learning rate
    is mocov2's: none is stated by the source that we have.

    Command: mocokit pretrain mocov2plus IMAGES/
    Cost: over twice mocov2.
    Published: ImageNet linear 72.4 at 200 epochs (megvii's revisitAIRL).
    Measured: not measured.
    """
    changes = {
        "net.head": "mlp_bn",
        "net.predictor": True,
        "net.hidden": 4096,
        "net.dim": 256,
        "method.symmetric": True,
        "method.enqueue": "one",
        "method.momentum": 0.99,
        "method.momentum_schedule": "cosine",
        "method.batch_norm": "whole",
        "optim.warmup_epochs": 10.0,
    }
    return derive(mocov2(), "mocov2plus", changes)
