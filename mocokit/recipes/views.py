"""Augmentations of papers, as changes of settings that recipes add to their own."""

from typing import Any

Changes = dict[str, Any]

_RATIO = (3 / 4, 4 / 3)


def simclr_views(strength: float = 1.0) -> Changes:
    """SimCLR's, for views of 224 pixels (arXiv 2002.05709, appendix A; data_util.py for the order).

    At test time the authors crop the centre of 87.5 %, bicubic: 224 of 256 pixels.
    """
    return {
        "views.size": 224,
        "monitor.centre": 0.875,
        "views.order": ("crop", "flip", "jitter", "grayscale", "blur"),
        "views.crop_area": (0.08, 1.0),
        "views.crop_ratio": _RATIO,
        "views.interpolation": "bicubic",
        "views.flip_probability": 0.5,
        "views.jitter_probability": 0.8,
        "views.brightness": 0.8 * strength,
        "views.contrast": 0.8 * strength,
        "views.saturation": 0.8 * strength,
        "views.hue": 0.2 * strength,
        "views.grayscale_probability": 0.2,
        "views.blur_probability": 0.5,
        "views.blur_sigma": (0.1, 2.0),
        "views.mean": (0.0, 0.0, 0.0),  # levels stay in [0, 1]
        "views.std": (1.0, 1.0, 1.0),
    }


# SimCLR on CIFAR-10: half the strength, no blur (arXiv 2002.05709, appendix B.9).
SIMCLR_CIFAR_VIEWS: Changes = {
    **simclr_views(0.5),
    "views.size": 32,
    "monitor.centre": 1.0,
    "views.order": ("crop", "flip", "jitter", "grayscale"),
    "views.blur_probability": 0.0,
}

# MoCo v3's pair for ResNet-50 (arXiv 2104.02057, after BYOL's, arXiv 2006.07733; the numbers are
# main_moco.py's, with CONFIG.md's --crop-min=.2): the second view alone is solarised.
MOCOV3_VIEWS: Changes = {
    "views.size": 224,
    "monitor.centre": 0.875,
    "views.order": ("crop", "jitter", "grayscale", "blur", "solarize", "flip"),
    "views.crop_area": (0.2, 1.0),
    "views.crop_ratio": _RATIO,
    "views.interpolation": "bilinear",
    "views.jitter_probability": 0.8,
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.saturation": 0.2,
    "views.hue": 0.1,
    "views.grayscale_probability": 0.2,
    "views.blur_probability": (1.0, 0.1),
    "views.blur_sigma": (0.1, 2.0),
    "views.solarize_probability": (0.0, 0.2),
    "views.flip_probability": 0.5,
}

# The same for vision transformers, with main_moco.py's default --crop-min=.08.
MOCOV3_VIT_VIEWS: Changes = {**MOCOV3_VIEWS, "views.crop_area": (0.08, 1.0)}

# InfoMin's "InfoMin Aug." (arXiv 2005.10243), with the order and the numbers of the authors' code
# (PyContrast, datasets/util.py, aug "D", with a queue). Their results also need a jigsaw branch.
INFOMIN_VIEWS: Changes = {
    **simclr_views(),
    "views.order": ("crop", "flip", "jitter", "blur", "randaugment", "grayscale"),
    "views.crop_area": (0.2, 1.0),
    "views.interpolation": "bilinear",
    "views.randaugment": (2, 10.0, 0.5),
    "views.mean": (0.485, 0.456, 0.406),
    "views.std": (0.229, 0.224, 0.225),
}

# A linear probe's training views (the authors' main_lincls.py: RandomResizedCrop(224) and flip);
# its evaluation views are those of every run: short side 256, centre 224.
PROBE_VIEWS: Changes = {
    "views.size": 224,
    "monitor.centre": 0.875,
    "views.order": ("crop", "flip"),
    "views.crop_area": (0.08, 1.0),
    "views.crop_ratio": _RATIO,
    "views.interpolation": "bilinear",
    "views.flip_probability": 0.5,
}
