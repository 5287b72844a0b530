"""Named, complete settings. A recipe is a function; a variant is written as its difference.

Published values are quoted from the paper named beside them. "Not measured" means exactly that: we
have not run the recipe to its end ourselves.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mocokit import places
from mocokit.config import Settings
from mocokit.errors import UserError
from mocokit.settings import load, replace, stated_in

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
    return _derive(Settings(), "mocov1", changes)


def mocov2() -> Settings:
    """MoCo v2: MoCo v1 with an MLP head, stronger augmentation, cosine (arXiv 2003.04297).

    Command: mocokit pretrain mocov2 IMAGES/
    Cost: about 53 h on eight V100 for 200 epochs of ImageNet (the authors' README).
    Published: ImageNet linear 67.5 (Table 1, row d).
    Measured: not measured.
    """
    return _derive(mocov1(), "mocov2", MLP | AUG_PLUS | COSINE)


def mocov2_800() -> Settings:
    """MoCo v2 for 800 epochs (arXiv 2003.04297).

    Command: mocokit pretrain mocov2_800 IMAGES/
    Cost: four times mocov2.
    Published: ImageNet linear 71.1 (Table 1, row e).
    Measured: not measured.
    """
    return _derive(mocov2(), "mocov2_800", {"train.epochs": 800})


def ablation_a() -> Settings:
    """Table 1, row a: MoCo v1 with the MLP head, at its best temperature 0.2.

    Command: mocokit pretrain ablation_a IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 66.2 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return _derive(mocov1(), "ablation_a", MLP)


def ablation_b() -> Settings:
    """Table 1, row b: MoCo v1 with the stronger augmentation, head and temperature as in v1.

    Command: mocokit pretrain ablation_b IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 63.4 (arXiv 2003.04297, Table 1).
    Measured: not measured.
    """
    return _derive(mocov1(), "ablation_b", AUG_PLUS)


def ablation_c() -> Settings:
    """Table 1, row c: MoCo v1 with MLP head and stronger augmentation, without cosine.

    Command: mocokit pretrain ablation_c IMAGENET/
    Cost: as mocov1.
    Published: ImageNet linear 67.3 (arXiv 2003.04297, Table 1). Rows d, e are mocov2, mocov2_800.
    Measured: not measured.
    """
    return _derive(mocov1(), "ablation_c", MLP | AUG_PLUS)


def mocov2_cifar10() -> Settings:
    """The authors' CIFAR-10 recipe for one GPU: ResNet-18, asymmetric loss, 200 epochs.

    Command: mocokit pretrain mocov2_cifar10 CIFAR10.npz
    Cost: 20.5 s an epoch on one V100, in float32 (the authors' notebook log).
    Published: kNN 82.6 on the head's output, k 200, temperature 0.1 (the authors' notebook).
    Measured: not measured to the end; docs/log.md has the first epochs beside the authors' log.
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
        "views.size": 32,
        "views.resize": 32,
        "views.order": ("crop", "flip", "jitter", "grayscale"),
        "views.crop_area": (0.08, 1.0),
        "views.blur_probability": 0.0,
        "views.mean": (0.4914, 0.4822, 0.4465),
        "views.std": (0.2023, 0.1994, 0.2010),
        "optim.lr": 0.06,
        "optim.lr_batch": 512,
        "optim.weight_decay": 5e-4,
        "optim.first_epoch": 1,  # the notebook counts from 1, so the last epoch's rate is 0
        "train.batch_size": 512,
    }
    return _derive(mocov2(), "mocov2_cifar10", changes)


def mocov2_cifar10_symmetric() -> Settings:
    """The authors' CIFAR-10 recipe with the symmetric loss: about twice the work of each epoch.

    Command: mocokit pretrain mocov2_cifar10_symmetric CIFAR10.npz
    Cost: about twice mocov2_cifar10 (each view is encoded as query and as key).
    Published: kNN 85.3 on the head's output, k 200, temperature 0.1 (the authors' notebook).
    Measured: not measured.
    """
    return _derive(mocov2_cifar10(), "mocov2_cifar10_symmetric", {"method.symmetric": True})


def demo() -> Settings:
    """A procedural demonstration, not a benchmark: 12 textures, two CPU cores, two minutes.

    Command: mocokit pretrain
    Cost: about two minutes on one CPU core (Zen 5).
    Published: nothing; the images are drawn by the program.
    Measured: kNN 94.5, 95.3, 95.3 (seeds 0, 1, 2); raw pixels 27.1, random weights 17.9 (mean).
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
        "views.resize": 32,
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
    }
    return _derive(mocov2(), "demo", changes)


RECIPES: dict[str, Callable[[], Settings]] = {
    function.__name__: function
    for function in (
        demo,
        mocov1,
        mocov2,
        mocov2_800,
        ablation_a,
        ablation_b,
        ablation_c,
        mocov2_cifar10,
        mocov2_cifar10_symmetric,
    )
}


def by_name(name: str) -> Settings:
    """The recipe of that name; raises UserError with the nearest known one."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(RECIPES)}"
        raise UserError(f"there is neither a recipe nor a file or folder named {name!r}; {hint}")
    return RECIPES[name]()


def asked(
    recipe: str | None, data: str | None, changes: Mapping[str, Any], needs_data: bool = True
) -> tuple[Settings, frozenset[str]]:
    """The settings of a command, and the dotted paths that its user stated.

    `recipe` is a recipe's name or a .yaml file; else a path, which then is the data of mocov2.
    Nothing at all is the embedded demo, the only recipe with data of its own. Raises UserError for
    what does not exist.
    """
    if recipe is not None and recipe not in RECIPES and not recipe.endswith((".yaml", ".yml")):
        if data is None and places.exist(recipe):
            recipe, data = "mocov2", recipe
        elif data is None and ("/" in recipe or "." in recipe):
            raise UserError(f"there is no file or folder {recipe}; give an existing path of images")
    stated = set(changes)
    if recipe is not None and recipe.endswith((".yaml", ".yml")):
        base = load(Path(recipe))
        stated |= stated_in(Path(recipe))
        # What a user states beside a file is what runs: the file's quoted batch is not theirs.
        for value in ("optim.lr", "method.momentum"):
            if value in changes and f"{value}_batch" not in changes:
                stated.discard(f"{value}_batch")
    else:
        base = by_name(recipe or ("demo" if data is None else "mocov2"))
    if data is not None:
        changes = {**changes, "data.path": data}
    settings = replace(base, changes)
    path = settings.data.path
    if path is not None and os.path.isfile(os.path.join(path, "config.yaml")):
        raise UserError(
            f"{path} is a run folder, not images; repeat its run with {path}/config.yaml, or go on "
            f"with it by --out {path}"
        )
    if path is None and needs_data and settings.recipe != "demo":
        raise UserError(
            f"{settings.recipe} needs images: mocokit pretrain {settings.recipe} FOLDER; "
            "`mocokit pretrain` alone is the demo"
        )
    if path is not None and not places.exist(path):
        raise UserError(f"there is no file or folder {path}; give an existing path of images")
    if path is not None:  # a run must find them again from anywhere
        settings = replace(settings, {"data.path": places.absolute(path)})
    return settings, frozenset(stated)


def merge(flags: Mapping[str, Any], assignments: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of settings by flags, where given, and by --set; raises UserError on a double."""
    given = {path: value for path, value in flags.items() if value is not None}
    for path in given.keys() & assignments.keys():
        raise UserError(f"{path} is stated twice, by its flag and by --set; keep one")
    if "recipe" in assignments:
        raise UserError("recipe is a name, not a setting; give another recipe as first argument")
    return {**given, **assignments}


def _derive(base: Settings, name: str, changes: Mapping[str, Any]) -> Settings:
    return replace(base, {"recipe": name, **changes}, origin=f"recipe {name}: setting")
