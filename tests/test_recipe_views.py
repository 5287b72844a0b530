"""The papers' augmentations give the pipelines that tests/reference_views.py writes out by hand."""

from dataclasses import replace as with_

import numpy as np
import pytest
from reference_views import simclr, spec_of, v3

from mocokit.recipes.views import (
    INFOMIN_VIEWS,
    MOCOV3_VIEWS,
    MOCOV3_VIT_VIEWS,
    PROBE_VIEWS,
    SIMCLR_CIFAR_VIEWS,
    simclr_views,
)
from mocokit.settings import replace
from mocokit.settings.schema import Settings
from mocokit.views.params import draw_table
from mocokit.weights.encoder import view_spec


def spec(changes):
    return view_spec(replace(Settings(), changes))


def test_simclrs_views():
    assert spec(simclr_views()) == with_(simclr(), resize=256)
    half = spec(simclr_views(0.5))
    assert (half.brightness, half.contrast, half.saturation, half.hue) == (0.4, 0.4, 0.4, 0.1)
    assert spec(SIMCLR_CIFAR_VIEWS) == with_(
        simclr(32),
        order=("crop", "flip", "jitter", "grayscale"),
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        blur_probability=0.0,
    )


def test_mocov3s_pair():
    assert spec(MOCOV3_VIEWS) == v3()
    assert spec(MOCOV3_VIT_VIEWS) == with_(v3(), crop_area=(0.08, 1.0))


def test_infomins_views():
    """PyContrast's aug "D" with a queue, written out."""
    assert spec(INFOMIN_VIEWS) == spec_of(
        order=("crop", "flip", "jitter", "blur", "randaugment", "grayscale"),
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        randaugment=(2, 10.0, 0.5),
    )


def test_the_probes_views_only_crop_and_flip():
    probe = spec(PROBE_VIEWS)
    assert probe == spec_of(order=("crop", "flip"), crop_area=(0.08, 1.0))
    assert (probe.size, probe.resize, probe.interpolation) == (224, 256, "bilinear")
    size = np.full(200, 50)
    table = draw_table(probe, 0, 0, np.arange(200), 0, size, size)
    assert not (table.jitter | table.grayscale | table.solarize | (table.sigma > 0)).any()
    assert 60 < table.flip.sum() < 140


@pytest.mark.parametrize(
    "changes",
    [
        simclr_views(),
        SIMCLR_CIFAR_VIEWS,
        MOCOV3_VIEWS,
        MOCOV3_VIT_VIEWS,
        INFOMIN_VIEWS,
        PROBE_VIEWS,
    ],
)
def test_nothing_of_a_pipeline_is_left_to_the_recipe_before_it(changes):
    """On top of other views they give the same draws: what their order names, they settle."""
    other = {
        "views.crop_area": (0.5, 0.6),
        "views.crop_ratio": (1.0, 1.1),
        "views.interpolation": "bicubic",
        "views.blur_probability": 0.25,
        "views.blur_sigma": (1.0, 1.5),
        "views.flip_probability": 0.1,
        "views.grayscale_probability": 0.6,
        "views.jitter_probability": 0.3,
        "views.brightness": 0.1,
        "views.contrast": 0.2,
        "views.saturation": 0.3,
        "views.hue": 0.4,
    }
    fresh, laid_over = spec(changes), spec({**other, **changes})
    names = {"crop_area", "crop_ratio", "interpolation"}
    if "jitter" in fresh.order:
        names |= {"jitter_probability", "brightness", "contrast", "saturation", "hue"}
        names |= {"grayscale_probability"}
    names |= {"blur_probability", "blur_sigma"} if "blur" in fresh.order else set()
    for name in names | {"flip_probability", "size", "resize"}:
        assert getattr(fresh, name) == getattr(laid_over, name), name
    assert spec_of().order != fresh.order
