"""Images held on the device: the same batches, and the same run."""

import numpy as np
import pytest
import torch

import mocokit
from mocokit.data.arrays import ArraySource, Unread
from mocokit.data.batch import read_batch
from mocokit.engine import checkpoint, resident
from mocokit.engine.resident import Resident, fits

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(30, 5, 4, 3), (30, 5, 4)])
def test_a_gathered_batch_is_the_read_one(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    source, index = ArraySource(images, None, "x"), np.array([7, 0, 29, 7])
    batch, bare = read_batch(source, index, None), read_batch(Unread(source), index, None)
    assert torch.equal(Resident(images, CPU).gather(index), batch.pixels)
    assert bare.pixels.numel() == 0 and bare.index.tolist() == index.tolist()
    assert bare.heights.tolist() == batch.heights.tolist()
    assert bare.widths.tolist() == batch.widths.tolist()


def test_large_arrays_go_in_pieces(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
    monkeypatch.setattr(resident, "_parts", lambda images: 7)
    assert torch.equal(Resident(images, CPU).images, torch.from_numpy(images))


def test_free_memory_decides(monkeypatch):
    images = np.zeros((100, 10, 10, 3), np.uint8)
    cuda = torch.device("cuda")
    for free, expected in ((119_999, False), (120_000, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        assert fits(images, cuda) is expected
    assert not fits(images, CPU)


def test_a_run_on_held_images_is_the_same_run(toy_npz, tmp_path, monkeypatch):
    def run(name):
        settings = {"engine.threads": 1, "net.calibrate_head": True}
        mocokit.pretrain("demo", toy_npz, tmp_path / name, epochs=1, settings=settings)
        return checkpoint.load(tmp_path / name / "last.pt")["method"]

    sent = run("sent")
    monkeypatch.setattr("mocokit.build.fits", lambda images, device: True)
    held = run("held")
    assert all(torch.equal(tensor, held[name]) for name, tensor in sent.items())


@pytest.mark.gpu
def test_on_a_gpu():
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 4, 3), np.uint8)
    index = np.array([3, 1, 2])
    found = Resident(images, torch.device("cuda")).gather(index)
    assert found.is_cuda
    np.testing.assert_array_equal(found.cpu().numpy(), images[index].reshape(-1))
