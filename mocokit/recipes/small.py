"""Recipes for images of 32 pixels: CIFAR-10, and the embedded demo."""

from mocokit.recipes.derive import derive
from mocokit.recipes.imagenet import mocov2
from mocokit.recipes.mechanisms import BANK, END_TO_END, memorybank, simclr
from mocokit.recipes.views import SIMCLR_CIFAR_VIEWS
from mocokit.settings.schema import Settings

SMALL_VIEWS = {
    "views.size": 32,
    "monitor.centre": 1.0,
    "views.mean": (0.4914, 0.4822, 0.4465),
    "views.std": (0.2023, 0.1994, 0.2010),
}


def mocov2_cifar10() -> Settings:
    """MoCo v2 on CIFAR-10, ResNet-18.

    The authors' recipe for one GPU: linear head, asymmetric loss, no blur, 200 epochs.

    Source: the authors' notebook moco_cifar10_demo.ipynb.
    Command: mocokit pretrain mocov2_cifar10 CIFAR10.npz
    Cost: 20.5 s an epoch on one V100 in float32 (the authors' notebook log); 2.1 s an epoch on one
    H200 in bfloat16.
    Published: kNN 82.6 on the head's output, k 200, temperature 0.1 (the authors' notebook).
    Measured: kNN 82.6 on the head's output (82.59; seed 0, n = 1, 200 epochs, final epoch; one
    H200, bfloat16, 7 min 13 s in all; benchmarks/2026-11-28-gpu.md).
    """
    changes = {
        "net.backbone": "resnet18",
        "net.stem": "small",
        "net.head": "linear",
        "method.temperature": 0.1,
        "method.queue_size": 4096,
        "method.momentum": 0.99,
        "method.momentum_batch": 512,
        "method.group_size": 64,  # the notebook's 512 images in 8 splits
        **SMALL_VIEWS,
        "views.order": ("crop", "flip", "jitter", "grayscale"),
        "views.crop_area": (0.08, 1.0),
        "views.blur_probability": 0.0,
        "optim.lr": 0.06,
        "optim.lr_batch": 512,
        "optim.weight_decay": 5e-4,
        "monitor.k": 200,
        "optim.first_epoch": 1,  # the notebook counts from 1, so the last epoch's rate is 0
        "train.batch_size": 512,
    }
    return derive(mocov2(), "mocov2_cifar10", changes)


def mocov2_cifar10_symmetric() -> Settings:
    """MoCo v2 on CIFAR-10, symmetric.

    mocov2_cifar10 with the symmetric loss: each view is once the query and once the key.

    Source: the authors' notebook moco_cifar10_demo.ipynb.
    Command: mocokit pretrain mocov2_cifar10_symmetric CIFAR10.npz
    Cost: about twice mocov2_cifar10.
    Published: kNN 85.3 on the head's output, k 200, temperature 0.1 (the authors' notebook).
    Measured: not measured.
    """
    return derive(mocov2_cifar10(), "mocov2_cifar10_symmetric", {"method.symmetric": True})


def endtoend_cifar10() -> Settings:
    """End-to-end on CIFAR-10.

    mocov2_cifar10 with the end-to-end mechanism instead of queue and key encoder.

    Source: our own combination of mocov2_cifar10 and endtoend.
    Command: mocokit pretrain endtoend_cifar10 CIFAR10.npz
    Cost: gradients flow through both views.
    Published: no accuracy at these settings.
    Measured: not to the end; docs/log.md has a short run of a small network beside the other
    mechanisms.
    """
    return derive(mocov2_cifar10(), "endtoend_cifar10", END_TO_END)


def memorybank_softmax_cifar10() -> Settings:
    """Memory bank on CIFAR-10, InfoNCE.

    mocov2_cifar10 with a memory bank, of which 4096 entries are negatives, as many as the queue's.

    Source: our own combination of mocov2_cifar10 and memorybank_softmax.
    Command: mocokit pretrain memorybank_softmax_cifar10 CIFAR10.npz
    Cost: one view an image.
    Published: no accuracy at these settings.
    Measured: not to the end; docs/log.md has a short run of a small network beside the other
    mechanisms.
    """
    changes = {**BANK, "method.bank_negatives": 4096}
    return derive(mocov2_cifar10(), "memorybank_softmax_cifar10", changes)


def memorybank_cifar10() -> Settings:
    """InstDisc on CIFAR-10, ResNet-18.

    Softmax over the whole bank. As in the authors' code, there is no flip, and the learning rate
    drops after epochs 80, 120 and 160 (another version of their code has 120 and 160). The authors'
    batch norm covers all images of a GPU. Here it has groups of 32 images.

    Source: arXiv 1805.01978 and the authors' repository.
    Command: mocokit pretrain memorybank_cifar10 CIFAR10.npz
    Cost: one view an image.
    Published: kNN 80.8, linear 75.4 (the authors' repository; the best epoch on the test set).
    Measured: not measured.
    """
    changes = {
        "net.backbone": "resnet18",
        "net.stem": "small",
        "method.loss": "info_nce",
        "method.bank_negatives": None,
        "monitor.k": 200,
        "method.temperature": 0.1,
        **SMALL_VIEWS,
        "views.order": ("crop", "grayscale", "jitter"),
        "optim.lr_batch": 128,
        "optim.weight_decay": 5e-4,
        "optim.drops": (0.4, 0.6, 0.8),  # after epochs 80, 120, 160 of 200
        "train.batch_size": 128,
    }
    return derive(memorybank(), "memorybank_cifar10", changes)


def simclr_cifar10() -> Settings:
    """SimCLR on CIFAR-10, ResNet-18.

    Half the colour strength and no blur, for 1000 epochs.

    Source: the authors' README; views: arXiv 2002.05709, appendix B.9.
    Command: mocokit pretrain simclr_cifar10 CIFAR10.npz
    Cost: 1000 epochs.
    Published: linear about 91 (the authors' README).
    Measured: not measured.
    """
    changes = {
        **SIMCLR_CIFAR_VIEWS,
        "net.backbone": "resnet18",
        "net.stem": "small",
        "method.temperature": 0.5,
        "optim.lr": 1.0,  # at batch 256, as the authors' linear scaling has it
        "optim.weight_decay": 1e-4,
        "train.batch_size": 512,
    }
    return derive(simclr(), "simclr_cifar10", changes)


def demo() -> Settings:
    """Demo: 12 textures, two minutes.

    A procedural demonstration, not a benchmark: the program draws the images.

    Source: our own.
    Command: mocokit pretrain
    Cost: about two minutes on one CPU core (Zen 5).
    Published: no accuracy; the images are drawn by the program.
    Measured: kNN 94.5, 95.3, 95.3 (seeds 0, 1, 2); raw pixels 27.1, random weights 18.2 (mean).
    """
    changes = {
        "net.backbone": "resnet_tiny",
        "net.stem": "small",
        "net.hidden": 64,
        "net.calibrate_head": True,
        "method.queue_size": 256,
        "method.momentum": 0.99,
        "method.momentum_batch": 64,
        "views.size": 32,
        "monitor.centre": 1.0,
        "views.crop_area": (0.4, 1.0),
        "views.jitter_probability": 1.0,
        "views.brightness": 0.6,
        "views.contrast": 0.6,
        "views.saturation": 0.6,
        "views.hue": 0.5,
        "views.grayscale_probability": 0.5,
        "views.order": ("crop", "jitter", "grayscale", "flip"),
        "views.blur_probability": 0.0,
        "views.mean": (0.5, 0.5, 0.5),
        "views.std": (0.25, 0.25, 0.25),
        "optim.name": "adamw",
        "optim.lr": 2e-3,
        "optim.lr_batch": 64,
        "optim.scale": "none",
        "optim.per": "step",
        "optim.warmup_epochs": 2.0,
        "train.epochs": 40,
        "train.batch_size": 64,
        "engine.threads": 1,  # so small a net gains little from a second, and loses if it is taken
        "log.every_steps": 25,
        "monitor.every_epochs": 0,
        "monitor.k": 200,
    }
    return derive(mocov2(), "demo", changes)
