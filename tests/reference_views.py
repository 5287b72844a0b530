"""The oracle of the views: PIL, torchvision and scipy, one image at a time."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torchvision.transforms.functional as TF
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import correlate1d
from torch import Tensor

from mocokit.settings.schema import Views
from mocokit.views.params import Table, ViewSpec


def spec_of(**settings: object) -> ViewSpec:
    size = settings.get("size", 224)
    resize = settings.pop("resize", max(256, size))
    return ViewSpec(**Views(**settings).model_dump(), resize=resize)


def v1(size: int = 224) -> ViewSpec:
    return spec_of(
        size=size, order=("crop", "grayscale", "jitter", "flip"), jitter_probability=1.0, hue=0.4
    )


def v2(size: int = 224) -> ViewSpec:
    return spec_of(size=size)


def cifar(size: int = 32) -> ViewSpec:
    return spec_of(
        size=size,
        resize=size,
        order=("crop", "flip", "jitter", "grayscale"),
        crop_area=(0.08, 1.0),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    )


def v3(size: int = 224) -> ViewSpec:
    """MoCo v3's pair: blur of all first and few second views, solarisation of second ones."""
    return spec_of(
        size=size,
        order=("crop", "jitter", "grayscale", "blur", "solarize", "flip"),
        saturation=0.2,
        blur_probability=(1.0, 0.1),
        solarize_probability=(0.0, 0.2),
    )


def simclr(size: int = 224) -> ViewSpec:
    """SimCLR's views at full strength."""
    return spec_of(
        size=size,
        resize=size,
        order=("crop", "flip", "jitter", "grayscale", "blur"),
        crop_area=(0.08, 1.0),
        interpolation="bicubic",
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )


@cache
def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3): a smooth coloured field with noise, so that all frequencies occur."""
    draw = np.random.default_rng(seed)
    down, across = np.mgrid[0:height, 0:width]
    phase = draw.uniform(0, 6.3, 3)
    waves = np.sin(down[..., None] / draw.uniform(3, 40) + phase) + np.cos(
        across[..., None] / draw.uniform(3, 40) + 2 * phase
    )
    levels = 128 + 50 * waves + draw.normal(0, 25, (height, width, 3))
    return levels.clip(0, 255).astype(np.uint8)


def flat(canvases: Sequence[NDArray[np.uint8]]) -> tuple[Tensor, NDArray, NDArray]:
    heights, widths = np.array([canvas.shape[:2] for canvas in canvases], np.int64).T
    pixels = np.concatenate([canvas.reshape(-1) for canvas in canvases])
    return torch.from_numpy(pixels), heights, widths


def resized(part: Image.Image, size: tuple[int, int], kind: str) -> Image.Image:
    """PIL's resize, first across, then down; since version 13 PIL sometimes begins with down."""
    filter_ = Image.Resampling[kind.upper()]
    return part.resize((size[0], part.height), filter_).resize(size, filter_)


def crop_levels(
    canvas: NDArray[np.uint8], box: Sequence[int], size: int, kind: str = "bilinear"
) -> Tensor:
    """(3, size, size) in [0, 1]: PIL's own crop and resize in whole levels."""
    top, left, height, width = (int(side) for side in box)
    part = Image.fromarray(canvas).crop((left, top, left + width, top + height))
    return TF.to_tensor(resized(part, (size, size), kind))


def crop_exact(
    canvas: NDArray[np.uint8], box: Sequence[int], size: int, kind: str = "bilinear"
) -> Tensor:
    """As `crop_levels`, unrounded: PIL's floating-point mode, channel by channel.

    Only there PIL does not cut overshoots off, so that is done here, after each of the two.
    """
    top, left, height, width = (int(side) for side in box)
    part = canvas[top : top + height, left : left + width].astype(np.float32)
    planes = []
    for channel in range(3):
        plane = part[..., channel]
        for shape in ((size, height), (size, size)):
            image = Image.fromarray(plane).resize(shape, Image.Resampling[kind.upper()])
            plane = np.asarray(image).clip(0, 255)
        planes.append(plane)
    return torch.from_numpy(np.stack(planes)) / 255


def jitter(image: Tensor, factors: Sequence[float], order: Sequence[int]) -> Tensor:
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for step in order:
        image = steps[step](image, float(factors[step]))
    return image


def gaussian(image: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """(3, H, W) in float64; to eight sigma, edges repeated."""
    reach = int(np.ceil(8 * sigma))
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    rows = correlate1d(image, weights, axis=1, mode="nearest")
    return correlate1d(rows, weights, axis=2, mode="nearest")


def replay(
    spec: ViewSpec, table: Table, canvases: Sequence[NDArray[np.uint8]], exact: bool
) -> Tensor:
    """(N, 3, size, size) in [0, 1]: every row of the table, step by step in the spec's order."""
    crop = crop_exact if exact else crop_levels
    views = []
    for row, canvas in enumerate(canvases):
        view = crop(canvas, table.boxes[row], spec.size, spec.interpolation)
        for operation in spec.order:
            if operation == "flip" and table.flip[row]:
                view = TF.hflip(view)
            elif operation == "jitter" and table.jitter[row]:
                columns = (table.brightness, table.contrast, table.saturation, table.hue)
                view = jitter(view, [column[row] for column in columns], table.order[row])
            elif operation == "grayscale" and table.grayscale[row]:
                view = TF.rgb_to_grayscale(view, num_output_channels=3)
            elif operation == "blur" and table.sigma[row]:
                view = torch.from_numpy(gaussian(view.double().numpy(), table.sigma[row])).float()
            elif operation == "solarize" and table.solarize[row]:
                view = TF.solarize(view, 0.5)
        views.append(view)
    return torch.stack(views)


def levels(spec: ViewSpec, views: Tensor) -> Tensor:
    """Normalised views back to levels in 0..255."""
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (spec.mean, spec.std))
    return (views * std + mean) * 255
