"""Small sets held on the device: views and runs are those of images that are sent there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mocokit
from mocokit.data.batch import read_batch
from mocokit.data.loader import Loader
from mocokit.data.open import open_data
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.pack import HEAD, write_pack
from mocokit.engine import checkpoint
from mocokit.run import resident
from mocokit.run.resident import Resident, hold
from mocokit.settings.schema import Views
from mocokit.views.params import ViewSpec, draw_table
from mocokit.views.views import ViewsOnDemand, make_views

CPU = torch.device("cpu")
DRAW = np.random.default_rng(0)


@pytest.fixture
def room(monkeypatch):
    """A CPU with memory to spare, as a GPU has."""
    monkeypatch.setattr(resident, "spare_pixels", lambda device: 10**6)


@pytest.fixture
def pack(tmp_path) -> Path:
    """Bare pixels of images of several sizes, of which number 2 cannot be read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(24):
        size = (20, 20) if number % 2 else (int(DRAW.integers(9, 90)), int(DRAW.integers(9, 90)))
        pixels = DRAW.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (folder / "02.png").write_bytes(b"junk")
    write_pack(open_data(folder), tmp_path / "raw.pack", None, True, 1, lambda count: None)
    return tmp_path / "raw.pack"


def spec(size: int) -> ViewSpec:
    return ViewSpec(**Views(size=size).model_dump(), resize=max(40, size))


def views(source, held, index, view, make=make_views):
    """Views of images of a source, and of the same images held."""
    read = read_batch(source, index, None)
    bare = read_batch(held.unread, index, None)
    assert bare.pixels.numel() == 0 and bare.bad == read.bad
    for name in ("index", "heights", "widths"):
        assert getattr(bare, name).tolist() == getattr(read, name).tolist()
    table = draw_table(view, 0, 0, read.index, 0, read.heights, read.widths)
    sizes = read.heights, read.widths
    pixels, starts = held.canvases(bare.index)
    return make(view, table, read.pixels, *sizes, CPU), make(
        view, table, pixels, *sizes, CPU, starts
    )


@pytest.mark.parametrize("shape", [(30, 9, 7, 3), (30, 9, 7), (30, 80, 70, 3)])
@pytest.mark.parametrize("index", [[7, 0, 29, 7], [3, 4, 5], [29]])
def test_views_of_a_held_array(room, shape, index):
    source = ArraySource(DRAW.integers(0, 256, shape, np.uint8), None, "x")
    held = hold(source, None, CPU)
    assert torch.equal(*views(source, held, np.array(index), spec(8)))


@pytest.mark.parametrize("index", [list(range(24)), [1, 9, 3, 3], [23, 0, 7], [5, 7, 9], [2, 1]])
@pytest.mark.parametrize("make", [make_views, ViewsOnDemand])
def test_views_of_a_held_pack(room, pack, index, make):
    """Of any sizes or of one; images that cannot be read are named as they would be."""
    source = open_data(pack).train
    sent, held = views(source, hold(source, None, CPU), np.array(index), spec(16), make)
    assert torch.equal(sent[:], held[:])


def test_loaders_choose_the_same_substitutes(room, pack):
    source = open_data(pack).train
    options = {"seed": 1, "batch_size": 5, "epochs": 2, "last": "keep", "bound": 60}
    held = hold(source, 60, CPU)
    sent, bare = (list(Loader(one, workers=0, **options)) for one in (source, held.unread))
    for (_, one), (_, two) in zip(sent, bare, strict=True):
        assert one.index.tolist() == two.index.tolist() and one.bad == two.bad
        assert one.heights.tolist() == two.heights.tolist()
    assert any(batch.bad for _, batch in bare)
    assert Loader(held.unread, workers=3, **options).workers == 0


def test_bounded_and_damaged_records(room, pack):
    source = open_data(pack).train
    content = bytearray(pack.read_bytes())
    content[int(source.offsets[5]) + HEAD.size] ^= 1  # a pixel
    content[int(source.offsets[8])] ^= 1  # where a record begins
    pack.write_bytes(content)
    source = open_data(pack).train
    held = hold(source, 10, CPU)
    assert len(held.pixels) >= (held.unread.heights * held.unread.widths).sum()
    assert len(held.pixels) == source.count_pixels(10) < source.count_pixels(None)
    assert sorted(held.unread.bad) == [2, 5, 8]
    for number in set(range(24)) - {2, 5, 8}:
        pixels, (start,) = held.canvases(np.array([number]))
        image = source.read(number, 10)
        found = pixels[start : start + image.shape[0] * image.shape[1]]
        np.testing.assert_array_equal(found.numpy().reshape(image.shape), image)


def test_sets_are_read_in_pieces(monkeypatch):
    images = DRAW.integers(0, 256, (50, 4, 4, 3), np.uint8)
    monkeypatch.setattr(resident, "PIECE", 7 * 48)
    found = Resident(ArraySource(images, None, "x"), 50 * 16, None, CPU)
    assert torch.equal(found.pixels, torch.from_numpy(images).view(-1, 3))


def test_free_memory_decides(pack, monkeypatch):
    source = ArraySource(np.zeros((100, 10, 10, 3), np.uint8), None, "x")
    cuda = torch.device("cuda")
    free = [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 2**40))
    monkeypatch.setattr(resident, "Resident", lambda source, most, bound, device: most)
    for free[0], expected in ((119_999, None), (120_000, 10_000)):
        assert hold(source, None, cuda) == expected
    assert hold(source, None, CPU) is None
    packed = open_data(pack).train
    pixels = packed.count_pixels(None)
    for free[0], expected in ((4 * 3 * (pixels - 1), None), (4 * 3 * pixels, pixels)):
        assert hold(packed, None, cuda) == expected


def test_without_memory_after_all_nothing_is_held(room, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(resident.torch, "empty", full)
    assert hold(ArraySource(np.zeros((3, 4, 4, 3), np.uint8), None, "x"), None, CPU) is None


def test_a_pack_that_is_gone_is_not_held(room, pack):
    source = open_data(pack).train
    pack.unlink()
    assert hold(source, None, CPU) is None


def test_encoded_images_are_not_held(room, pack, tmp_path):
    assert hold(open_data(pack.parent / "photos").train, None, CPU) is None
    splits = open_data(pack.parent / "photos")
    write_pack(splits, tmp_path / "files.pack", None, False, 1, lambda count: None)
    assert hold(open_data(tmp_path / "files.pack").train, None, CPU) is None


@pytest.mark.parametrize("form", ["array", "pack"])
def test_a_run_on_held_images_is_the_same_run(toy_npz, tmp_path, monkeypatch, form):
    data = toy_npz
    if form == "pack":
        data = tmp_path / "toy.pack"
        write_pack(open_data(toy_npz), data, None, True, 1, lambda count: None)

    def run(name):
        settings = {"engine.threads": 1, "net.calibrate_head": True}
        mocokit.pretrain("demo", data, tmp_path / name, epochs=1, settings=settings)
        return checkpoint.load(tmp_path / name / "last.pt")["method"]

    sent = run("sent")
    monkeypatch.setattr(resident, "spare_pixels", lambda device: 10**9)
    held = run("held")
    assert all(torch.equal(tensor, held[name]) for name, tensor in sent.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(pack):
    source, cuda = open_data(pack).train, torch.device("cuda")
    held, index = hold(source, None, cuda), np.array([3, 1, 0])
    assert held.pixels.is_cuda
    batch, view = read_batch(source, index, None), spec(16)
    table = draw_table(view, 0, 0, batch.index, 0, batch.heights, batch.widths)
    pixels, starts = held.canvases(index)
    sizes = batch.heights, batch.widths
    sent = make_views(view, table, batch.pixels, *sizes, cuda)
    assert torch.equal(sent, make_views(view, table, pixels, *sizes, cuda, starts))
