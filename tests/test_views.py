"""Whole pipelines, replayed step by step through PIL and torchvision."""

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from gpus import waiting_is_an_error
from PIL import Image
from reference_views import (
    cifar,
    flat,
    levels,
    picture,
    replay,
    resized,
    simclr,
    spec_of,
    v1,
    v2,
    v3,
)

from mocokit.views import canvases as room, separable, views
from mocokit.views.params import draw_table
from mocokit.views.views import ViewsOnDemand, evaluation_views, make_views

PIPELINES = {"v1": v1, "v2": v2, "cifar": cifar, "simclr": simclr}
PHOTOS = [
    (150, 200),
    (80, 97),
    (200, 130),
    (33, 400),
    (70, 70),
    (9, 7),
    (128, 65),
    (140, 90),
    (50, 60),
    (24, 99),
]


def photos(sizes=PHOTOS):
    return [picture(*size, seed) for seed, size in enumerate(sizes)]


def table_of(spec, canvases, view=0):
    _, heights, widths = flat(canvases)
    return draw_table(spec, 5, 3, np.arange(len(canvases)), view, heights, widths)


def made(spec, canvases, table=None):
    pixels, heights, widths = flat(canvases)
    table = table_of(spec, canvases) if table is None else table
    return make_views(spec, table, pixels, heights, widths, "cpu")


def force(monkeypatch, way):
    monkeypatch.setattr(room, "_way", lambda *_: way)


@pytest.mark.parametrize("name", PIPELINES)
def test_dense_pipeline_is_torchvisions_on_exact_crops(name, monkeypatch):
    force(monkeypatch, "gathered")
    spec, canvases = PIPELINES[name](72), photos()
    table = table_of(spec, canvases)
    ours = levels(spec, made(spec, canvases, table))
    expected = 255 * replay(spec, table, canvases, exact=True)
    assert (ours - expected).abs().max() < 0.1


@pytest.mark.parametrize("name", PIPELINES)
def test_small_images_are_torchvisions_on_exact_crops(name):
    spec, canvases = PIPELINES[name](32), photos([(32, 32)] * 32)
    table = table_of(spec, canvases)
    ours = levels(spec, made(spec, canvases, table))
    expected = 255 * replay(spec, table, canvases, exact=True)
    assert (ours - expected).abs().max() < 0.1


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_on_large_images_is_torchvisions_on_pil_crops(name):
    spec, canvases = PIPELINES[name](72), photos()
    table = table_of(spec, canvases)
    ours = levels(spec, made(spec, canvases, table))
    expected = 255 * replay(spec, table, canvases, exact=False)
    difference = (ours - expected).abs()
    # A level's difference in the crop is stretched by contrast and, near gray, turned by hue;
    # SimCLR's factors are twice as far from 1.
    assert difference.max() < (20 if name == "simclr" else 6) and difference.mean() < 0.3


@pytest.mark.parametrize("name", PIPELINES)
def test_every_operation_occurs_in_the_replays(name):
    spec, canvases = PIPELINES[name](72), photos()
    table = table_of(spec, canvases)
    for operation, column in (
        ("flip", table.flip),
        ("jitter", table.jitter),
        ("grayscale", table.grayscale),
        ("blur", table.sigma > 0),
    ):
        assert column.any() == (operation in spec.order), operation
        assert operation == "jitter" or not column.all()


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("way", ["gathered", "each", "grid"])
def test_mocov3s_pair_is_torchvisions_on_exact_crops(view, way, monkeypatch):
    force(monkeypatch, way)
    spec, canvases = v3(40), photos([(48, 48)] * 40 if way == "grid" else PHOTOS * 3)
    table = table_of(spec, canvases, view)
    assert (table.sigma > 0).all() == (view == 0) and table.solarize.any() == (view == 1)
    assert (table.sigma > 0).any()
    ours = levels(spec, made(spec, canvases, table))
    expected = 255 * replay(spec, table, canvases, exact=way != "each")
    difference = (ours - expected).abs()
    assert difference.max() < (6 if way == "each" else 0.1)
    assert difference.mean() < (0.3 if way == "each" else 0.01)


@pytest.mark.parametrize("kind, most", [("bilinear", 1.002), ("bicubic", 1.13)])
def test_the_three_ways_agree_to_a_level(kind, most, monkeypatch):
    # Rounding between the two passes costs the cubic a little more: its weights' absolute sum.
    spec = spec_of(size=40, resize=44, order=("crop", "flip"), interpolation=kind)
    for canvases in (photos(), photos([(64, 64)] * 8), photos([(30, 45)] * 3)):
        pixels, heights, widths = flat(canvases)
        results = {}
        for way in ("gathered", "each", "grid"):
            if way == "grid" and len({canvas.shape for canvas in canvases}) > 1:
                continue
            force(monkeypatch, way)
            both = (
                made(spec, canvases),
                evaluation_views(spec, pixels, heights, widths, "cpu"),
            )
            results[way] = torch.stack([levels(spec, part) for part in both])
        dense = results.pop("gathered")
        assert (results["each"] - dense).abs().max() < most
        assert ((results["each"] - dense.round()).abs()).mean() < 0.3
        if "grid" in results:
            assert (results["grid"] - dense).abs().max() < 2e-3


def test_the_way_follows_from_device_and_size():
    def way(device, *sizes):
        heights, widths = np.array(sizes).T
        return room._way(torch.device(device), heights, widths)

    assert way("cpu", (32, 32), (32, 32)) == way("cuda", (64, 48)) == "grid"
    assert way("cpu", (32, 32), (33, 32)) == way("cpu", (65, 65), (65, 65)) == "each"
    assert way("cuda", (32, 32), (33, 32)) == way("cuda", (65, 65)) == "gathered"
    assert views._fuses(torch.device("cuda", 1)) and not views._fuses(torch.device("cpu"))


@pytest.mark.parametrize("way", ["gathered", "each"])
def test_a_batch_equals_its_images_one_by_one(way, monkeypatch):
    force(monkeypatch, way)
    spec, canvases = v2(72), photos()
    table = table_of(spec, canvases)
    together = made(spec, canvases, table)
    for row in range(0, len(canvases), 3):
        part = slice(row, row + 1)
        per_image = made(spec, canvases[part], table.rows(part))
        assert (per_image[0] - together[row]).abs().max() < 1e-4


@pytest.mark.parametrize("way", ["gathered", "each", "grid"])
def test_a_batch_in_small_chunks_is_the_same(way, monkeypatch):
    force(monkeypatch, way)
    canvases = photos([(32, 32)] * 20) if way == "grid" else photos()
    spec = v2(32)
    whole = made(spec, canvases)
    monkeypatch.setattr(room, "_CACHED_FLOATS", 3 * 3 * 32 * 32)
    monkeypatch.setattr(room, "_GATHERED_PIXELS", 40_000)
    assert (made(spec, canvases) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("pixels", [10_000, 200_000, 1])
def test_gathered_chunks_keep_to_their_memory_and_to_the_order(pixels, monkeypatch):
    force(monkeypatch, "gathered")
    monkeypatch.setattr(room, "_GATHERED_PIXELS", pixels)
    data, heights, widths = flat(photos())
    canvases = room.Canvases.lay_out(data, heights, widths, torch.device("cpu"))
    parts = list(canvases.parts(heights, widths, 32))
    assert np.concatenate([np.arange(len(heights))[part] for part in parts]).tolist() == list(
        range(len(heights))
    )
    for part in parts:
        count = part.stop - part.start
        assert count >= 1
        assert count == 1 or count * heights[part].max() * widths[part].max() <= pixels


def test_views_and_evaluation_views_gather_no_more_than_fits(monkeypatch):
    force(monkeypatch, "gathered")
    monkeypatch.setattr(room, "_GATHERED_PIXELS", 40_000)
    sizes, gather = [], room.Canvases._gather

    def record(*parts):
        images = gather(*parts)
        sizes.append((len(images), images[:, 0].numel()))
        return images

    monkeypatch.setattr(room.Canvases, "_gather", record)
    spec, canvases = v2(32), photos()
    made(spec, canvases)
    evaluation_views(spec, *flat(canvases), "cpu")
    assert sum(count for count, _ in sizes) == 2 * len(canvases)
    assert all(count == 1 or pixels <= 40_000 for count, pixels in sizes)


def test_boxes_are_gathered_beyond_what_32_bits_count():
    """Of one pixel, repeated two thousand million times without taking memory."""
    pixels = torch.tensor([[10, 20, 30]], dtype=torch.uint8).expand(2**31 + 400, 3)
    sizes, starts = np.array([20]), np.array([2**31])
    cpu = torch.device("cpu")
    canvases = room.Canvases.lay_out(pixels, sizes, sizes, cpu, starts)
    gathered = canvases._gather(slice(0, 1), np.array([[3, 4, 16, 15]]))
    assert gathered.shape == (1, 3, 16, 15) and torch.equal(gathered[0, :, 0, 0], pixels[0])


@pytest.mark.parametrize("size", [32, 224, 2048])
@pytest.mark.parametrize("way", ["grid", "each"])
def test_chunks_on_a_cpu_stay_near_its_cache(way, size, monkeypatch):
    force(monkeypatch, way)
    data, heights, widths = flat(photos([(20, 20)] * 150))
    canvases = room.Canvases.lay_out(data, heights, widths, torch.device("cpu"))
    counts = [len(heights[part]) for part in canvases.parts(heights, widths, size)]
    assert sum(counts) == 150
    view, most = 4 * 3 * size**2, max(counts)
    assert most == 1 or most * view <= 1.5 * 2**20
    assert (most + 1) * view > 1.5 * 2**20


def test_what_is_returned():
    for canvases in (photos(), photos([(32, 32)] * 4)):
        spec = v2(48)
        result = made(spec, canvases)
        assert result.shape == (len(canvases), 3, 48, 48) and result.dtype == torch.float32
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert spec.bytes * len(canvases) == result.nbytes
        pixels, heights, widths = flat(canvases)
        before = pixels.clone()
        evaluated = evaluation_views(spec, pixels, heights, widths, torch.device("cpu"))
        assert evaluated.shape == result.shape and evaluated.dtype == torch.float32
        assert evaluated.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(pixels, before)


def test_the_same_call_gives_the_same_bits():
    for canvases in (photos(), photos([(32, 32)] * 40)):
        assert torch.equal(made(v2(40), canvases), made(v2(40), canvases))


def test_normalisation_is_the_only_step_left_of_an_untouched_image():
    spec = spec_of(size=32, resize=32, order=("crop",), crop_area=(1, 1), crop_ratio=(1, 1))
    canvases = photos([(32, 32)] * 3)
    expected = torch.stack([T.Normalize(spec.mean, spec.std)(TF.to_tensor(c)) for c in canvases])
    assert (made(spec, canvases) - expected).abs().max() < 1e-5
    pixels, heights, widths = flat(canvases)
    assert (evaluation_views(spec, pixels, heights, widths, "cpu") - expected).abs().max() < 1e-6


@pytest.mark.parametrize("way", ["gathered", "each"])
@pytest.mark.parametrize("size, resize", [(56, 64), (51, 64), (33, 33), (32, 57)])
def test_bicubic_evaluation_view_is_torchvisions_on_pil_images(size, resize, way, monkeypatch):
    force(monkeypatch, way)
    spec = spec_of(size=size, resize=resize, interpolation="bicubic")
    canvases = photos([(150, 200), (81, 97), (200, 131), (33, 400), (64, 64), (9, 7), (57, 3)])
    expected = []
    for canvas in canvases:
        height, width = T.functional._compute_resized_output_size(canvas.shape[:2], [resize])
        whole = resized(Image.fromarray(canvas), (width, height), "bicubic")
        expected.append(T.functional.to_tensor(T.functional.center_crop(whole, size)))
    ours = levels(spec, evaluation_views(spec, *flat(canvases), "cpu"))
    assert (ours - 255 * torch.stack(expected)).abs().max() < 1.13


@pytest.mark.parametrize("seed", range(8))
def test_torchs_cubic_of_whole_levels_is_pils(seed, monkeypatch):
    """Of black and white noise, where nearly every overshoot is cut off."""
    force(monkeypatch, "each")
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 300, (12, 2))
    canvases = [255 * draw.integers(0, 2, (*size, 3), dtype=np.uint8) for size in sizes]
    for size in (8, 33, 72, 224):
        spec = spec_of(
            size=size,
            resize=size,
            order=("crop",),
            interpolation="bicubic",
            mean=(0, 0, 0),
            std=(1, 1, 1),
        )
        table = table_of(spec, canvases)
        ours = made(spec, canvases, table)
        # Both round twice; three values in a million fall to the two sides of a half, and differ
        # by two levels, while neither is further than that from the cubic itself.
        theirs = 255 * (ours - replay(spec, table, canvases, exact=False)).abs()
        assert theirs.max() < 2.002 and (theirs > 1.002).float().mean() < 3e-5
        assert 255 * (ours - replay(spec, table, canvases, exact=True)).abs().max() < 1.13


@pytest.mark.parametrize("way", ["gathered", "each"])
@pytest.mark.parametrize("size, resize", [(56, 64), (51, 64), (33, 33), (32, 57)])
def test_evaluation_view_is_torchvisions_on_pil_images(size, resize, way, monkeypatch):
    force(monkeypatch, way)
    spec = spec_of(size=size, resize=resize)
    canvases = photos([(150, 200), (81, 97), (200, 131), (33, 400), (64, 64), (9, 7), (57, 3)])
    steps = T.Compose([T.Resize(resize), T.CenterCrop(size), T.ToTensor()])
    expected = 255 * torch.stack([steps(Image.fromarray(canvas)) for canvas in canvases])
    ours = levels(spec, evaluation_views(spec, *flat(canvases), "cpu"))
    assert (ours - expected).abs().max() < 1.002
    assert (ours.round() - expected).abs().mean() < 0.3


@pytest.mark.parametrize("size, resize, side", [(32, 36, 32), (24, 32, 32), (32, 32, 48)])
def test_evaluation_view_of_small_images(size, resize, side):
    spec = spec_of(size=size, resize=resize)
    canvases = photos([(side, side)] * 5)
    steps = T.Compose([T.Resize(resize), T.CenterCrop(size), T.ToTensor()])
    expected = 255 * torch.stack([steps(Image.fromarray(canvas)) for canvas in canvases])
    ours = levels(spec, evaluation_views(spec, *flat(canvases), "cpu"))
    assert (ours - expected).abs().max() < 1.002


@pytest.mark.parametrize("way", ["gathered", "each", "grid"])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_uniform_image_gives_uniform_views(way, level, monkeypatch):
    force(monkeypatch, way)
    spec = v2(40)
    canvases = [np.full((50, 50, 3), level, np.uint8)] * 12
    ours = levels(spec, made(spec, canvases))
    assert (ours - ours[:, :, :1, :1]).abs().max() < 1e-3
    evaluated = levels(spec, evaluation_views(spec, *flat(canvases), "cpu"))
    assert (evaluated - level).abs().max() < 1e-3


def test_no_images():
    spec = v2(16)
    none = np.zeros(0, np.int64)
    pixels = torch.zeros(0, dtype=torch.uint8)
    table = draw_table(spec, 0, 0, none, 0, none, none)
    assert make_views(spec, table, pixels, none, none, "cpu").shape == (0, 3, 16, 16)
    assert evaluation_views(spec, pixels, none, none, "cpu").shape == (0, 3, 16, 16)


def test_no_gradient_is_recorded():
    assert not made(v2(16), photos()).requires_grad


CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def no_waiting():
    """What follows the first run may not make the host wait for the device."""

    def twice(run):
        run()
        with waiting_is_an_error():
            return run()

    return twice


def cuda(*values, **keywords):
    return pytest.param(*values, marks=CUDA, **keywords)


def assert_close_to_float32(name, spec, ours, theirs):
    """The crops' error of float16, stretched by contrast and, near gray, turned by hue."""
    difference = (levels(spec, theirs) - levels(spec, ours)).abs()
    assert difference.max() < (4 if name == "simclr" else 1) and difference.mean() < 0.05


ALL = {**PIPELINES, "v3": v3}


@pytest.mark.parametrize("sizes", [PHOTOS, [(32, 32)] * 16])
@pytest.mark.parametrize("name", ALL)
def test_whole_pipelines_with_half_products(name, sizes, monkeypatch):
    """What a CUDA device computes, on a CPU."""
    force(monkeypatch, "grid" if sizes[0] == (32, 32) else "gathered")
    spec, canvases = ALL[name](72), photos(sizes)
    single = [made(spec, canvases, table_of(spec, canvases, view)) for view in (0, 1)]
    resample = separable._resample
    monkeypatch.setattr(separable, "_resample", lambda *parts: resample(*parts[:4], True))
    monkeypatch.setattr(room, "enlarges", lambda *_: False)
    monkeypatch.setattr(views, "_fuses", lambda _: True)
    for view in (0, 1):
        half = made(spec, canvases, table_of(spec, canvases, view))
        assert not torch.equal(half, single[view])
        assert_close_to_float32(name, spec, single[view], half)


@pytest.mark.parametrize("sizes", [cuda(PHOTOS), cuda([(32, 32)] * 16)])
@pytest.mark.parametrize("name", ALL)
def test_cuda_agrees_with_the_cpu_and_never_waits(name, sizes, no_waiting, monkeypatch):
    spec, canvases = ALL[name](72), photos(sizes)
    pixels, heights, widths = flat(canvases)
    pixels = pixels.pin_memory()
    tables = [table_of(spec, canvases, view) for view in (0, 1)]
    theirs = no_waiting(
        lambda: [make_views(spec, table, pixels, heights, widths, "cuda") for table in tables]
    )
    evaluated = no_waiting(lambda: evaluation_views(spec, pixels, heights, widths, "cuda"))
    force(monkeypatch, "gathered")
    for table, views_of_cuda in zip(tables, theirs, strict=True):
        assert views_of_cuda.is_contiguous(memory_format=torch.channels_last)
        ours = make_views(spec, table, pixels, heights, widths, "cpu")
        assert_close_to_float32(name, spec, ours, views_of_cuda.cpu())
    ours = evaluation_views(spec, pixels, heights, widths, "cpu")
    assert (levels(spec, evaluated.cpu()) - levels(spec, ours)).abs().max() < 0.25


@pytest.mark.parametrize("kind, most", [cuda("bilinear", 1.25), cuda("bicubic", 1.38)])
def test_cuda_and_the_cpus_ways_agree_on_crops(kind, most, monkeypatch):
    spec = spec_of(size=72, resize=80, order=("crop", "flip"), interpolation=kind)
    canvases = photos()
    table = table_of(spec, canvases)
    pixels, heights, widths = flat(canvases)
    theirs = levels(spec, make_views(spec, table, pixels, heights, widths, "cuda").cpu())
    for way, bound in (("gathered", 0.25), ("each", most)):
        force(monkeypatch, way)
        ours = levels(spec, make_views(spec, table, pixels, heights, widths, "cpu"))
        assert (theirs - ours).abs().max() < bound
    exact = 255 * replay(spec, table, canvases, exact=True)
    assert (theirs - exact).abs().max() < 0.25 and (theirs - exact).abs().mean() < 0.02


@pytest.mark.parametrize("sizes", [[(32, 32)] * 6, [(40, 31), (90, 70), (33, 80), (50, 50)] * 2])
def test_views_on_demand_are_the_views(sizes):
    """Rows in any order, made alone or together, are those of the whole batch."""
    from mocokit import recipes
    from mocokit.settings import replace
    from mocokit.weights.encoder import view_spec

    small = {"views.size": 24}
    spec = view_spec(replace(recipes.mocov2(), small))
    draw = np.random.default_rng(0)
    heights, widths = np.array(sizes, np.int64).T
    count = int((heights * widths).sum()) * 3
    pixels = torch.from_numpy(draw.integers(0, 256, count, dtype=np.uint8))
    table = draw_table(spec, 0, 0, np.arange(len(sizes)), 0, heights, widths)
    whole = make_views(spec, table, pixels, heights, widths, "cpu")
    lazily = ViewsOnDemand(spec, table, pixels, heights, widths, "cpu")
    assert len(lazily) == len(sizes)
    order = draw.permutation(len(sizes))
    for rows in (slice(1, 4), slice(None), order, order[:1]):
        torch.testing.assert_close(lazily[rows], whole[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("half", [False, True])
def test_views_keep_their_precision_inside_autocast(kind, half, monkeypatch):
    """The caller's autocast is for its network; `half` is what a GPU does."""
    resample = separable._resample
    monkeypatch.setattr(separable, "_resample", lambda *parts: resample(*parts[:4], half))
    force(monkeypatch, "gathered")
    spec = spec_of(size=24, resize=28, order=("crop", "flip", "jitter"), interpolation=kind)
    canvases = photos()
    table, (pixels, heights, widths) = table_of(spec, canvases), flat(canvases)

    def made():
        everything = ViewsOnDemand(spec, table, pixels, heights, widths, "cpu")
        return (
            make_views(spec, table, pixels, heights, widths, "cpu"),
            everything[:],
            evaluation_views(spec, pixels, heights, widths, "cpu"),
        )

    outside = made()
    with torch.autocast("cpu", torch.bfloat16):
        inside = made()
    for one, other in zip(outside, inside, strict=True):
        assert torch.equal(one, other)
