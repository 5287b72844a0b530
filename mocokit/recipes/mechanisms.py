"""The other ways to get keys and negatives: the batch itself, and a bank of the whole data."""

from mocokit.recipes.derive import derive
from mocokit.recipes.imagenet import mocov1, mocov2
from mocokit.recipes.views import simclr_views
from mocokit.settings.schema import Settings

END_TO_END = {  # no queue and no key encoder: all views of a batch against each other
    "method.name": "simclr",
    "method.symmetric": True,
}
BANK = {"method.name": "memorybank"}


def endtoend() -> Settings:
    """MoCo v2 without queue: end-to-end.

    MoCo v2's settings with the end-to-end mechanism. The other images of the batch are the
    negatives, and gradients flow through both views.

    Source: arXiv 2003.04297, Table 3.
    Command: mocokit pretrain endtoend IMAGES/
    Cost: published for 200 epochs on eight V100: 7.4 GB a GPU and 65 h, where MoCo has 5.0 GB and
    53 h (arXiv 2003.04297, Table 3).
    Published: no accuracy at these settings.
    Measured: not measured.
    """
    return derive(mocov2(), "endtoend", END_TO_END)


def endtoend_4096() -> Settings:
    """End-to-end, batch 4096, in pieces.

    The row of Table 3 that could not be run. A step works in pieces of 256 images (GradCache) and
    has the gradients of the undivided batch, at the cost of one more forward pass.

    Source: arXiv 2003.04297, Table 3; GradCache: arXiv 2101.06983.
    Command: mocokit pretrain endtoend_4096 IMAGES/
    Cost: published for the undivided batch as 93.0 GB a GPU (estimated), hours n/a
    (arXiv 2003.04297, Table 3).
    Published: no accuracy at these settings.
    Measured: not measured.
    """
    changes = {"train.batch_size": 4096, "train.micro_batch": 256}
    return derive(endtoend(), "endtoend_4096", changes)


def endtoend_v1() -> Settings:
    """MoCo v1 without queue: end-to-end.

    MoCo v1's settings with the end-to-end mechanism: first views against second views.

    Source: arXiv 1911.05722, Fig. 3.
    Command: mocokit pretrain endtoend_v1 IMAGES/
    Cost: not published.
    Published: ImageNet linear 54.9 at batch 256, where the dictionary is as large as the batch
    (arXiv 1911.05722, Fig. 3, K 256).
    Measured: not measured.
    """
    return derive(mocov1(), "endtoend_v1", END_TO_END | {"method.symmetric": False})


def simclr() -> Settings:
    """SimCLR, batch 4096, 1000 epochs.

    Stronger augmentation, LARS, and batch norm over all 2N views.

    Source: arXiv 2002.05709, appendix A.
    Command: mocokit pretrain simclr IMAGES/
    Cost: many devices: the batch of 4096 has one batch norm, so it cannot be done in pieces.
    Published: ImageNet linear 69.3 (arXiv 2003.04297, Table 2).
    Measured: not measured.
    """
    changes = {
        **simclr_views(),
        "net.zero_init_last": True,
        "method.temperature": 0.1,
        "method.batch_norm": "whole",
        "optim.name": "lars",
        "optim.lr": 0.3,
        "optim.weight_decay": 1e-6,
        "optim.per": "step",
        "optim.warmup_epochs": 10.0,
        "train.epochs": 1000,
        "train.batch_size": 4096,
    }
    return derive(endtoend(), "simclr", changes)


def simclr_256() -> Settings:
    """SimCLR, batch 256, 200 epochs.

    SimCLR at a batch that fits on few devices.

    Source: arXiv 2002.05709, appendix A; batch and epochs: arXiv 2003.04297, Table 2.
    Command: mocokit pretrain simclr_256 IMAGES/
    Cost: not published.
    Published: ImageNet linear 61.9 (arXiv 2003.04297, Table 2).
    Measured: not measured.
    """
    return derive(simclr(), "simclr_256", {"train.epochs": 200, "train.batch_size": 256})


def memorybank() -> Settings:
    """InstDisc: NCE with a memory bank.

    Noise-contrastive estimation against a bank that holds one vector of every image. The other
    settings are MoCo v1's, which are InstDisc's.

    Source: arXiv 1805.01978.
    Command: mocokit pretrain memorybank IMAGES/
    Cost: one view an image; for ImageNet the bank takes 626 MiB.
    Published: ImageNet linear 54.0, kNN 42.5 (arXiv 1805.01978).
    Measured: not measured.
    """
    changes = {**BANK, "method.loss": "nce", "method.bank_negatives": 4096}
    return derive(mocov1(), "memorybank", changes)


def memorybank_softmax() -> Settings:
    """MoCo's improved memory bank.

    InfoNCE against 65536 entries of the bank.

    Source: arXiv 1911.05722.
    Command: mocokit pretrain memorybank_softmax IMAGES/
    Cost: as memorybank.
    Published: ImageNet linear 58.0 (arXiv 1911.05722, Fig. 3, K 65536).
    Measured: not measured.
    """
    changes = {**BANK, "method.bank_negatives": 65536}
    return derive(mocov1(), "memorybank_softmax", changes)
