"""Crop, antialiased resize, flip and Gaussian blur as one primitive: rows @ image @ cols^T.

Resizing is PIL's: a triangle as wide as one output pixel (one input pixel when enlarging), or the
cubic of a = -1/2, twice as wide; its weights renormalised inside the box, so that nothing beyond
the crop is ever seen. The cubic's overshoots are cut off after each of the two products, so there
the columns come first, as in PIL before version 13 and in torch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mocokit.transfer import Numbers, to_device, to_host
from mocokit.views.params import BLUR_TAILS, Interpolation

# On a CPU a large dense product loses to adding shifted copies: at 224 pixels 3.6 ms against 0.2
# to 0.6 ms an image (one Zen 5 core).
DENSE_SIDE = 64


def per_image(images: Tensor) -> bool:
    """Whether each image is worked on by itself: on a CPU it fills the cache from this size on."""
    return images.device.type == "cpu" and max(images.shape[2:]) > DENSE_SIDE


def crop_resize(images: Tensor, boxes: Numbers, size: int, flip: Numbers) -> Tensor:
    """Crops (B, 3, size, size) in [0, 1] of images (B, 3, H, W), uint8 or float in [0, 1].

    boxes (B, 4) hold top, left, height, width, within the image; flip (B,) mirrors left to right.
    float64 images stay float64, all others are computed in float32.
    """
    return crop_boxes(images, boxes, size, flip, half=False)


def crop_boxes(
    images: Tensor,
    boxes: Numbers,
    size: int,
    flip: Numbers,
    interpolation: Interpolation = "bilinear",
    half: bool | None = None,
) -> Tensor:
    """As `crop_resize`; `half` multiplies uint8 images in float16, None does so on a CUDA device.

    That is right to a quarter of a level.
    """
    if images.ndim != 4 or len(boxes) != len(images) or len(flip) != len(images):
        raise ValueError(
            f"crop_resize wants images (B, 3, H, W), boxes (B, 4) and flip (B,), not "
            f"{tuple(images.shape)}, {tuple(boxes.shape)} and {tuple(flip.shape)}"
        )
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    top, left, height, width = to_device(boxes, images.device, dtype).unbind(1)
    down, across = images.shape[2:]
    output = torch.arange(size, device=images.device, dtype=dtype)
    mirrored = to_device(flip, images.device, dtype).view(-1, 1)
    rows = resizing_weights(down, top, height, height / size, output, interpolation)
    # Column o of a mirrored crop is its column size - 1 - o.
    output = torch.lerp(output, output.flip(0), mirrored)
    cols = resizing_weights(across, left, width, width / size, output, interpolation)
    return _resample(rows, images, cols, interpolation, half)


def resize_window(
    images: Tensor,
    sizes: Numbers,
    resized: Numbers,
    corner: Numbers,
    size: int,
    interpolation: Interpolation = "bilinear",
    half: bool | None = None,
) -> Tensor:
    """A size x size window, its top left at corner (B, 2), of each image resized as a whole.

    Image b fills the top left sizes[b] = (height, width) of images (B, 3, H, W), and is resized
    to resized[b]: the full resize's rows that fall into the window. Returns (B, 3, size, size).
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    parts = [to_device(part, images.device, dtype) for part in (sizes, resized, corner)]
    (height, width), (tall, wide), (top, left) = (part.unbind(1) for part in parts)
    start = torch.zeros_like(height)
    down, across = images.shape[2:]
    output = torch.arange(size, device=images.device, dtype=dtype)
    top, left = output + top.view(-1, 1), output + left.view(-1, 1)
    rows = resizing_weights(down, start, height, height / tall, top, interpolation)
    cols = resizing_weights(across, start, width, width / wide, left, interpolation)
    return _resample(rows, images, cols, interpolation, half)


def resizing_weights(
    extent: int,
    start: Tensor,
    length: Tensor,
    scale: Tensor,
    output: Tensor,
    interpolation: Interpolation,
) -> Tensor:
    """Weights (B, O, extent), each row summing to 1.

    Of a line of `extent` pixels the stretch [start, start + length) is resampled, one output
    pixel for `scale` input pixels; output (O,) or (B, O) are the numbers of the output pixels.
    """
    start, length, scale = (part.view(-1, 1) for part in (start, length, scale))
    unit = scale.clamp(min=1)
    # PIL: centre (o + .5) * scale, pixel middles at p + .5, distances in units of max(scale, 1).
    centre = (output + 0.5) * scale / unit  # (B, O)
    pixels = torch.arange(extent, device=start.device, dtype=start.dtype) - start  # (B, extent)
    middle = (pixels + 0.5) / unit
    # What lies beyond the stretch is too far away to have a weight.
    middle = middle.masked_fill((pixels < 0) | (pixels >= length), torch.inf)
    distance = (middle.unsqueeze(1) - centre.unsqueeze(2)).abs_()
    cubic = interpolation == "bicubic"
    weights = _cubic(distance) if cubic else distance.neg_().add_(1).clamp_(0)
    return weights.div_(weights.sum(-1, keepdim=True))


def _cubic(distance: Tensor) -> Tensor:
    """PIL's BICUBIC: Keys' cubic with a = -1/2, of distances of 0 and more."""
    x = distance.clamp(max=2)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((x - 5) * x + 8) * x - 4
    return torch.where(x < 1, inner, -0.5 * outer)


def _resample(
    rows: Tensor, images: Tensor, cols: Tensor, interpolation: Interpolation, half: bool | None
) -> Tensor:
    """Images (B, 3, H, W) under weights rows (B, I, H) and cols (B, J, W), in [0, 1]."""
    cut = interpolation == "bicubic"
    half = images.device.type == "cuda" if half is None else half
    if half and images.dtype == torch.uint8 and rows.dtype == torch.float32:
        return _half_product(rows, images, cols, cut)
    top = 255.0 if images.dtype == torch.uint8 else 1.0
    images = images.to(rows.dtype)
    if not cut:
        return _rows_first(rows / top, images, cols)
    return _product(rows / top, images, cols, (0.0, top)).clamp_(0, 1)


def _half_product(rows: Tensor, images: Tensor, cols: Tensor, cut: bool) -> Tensor:
    """Of uint8 images: factors in float16, sums in float32, rounded to float16 after each product.

    Levels are exact in float16, and rounded more finely around 0, hence centred; what rounding the
    weights does to their sums is divided out.
    """
    levels = images.to(torch.float16).sub_(128)
    rows, cols = rows.half(), cols.half()
    if cut:
        product = _product(rows, levels, cols, (-128.0, 127.0)).float()
    else:
        product = _rows_first(rows, levels, cols).float()
    sums = rows.sum(2, dtype=torch.float32)[:, None, :, None] * 255
    product.div_(sums * cols.sum(2, dtype=torch.float32)[:, None, None, :]).add_(128 / 255)
    return product.clamp_(0, 1)


def _product(
    rows: Tensor, images: Tensor, cols: Tensor, limits: tuple[float, float] | None = None
) -> Tensor:
    """rows (B, I, H) @ images (B, 3, H, W) @ cols^T (B, J, W) -> (B, 3, I, J).

    What the columns give is cut to the limits before the rows have their turn.
    """
    across = images.flatten(1, 2) @ cols.mT
    if limits:
        across.clamp_(*limits)
    planes = across.view(*images.shape[:3], -1).unbind(1)
    product = images.new_empty(*images.shape[:2], rows.shape[1], cols.shape[1])
    # Plane by plane, or matmul would copy `rows` for each of the three.
    for plane, out in zip(planes, product.unbind(1), strict=True):
        torch.bmm(rows, plane, out=out)
    return product


def _rows_first(rows: Tensor, images: Tensor, cols: Tensor) -> Tensor:
    """As `_product`: two products instead of four for canvases, whose channels lie together."""
    batch, _, height, width = images.shape
    beside = images.permute(0, 2, 3, 1).reshape(batch, height, width * 3)
    planes = (rows @ beside).view(batch, -1, width, 3).permute(0, 3, 1, 2).contiguous()
    return (planes.flatten(1, 2) @ cols.mT).view(*planes.shape[:3], -1)


def gaussian_blur(images: Tensor, sigma: Numbers) -> Tensor:
    """Images (B, 3, H, W), float, each blurred by a Gaussian of sigma (B,) pixels; 0 leaves it.

    The weights are the Gaussian at whole pixels, to four sigma, normalised; edges are repeated.
    The radius is needed on the host: a sigma that lies on a device makes the host wait for it.
    """
    if images.ndim != 4 or len(sigma) != len(images):
        raise ValueError(
            f"gaussian_blur wants images (B, 3, H, W) and sigma (B,), not "
            f"{tuple(images.shape)} and {tuple(sigma.shape)}"
        )
    blurred = images.clone(memory_format=torch.contiguous_format)
    blur_rows(blurred, to_host(sigma).astype(np.float64))
    return blurred


def blur_rows(images: Tensor, sigma: NDArray[np.float64]) -> None:
    """`gaussian_blur` in place; planes of the images (B, 3, H, W) contiguous."""
    rows = np.flatnonzero(sigma)
    if per_image(images):
        for row in rows:
            weights = gaussian_weights(sigma[row : row + 1])[0].tolist()
            image = images[row : row + 1]
            _convolve(_convolve(image, weights, 2), weights, 3, out=image)
    elif rows.size:
        pick = to_device(rows, images.device)
        weights = to_device(gaussian_weights(sigma[rows]), images.device, images.dtype)
        height, width = images.shape[2:]
        down = _band(weights, height)
        across = down if height == width else _band(weights, width)
        images.index_copy_(0, pick, _product(down, images.index_select(0, pick), across))


def gaussian_weights(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights (B, 2R + 1) at pixels -R..R, R the widest of the batch; each row sums to 1."""
    radius = np.ceil(BLUR_TAILS * sigma)[:, None]
    pixels = np.arange(-radius.max(initial=0), radius.max(initial=0) + 1)
    weights = np.exp(-0.5 * (pixels / sigma[:, None]) ** 2)
    weights *= np.abs(pixels) <= radius
    return np.asarray(weights / weights.sum(1, keepdims=True))


def _band(weights: Tensor, extent: int) -> Tensor:
    """Matrices (B, extent, extent) that convolve with weights (B, 2R + 1), edges repeated."""
    radius = weights.shape[1] // 2
    # Row o of a wide matrix holds the weights from column o on: padding each row by one more than
    # the matrix is wide, and cutting the flattened rows one shorter, moves every row by one.
    wide = extent + 2 * radius
    padded = F.pad(weights.unsqueeze(1).expand(-1, extent, -1), (0, extent))  # wide + 1 columns
    band = padded.flatten(1)[:, : extent * wide].view(-1, extent, wide)
    inner = band[:, :, radius : radius + extent].clone()
    # What reaches beyond the image falls on its border pixel.
    inner[:, :, 0] += band[:, :, :radius].sum(2)
    inner[:, :, -1] += band[:, :, radius + extent :].sum(2)
    return inner


def _convolve(image: Tensor, weights: list[float], dim: int, out: Tensor | None = None) -> Tensor:
    """One image (1, 3, H, W) convolved along a dimension with symmetric weights."""
    radius, extent = len(weights) // 2, image.shape[dim]
    padding = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
    padded = F.pad(image, padding, mode="replicate")
    total = torch.mul(padded.narrow(dim, radius, extent), weights[radius], out=out)
    for tap in range(radius):
        total.add_(padded.narrow(dim, tap, extent), alpha=weights[tap])
        total.add_(padded.narrow(dim, 2 * radius - tap, extent), alpha=weights[tap])
    return total
