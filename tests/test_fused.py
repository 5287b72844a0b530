"""What a CUDA device makes of crops, against torchvision and a blur by its definition, on a CPU."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from reference_views import jitter as reference, spec_of

from mocokit.views import fused
from mocokit.views.fused import finish, steps
from mocokit.views.params import RANDOM_OPERATION, RANDOM_OPERATIONS, Table
from mocokit.views.randaugment import randaugment
from mocokit.views.separable import gaussian_blur

ORDERS = np.array(list(itertools.permutations(range(4))))
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def images(count, height=24, width=17, seed=0):
    """Noise, with gray and primary pixels, whose hue is undefined or on an edge."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    noise[:, :, 0] = noise[:, :1, 0]
    noise[:, :, 1, :8] = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).T
    noise[:, 0, 2] = noise[:, 1, 2]
    return noise


def tables(count, hue=0.5, seed=0):
    """All orders of the jitter; some images are not changed by this or that."""
    draw = np.random.default_rng(seed)
    jittered, gray, blurred, solarized = draw.random((4, count)) < 0.5
    sigma = np.where(blurred, draw.uniform(0.1, 2, count), 0.0)
    return Table(
        np.zeros((count, 4), np.int64), gray, jittered,
        *draw.uniform(0, 2, (3, count)), draw.uniform(-hue, hue, count),
        ORDERS[np.arange(count) % 24], gray, sigma,
        np.zeros((count, 0), RANDOM_OPERATION), solarized,
    )  # fmt: skip


def blurred(image, sigma):
    """By its definition, in float64: a Gaussian at whole pixels to four sigma, edges repeated."""
    if not sigma:
        return image
    radius = int(np.ceil(4 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    result = image.numpy().astype(np.float64)
    for axis in (1, 2):
        reach = np.arange(result.shape[axis])[:, None] + np.arange(-radius, radius + 1)
        index = reach.clip(0, result.shape[axis] - 1)
        result = np.moveaxis(np.moveaxis(result, axis, -1)[..., index] @ weights, -1, axis)
    return torch.from_numpy(result).float()


def expect(pixels, table, order):
    """Image by image; the colours by torchvision."""
    columns = np.stack([table.brightness, table.contrast, table.saturation, table.hue]).T
    rows = []
    for row, image in enumerate(pixels):
        for operation in order:
            if operation == "jitter" and table.jitter[row]:
                image = reference(image, columns[row], table.order[row])
            elif operation == "grayscale" and table.grayscale[row]:
                image = TF.rgb_to_grayscale(image, 3)
            elif operation == "blur":
                image = blurred(image, table.sigma[row])
            elif operation == "solarize" and table.solarize[row]:
                image = TF.solarize(image, 0.5)
        rows.append(image)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "order",
    [
        ("crop", "jitter"),
        ("crop", "jitter", "grayscale", "flip"),
        ("crop", "grayscale", "jitter"),
        ("crop", "blur"),
        ("crop", "solarize"),
        ("crop", "jitter", "grayscale", "blur", "solarize", "flip"),
        ("crop", "blur", "jitter"),
        ("crop",),
    ],
)
def test_operations_are_torchvisions(order):
    table, pixels = tables(48), images(48)
    before = pixels.clone()
    ours = finish(pixels, table, spec_of(order=order, **PLAIN))
    assert (ours - expect(pixels, table, order)).abs().max() < 1e-5
    assert torch.equal(pixels, before)
    changed = np.zeros(48, bool)
    for operation, column in (
        ("jitter", table.jitter),
        ("grayscale", table.grayscale),
        ("blur", table.sigma > 0),
        ("solarize", table.solarize),
    ):
        changed |= column & (operation in order)
    assert not changed.all() and torch.equal(ours[~changed], pixels[~changed])


def test_views_are_normalised_and_channels_last():
    spec, pixels = spec_of(order=("crop",), mean=(0.1, 0.2, 0.3), std=(0.2, 0.4, 0.5)), images(3)
    ours = finish(pixels, tables(3), spec)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([TF.normalize(image, spec.mean, spec.std) for image in pixels])
    assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (64, 64)])
def test_blur_of_any_size_is_the_one_of_the_cpu(shape):
    table, pixels = tables(30), images(30, 24, 17).new_zeros(30, 3, *shape)
    pixels.copy_(torch.rand(pixels.shape, generator=torch.Generator().manual_seed(1)))
    ours = finish(pixels, table, spec_of(order=("crop", "blur"), **PLAIN))
    assert (ours - gaussian_blur(pixels, table.sigma)).abs().max() < 1e-6


def test_randaugment_keeps_its_place():
    """Between what comes before it and what comes after it."""
    table, pixels = tables(6), images(6)
    drawn = np.zeros((6, 1), RANDOM_OPERATION)  # 0 is autocontrast
    table = table._replace(randaugment=drawn)
    spec = spec_of(order=("crop", "jitter", "randaugment", "blur"), **PLAIN)
    expected = expect(pixels, table, ("jitter",))
    randaugment(expected, drawn, spec.mean)
    expected = expect(expected, table, ("blur",))
    assert (finish(pixels, table, spec) - expected).abs().max() < 5e-3  # a level that was rounded


def test_randaugment_fills_with_the_mean():
    """What a rotation of a uniform image uncovers becomes 0 when it is normalised."""
    table, spec = tables(4), spec_of(order=("crop", "randaugment"), mean=(0.2, 0.4, 0.6))
    drawn = np.zeros((4, 1), RANDOM_OPERATION)
    drawn["operation"], drawn["amount"] = RANDOM_OPERATIONS.index("rotate"), 30
    ours = finish(torch.ones(4, 3, 20, 20), table._replace(randaugment=drawn), spec)
    white = (1 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    assert ours[:, :, 0, 0].abs().max() < 1e-5
    assert (ours[:, :, 10, 10] - white).abs().max() < 1e-5


def arguments(count):
    """What `finish` gives to the compiler, of one view of everything but RandAugment."""
    given = []
    order = ("crop", "jitter", "grayscale", "blur", "solarize", "flip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "steps", lambda *parts: given.extend(parts))
        finish(images(count), tables(count), spec_of(order=order))
    return given


def test_all_is_one_graph():
    """Traced whole, for any number of images at once, with the same bits."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, dynamic=True, backend=backend)
    for count in (5, 24, 48):
        parts = arguments(count)
        assert torch.equal(compiled(*parts), steps(*parts))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.skipif(not fused.can_compile(), reason="a compiler for torch.compile is needed")
def test_compiled_it_is_the_same():
    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, dynamic=True)
    for count in (5, 24, 48):
        parts = arguments(count)
        ours = compiled(*parts)
        assert (ours - steps(*parts)).abs().max() < 1e-5
        assert ours.is_contiguous(memory_format=torch.channels_last)
