"""Every value of every recipe, written out: a line lost from a recipe, or a default, fails here.

The tables were written from the papers and the authors' code; a comment names the source. What has
no source is our own choice, and stands here so that it is not changed unseen.
"""

import pytest

from mocokit import recipes
from mocokit.settings import flatten, replace
from mocokit.settings.methods import BUILT_IN
from mocokit.settings.schema import Settings
from mocokit.settings.sizes import fit, resolve

# Of every run, and of no paper.
OURS = {
    "seed": 0,
    "data.path": None, "data.root": None, "data.labels": "auto", "data.workers": "auto",
    "data.bad_share": 0.01,
    "net.calibrate_head": False,
    "method.batch_norm": "groups", "method.groups": "auto", "method.chunk": None,
    "train.micro_batch": None,
    "engine.device": "auto", "engine.precision": "auto", "engine.memory_format": "auto",
    "engine.compile": "auto", "engine.cuda_graphs": "auto", "engine.deterministic": False,
    "engine.threads": "auto", "engine.compare_steps": 500,
    "save.minutes": 15.0, "save.every_epochs": 1, "save.every_steps": None, "save.keep": 2,
    "save.milestone_epochs": None,
    "log.every_steps": 10,
    "views.canvas": None, "train.parent": None, "train.parent_weights": None,
    "monitor.every_epochs": 10, "monitor.images": 4096, "monitor.bank": 100_000,
    "monitor.k": None, "monitor.temperature": 0.1,  # the notebook's
    "monitor.resize": None, "monitor.centre": 0.875,
}  # fmt: skip
# In no recipe's order, or of no recipe's schedule, optimiser or net.
UNUSED = {
    "views.solarize_probability": 0.0, "views.randaugment": (2, 10.0, 0.5),
    "net.predictor": False, "net.hidden": None, "net.zero_init_last": False,
    "optim.trust": 0.001, "optim.drops": (0.6, 0.8), "optim.drop_factor": 0.1,
}  # fmt: skip
# The authors' main_moco.py with --mlp --moco-t 0.2 --aug-plus --cos; arXiv 2003.04297.
MOCO_V2 = OURS | UNUSED | {
    "data.last": "drop",
    "views.size": 224, "views.order": ("crop", "jitter", "grayscale", "blur", "flip"),
    "views.crop_area": (0.2, 1.0), "views.crop_ratio": (3 / 4, 4 / 3),
    "views.interpolation": "bilinear", "views.jitter_probability": 0.8,
    "views.brightness": 0.4, "views.contrast": 0.4, "views.saturation": 0.4, "views.hue": 0.1,
    "views.grayscale_probability": 0.2, "views.blur_probability": 0.5,
    "views.blur_sigma": (0.1, 2.0), "views.flip_probability": 0.5,
    "views.mean": (0.485, 0.456, 0.406), "views.std": (0.229, 0.224, 0.225),
    "net.backbone": "resnet50", "net.stem": "imagenet", "net.head": "mlp", "net.dim": 128,
    "method.name": "moco", "method.group_size": 32, "method.loss": "info_nce",
    "method.temperature": 0.2, "method.queue_size": 65536, "method.momentum": 0.999,
    "method.momentum_batch": 256, "method.momentum_schedule": "constant",
    "method.symmetric": False, "method.enqueue": "both", "method.shuffle": True,
    "optim.name": "sgd", "optim.lr": 0.03, "optim.lr_batch": 256, "optim.scale": "linear",
    "optim.momentum": 0.9, "optim.weight_decay": 1e-4, "optim.schedule": "cosine",
    "optim.per": "epoch", "optim.first_epoch": 0, "optim.warmup_epochs": 0.0,
    "train.epochs": 200, "train.batch_size": 256,
}  # fmt: skip
# The same script's defaults; arXiv 1911.05722. Grayscale comes before a jitter of every view.
V1_VIEWS = {
    "views.order": ("crop", "grayscale", "jitter", "flip"), "views.jitter_probability": 1.0,
    "views.hue": 0.4, "views.blur_probability": 0.0,
}  # fmt: skip
V1_HEAD = {"net.head": "linear", "method.temperature": 0.07}
V1_STEPS = {"optim.schedule": "steps"}  # after epochs 120 and 160
MOCO_V1 = MOCO_V2 | V1_VIEWS | V1_HEAD | V1_STEPS
# megvii's revisitAIRL: BYOL's heads; the rate is mocov2's, since the source states none.
MOCO_V2_PLUS = MOCO_V2 | {
    "net.head": "mlp_bn", "net.predictor": True, "net.hidden": 4096, "net.dim": 256,
    "method.batch_norm": "whole", "method.momentum": 0.99, "method.momentum_schedule": "cosine",
    "method.symmetric": True, "method.enqueue": "one", "optim.warmup_epochs": 10.0,
}  # fmt: skip
OF_A_QUEUE = {
    "method.queue_size", "method.momentum", "method.momentum_batch", "method.momentum_schedule",
    "method.enqueue",
}  # fmt: skip
OF_BOTH_VIEWS = {"method.symmetric", "method.shuffle"}


def end_to_end(values, symmetric=True):
    """Without queue and key encoder: arXiv 1911.05722, figure 2a; 2003.04297, Table 3."""
    kept = {path: value for path, value in values.items() if path not in OF_A_QUEUE}
    return kept | {"method.name": "simclr", "method.symmetric": symmetric}


def bank(values, negatives):
    """arXiv 1805.01978: a new entry is half the old one."""
    without = OF_A_QUEUE | OF_BOTH_VIEWS
    kept = {path: value for path, value in values.items() if path not in without}
    return kept | {
        "method.name": "memorybank",
        "method.bank_negatives": negatives,
        "method.bank_momentum": 0.5,
    }


# arXiv 2002.05709, appendix A; the order is data_util.py's. Views are not normalised.
SIMCLR = end_to_end(MOCO_V2) | {
    "views.order": ("crop", "flip", "jitter", "grayscale", "blur"),
    "views.crop_area": (0.08, 1.0), "views.interpolation": "bicubic",
    "views.brightness": 0.8, "views.contrast": 0.8, "views.saturation": 0.8, "views.hue": 0.2,
    "views.mean": (0.0, 0.0, 0.0), "views.std": (1.0, 1.0, 1.0),
    "net.zero_init_last": True,
    "method.batch_norm": "whole", "method.temperature": 0.1,
    "optim.name": "lars", "optim.lr": 0.3, "optim.weight_decay": 1e-6, "optim.per": "step",
    "optim.warmup_epochs": 10.0,
    "train.epochs": 1000, "train.batch_size": 4096,
}  # fmt: skip
CIFAR_SIZE = {"views.size": 32, "monitor.centre": 1.0}
CIFAR_LEVELS = {
    "views.mean": (0.4914, 0.4822, 0.4465), "views.std": (0.2023, 0.1994, 0.2010),
}  # fmt: skip
CIFAR_NET = {"net.backbone": "resnet18", "net.stem": "small"}
# The authors' notebook moco_cifar10_demo.ipynb: 512 images in 8 splits, epochs counted from 1.
NOTEBOOK = MOCO_V2 | CIFAR_SIZE | CIFAR_LEVELS | CIFAR_NET | {
    "views.order": ("crop", "flip", "jitter", "grayscale"), "views.crop_area": (0.08, 1.0),
    "views.blur_probability": 0.0,
    "net.head": "linear",
    "method.group_size": 64, "method.temperature": 0.1, "method.queue_size": 4096,
    "method.momentum": 0.99, "method.momentum_batch": 512,
    "optim.lr": 0.06, "optim.lr_batch": 512, "optim.weight_decay": 5e-4, "optim.first_epoch": 1,
    "train.batch_size": 512, "monitor.k": 200,
}  # fmt: skip

VALUES = {
    "mocov1": MOCO_V1,
    "mocov2": MOCO_V2,
    "mocov2_800": MOCO_V2 | {"train.epochs": 800},
    "ablation_a": MOCO_V2 | V1_VIEWS | V1_STEPS,  # arXiv 2003.04297, Table 1: MLP at 0.2
    "ablation_b": MOCO_V2 | V1_HEAD | V1_STEPS,  # aug+
    "ablation_c": MOCO_V2 | V1_STEPS,  # both
    "mocov2_symmetric": MOCO_V2 | {"method.symmetric": True},  # arXiv 2011.10566, Table 4
    "mocov2plus": MOCO_V2_PLUS,
    "endtoend": end_to_end(MOCO_V2),
    "endtoend_4096": end_to_end(MOCO_V2) | {"train.batch_size": 4096, "train.micro_batch": 256},
    "endtoend_v1": end_to_end(MOCO_V1, symmetric=False),
    "simclr": SIMCLR,
    "simclr_256": SIMCLR | {"train.epochs": 200, "train.batch_size": 256},
    # arXiv 1805.01978 and lemniscate.pytorch: NCE with 4096, drops after 120 and 160.
    "memorybank": bank(MOCO_V1, 4096) | {"method.loss": "nce"},
    "memorybank_softmax": bank(MOCO_V1, 65536),  # arXiv 1911.05722, figure 3
    "mocov2_cifar10": NOTEBOOK,
    "mocov2_cifar10_symmetric": NOTEBOOK | {"method.symmetric": True},
    "endtoend_cifar10": end_to_end(NOTEBOOK),
    "memorybank_softmax_cifar10": bank(NOTEBOOK, 4096),
    # lemniscate.pytorch, --nce-k 0: drops after 80, 120 and 160 of 200 epochs, no flip.
    "memorybank_cifar10": bank(MOCO_V1, None) | CIFAR_SIZE | CIFAR_LEVELS | CIFAR_NET | {
        "views.order": ("crop", "grayscale", "jitter"),
        "method.temperature": 0.1,
        "optim.lr_batch": 128, "optim.weight_decay": 5e-4, "optim.drops": (0.4, 0.6, 0.8),
        "train.batch_size": 128, "monitor.k": 200,
    },
    # arXiv 2002.05709, appendix B.9: half the strength, no blur; the README's command.
    "simclr_cifar10": SIMCLR | CIFAR_SIZE | CIFAR_NET | {
        "views.order": ("crop", "flip", "jitter", "grayscale"), "views.blur_probability": 0.0,
        "views.brightness": 0.4, "views.contrast": 0.4, "views.saturation": 0.4,
        "views.hue": 0.1,
        "method.temperature": 0.5,
        "optim.lr": 1.0, "optim.weight_decay": 1e-4,
        "train.batch_size": 512,
    },
    "demo": MOCO_V2 | CIFAR_SIZE | {  # our own
        "views.order": ("crop", "jitter", "grayscale", "flip"), "views.crop_area": (0.4, 1.0),
        "views.jitter_probability": 1.0, "views.brightness": 0.6, "views.contrast": 0.6,
        "views.saturation": 0.6, "views.hue": 0.5, "views.grayscale_probability": 0.5,
        "views.blur_probability": 0.0, "views.mean": (0.5, 0.5, 0.5),
        "views.std": (0.25, 0.25, 0.25),
        "net.backbone": "resnet_tiny", "net.stem": "small", "net.hidden": 64,
        "net.calibrate_head": True,
        "method.queue_size": 256, "method.momentum": 0.99, "method.momentum_batch": 64,
        "optim.name": "adamw", "optim.lr": 2e-3, "optim.lr_batch": 64, "optim.scale": "none",
        "optim.per": "step", "optim.warmup_epochs": 2.0,
        "train.epochs": 40, "train.batch_size": 64,
        "engine.threads": 1, "log.every_steps": 25, "monitor.every_epochs": 0, "monitor.k": 200,
    },
}  # fmt: skip


# What a method has that is stated nowhere; a config.yaml of a person's own may leave out the rest.
DEFAULTS = {
    "moco": MOCO_V2,
    "simclr": end_to_end(MOCO_V2, symmetric=False),
    "memorybank": bank(MOCO_V2, None),
}


@pytest.mark.parametrize("method", BUILT_IN)
def test_every_default_is_mocov2s(method):
    settings = replace(Settings(), {"method.name": method})
    assert flatten(settings) == DEFAULTS[method] | {"recipe": "mocov2"}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_value_of_a_recipe(name):
    assert flatten(recipes.by_name(name)) == VALUES[name] | {"recipe": name}


IMAGENET, CIFAR, DEMO = 1_281_167, 50_000, 6_000
# Of the published data: steps an epoch, steps, groups, the peak rate, the key momentum in effect.
EFFECT = {
    "mocov1": (IMAGENET, 5004, 1_000_800, 8, 0.03, 0.999),
    "mocov2": (IMAGENET, 5004, 1_000_800, 8, 0.03, 0.999),
    "mocov2_800": (IMAGENET, 5004, 4_003_200, 8, 0.03, 0.999),
    "ablation_a": (IMAGENET, 5004, 1_000_800, 8, 0.03, 0.999),
    "ablation_b": (IMAGENET, 5004, 1_000_800, 8, 0.03, 0.999),
    "ablation_c": (IMAGENET, 5004, 1_000_800, 8, 0.03, 0.999),
    "mocov2_symmetric": (IMAGENET, 5004, 1_000_800, 8, 0.03, 0.999),
    "mocov2plus": (IMAGENET, 5004, 1_000_800, 1, 0.03, 0.99),
    "endtoend": (IMAGENET, 5004, 1_000_800, 8, 0.03, None),
    "endtoend_4096": (IMAGENET, 312, 62_400, 128, 0.48, None),
    "endtoend_v1": (IMAGENET, 5004, 1_000_800, 8, 0.03, None),
    "simclr": (IMAGENET, 312, 312_000, 1, 4.8, None),  # arXiv 2002.05709: 0.3 x 4096 / 256
    "simclr_256": (IMAGENET, 5004, 1_000_800, 1, 0.3, None),
    "memorybank": (IMAGENET, 5004, 1_000_800, 8, 0.03, None),
    "memorybank_softmax": (IMAGENET, 5004, 1_000_800, 8, 0.03, None),
    "mocov2_cifar10": (CIFAR, 97, 19_400, 8, 0.06, 0.99),  # the notebook's, not of 256 images
    "mocov2_cifar10_symmetric": (CIFAR, 97, 19_400, 8, 0.06, 0.99),
    "endtoend_cifar10": (CIFAR, 97, 19_400, 8, 0.06, None),
    "memorybank_cifar10": (CIFAR, 390, 78_000, 4, 0.03, None),
    "memorybank_softmax_cifar10": (CIFAR, 97, 19_400, 8, 0.06, None),
    "simclr_cifar10": (CIFAR, 97, 97_000, 1, 2.0, None),  # the README's 1.0 x 512 / 256
    "demo": (DEMO, 93, 3_720, 2, 0.002, 0.99),
}


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_what_a_recipe_comes_to_on_its_data(name):
    images, per_epoch, steps, groups, lr, momentum = EFFECT[name]
    recipe = recipes.by_name(name)
    settings, _ = fit(recipe, images)
    assert settings == recipe, "its own data fit it"
    effect = resolve(settings, images)
    assert (effect.steps_per_epoch, effect.total_steps, effect.groups) == (per_epoch, steps, groups)
    assert effect.lr == pytest.approx(lr, rel=1e-12)
    assert effect.key_momentum == (momentum and pytest.approx(momentum, rel=1e-12))
