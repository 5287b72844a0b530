"""Shared by all tests: few threads, and where the real images are."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from built import small_npz
from forks import Forks
from hypothesis import HealthCheck, settings
from PIL import Image

# Tests never judge time: machines are shared, and a slow moment is no counterexample.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

os.environ["MOCOKIT_CACHE"] = tempfile.mkdtemp(prefix="mocokit-tests-")  # not the user's own
atexit.register(shutil.rmtree, os.environ["MOCOKIT_CACHE"], ignore_errors=True)

Command = Callable[..., tuple[int, str, str]]
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder and without MOCOKIT_CACHE."""
    import pwd

    def unknown(user: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "MOCOKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def mocokit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A command run in this process: its exit code, standard output and standard error."""
    from mocokit import cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mocokit", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `built.Built`."""
    return small_npz(tmp_path_factory.mktemp("small"))


@pytest.fixture
def no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests to which neither scores nor the sheet of views matter: both take time."""
    monkeypatch.setattr("mocokit.train.diagnose", lambda *rest: {})
    monkeypatch.setattr("mocokit.run.begin.contact_sheet", lambda *rest, **named: None)


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP as it is outside of nohup, here and in what is started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images beside the checkout; tests that need it skip where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real images of shared/data are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def forks(_own_cache) -> Iterator[Forks]:
    """Runs of several processes that load nothing."""
    if not hasattr(os, "fork"):
        pytest.skip("forks the processes of a run")
    server = Forks()
    yield server
    server.close()


@pytest.fixture(scope="session")
def toy_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MedMNIST-style file: 160 + 40 images of 32 pixels in four colours, with noise."""
    draw = np.random.default_rng(0)
    colours = draw.integers(40, 200, (4, 3))
    arrays = {}
    for split, count in (("train", 160), ("test", 40)):
        labels = np.arange(count) % 4
        noise = draw.integers(-40, 40, (count, 32, 32, 3))
        images = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    path = tmp_path_factory.mktemp("toy") / "toy.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested folder of 80 small JPEGs of different sizes, without labels."""
    draw = np.random.default_rng(1)
    root = tmp_path_factory.mktemp("photos")
    for number in range(80):
        height, width = draw.integers(30, 90, 2)
        folder = root / ("." if number % 2 else f"day {number % 6}")
        folder.mkdir(exist_ok=True)
        pixels = draw.integers(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((int(width), int(height))).save(folder / f"{number}.jpg")
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Listings of folders go where no user's are; workers and commands inherit it."""
    os.environ["MOCOKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
