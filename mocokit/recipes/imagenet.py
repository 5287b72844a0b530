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
    """MoCo v1: linear head, 200 epochs.

    Momentum contrast: keys come from a slowly moving copy of the encoder, and a queue of earlier
    keys gives the negatives. Views are InstDisc's.

    Source: arXiv 1911.05722 and the authors' main_moco.py.
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
    return derive(None, "mocov1", changes)


def mocov2() -> Settings:
    """MoCo v2: MLP head, aug+, cosine.

    MoCo v1 with an MLP head, stronger augmentation ("aug+") and a cosine schedule: Table 1, row d.

    Source: arXiv 2003.04297 and the authors' main_moco.py.
    Command: mocokit pretrain mocov2 IMAGES/
    Cost: about 53 h on eight V100 for 200 epochs of ImageNet (the authors' README).
    Published: ImageNet linear 67.5 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return derive(mocov1(), "mocov2", MLP | AUG_PLUS | COSINE)


def mocov2_800() -> Settings:
    """MoCo v2 for 800 epochs.

    Table 1, row e.

    Source: arXiv 2003.04297.
    Command: mocokit pretrain mocov2_800 IMAGES/
    Cost: four times mocov2.
    Published: ImageNet linear 71.1 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return derive(mocov2(), "mocov2_800", {"train.epochs": 800})


def ablation_a() -> Settings:
    """MoCo v1 with the MLP head.

    Table 1, row a. The temperature is 0.2, the best one with this head.

    Source: arXiv 2003.04297.
    Command: mocokit pretrain ablation_a IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 66.2 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return derive(mocov1(), "ablation_a", MLP)


def ablation_b() -> Settings:
    """MoCo v1 with aug+.

    Table 1, row b: MoCo v2's augmentation with MoCo v1's head and temperature.

    Source: arXiv 2003.04297.
    Command: mocokit pretrain ablation_b IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 63.4 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return derive(mocov1(), "ablation_b", AUG_PLUS)


def ablation_c() -> Settings:
    """MoCo v1 with MLP head and aug+.

    Table 1, row c: MoCo v2 without its cosine schedule. Rows d and e are mocov2 and mocov2_800.

    Source: arXiv 2003.04297.
    Command: mocokit pretrain ablation_c IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 67.3 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return derive(mocov1(), "ablation_c", MLP | AUG_PLUS)


def mocov2_symmetric() -> Settings:
    """MoCo v2 with the symmetric loss.

    Each view is once the query and once the key.

    Source: arXiv 2011.10566, Table 4.
    Command: mocokit pretrain mocov2_symmetric IMAGES/
    Cost: about twice mocov2.
    Published: ImageNet linear 69.9 at 200 epochs (arXiv 2011.10566, Table 4, their implementation).
    Measured: not measured.
    """
    return derive(mocov2(), "mocov2_symmetric", {"method.symmetric": True})


def mocov2plus() -> Settings:
    """MoCo v2+: BYOL's heads, symmetric.

    MoCo v2 with BYOL's heads and a key momentum that rises to one. The loss is symmetric. In each
    step, the keys of one view, drawn at random, join the queue. The learning rate is mocov2's,
    since the source states none.

    Source: megvii's revisitAIRL.
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
