"""Batches: the same for any number of workers, from any step, on any number of processes."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from mocokit import chance
from mocokit.data import (
    batch as batch_module,
    sharing as sharing_module,
    workers as workers_module,
)
from mocokit.data.batch import Batch, read_batch
from mocokit.data.loader import Loader, read_batches
from mocokit.data.open import open_data
from mocokit.data.sharing import Packed
from mocokit.data.sources.arrays import ArraySource
from mocokit.data.sources.folder import FolderSource
from mocokit.errors import MocokitError, UserError

BAD = (3, 4, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FolderSource:
    """20 images of different sizes, three of them unreadable."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(20):
        path = root / f"{number:02}.png"
        if number in BAD:
            path.write_bytes(b"" if number == 3 else b"junk")
        else:
            shape = (8 + number, 30 - number, 3)
            Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(path)
    source = open_data(root).train
    assert isinstance(source, FolderSource)
    return source


def loader(source: Any, **changes: Any) -> Loader:
    options = {"seed": 5, "batch_size": 6, "epochs": 2, "last": "keep", "bound": None, "workers": 0}
    return Loader(source, **(options | changes))


def tiny(size: int) -> ArraySource:
    """Images whose only pixel is their number."""
    return ArraySource(np.arange(size, dtype=np.uint8).reshape(size, 1, 1), None, "tiny")


def assert_same(one: list[tuple[int, Batch]], other: list[tuple[int, Batch]]) -> None:
    assert [step for step, _ in one] == [step for step, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        assert a.bad == b.bad and a.pixels.dtype == b.pixels.dtype == torch.uint8
        assert torch.equal(a.pixels, b.pixels)
        for field in ("index", "heights", "widths"):
            assert getattr(a, field).dtype == getattr(b, field).dtype == np.int64
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


# The order

shapes = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**40))


@given(shapes, st.sampled_from(["keep", "drop"]))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_image_once(shape: tuple[int, int, int], last: Any) -> None:
    size, batch_size, seed = shape
    options: Any = {"batch_size": batch_size, "epochs": 3, "seed": seed, "last": last}
    if last == "drop" and batch_size > size:
        with pytest.raises(UserError, match=r"data\.last=keep"):
            loader(tiny(size), **options)
        return
    made = loader(tiny(size), **options)
    visits = [batch.index.tolist() for _, batch in made]
    assert len(visits) == len(made) == made.total_steps == 3 * made.steps_per_epoch
    for epoch in range(3):
        part = visits[epoch * made.steps_per_epoch :][: made.steps_per_epoch]
        together = list(chain(*part))
        expected = size if last == "keep" else size - size % batch_size
        assert len(together) == len(set(together)) == expected
        assert all(len(batch) == batch_size for batch in part[:-1])
        assert together == chance.Order(seed, epoch, size)[np.arange(expected)].tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = [
        tuple(np.concatenate([batch.index for _, batch in loader(tiny(50), seed=seed)]).tolist())
        for seed in range(3)
    ]
    epochs = {order[:50] for order in orders} | {order[50:] for order in orders}
    assert len(epochs) == 6


@given(shapes, st.integers(1, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_shares_of_processes_make_up_the_global_batch(
    shape: tuple[int, int, int], world: int, data: st.DataObject
) -> None:
    size, batch_size, seed = shape
    cuts = sorted(data.draw(st.lists(st.floats(0, 1), min_size=world - 1, max_size=world - 1)))
    ends = [0.0, *cuts, 1.0]

    def share(rank: int) -> Any:
        return lambda length: slice(round(ends[rank] * length), round(ends[rank + 1] * length))

    options: Any = {"batch_size": batch_size, "epochs": 1, "seed": seed}
    whole = list(loader(tiny(size), **options))
    parts = [list(loader(tiny(size), **options, share=share(rank))) for rank in range(world)]
    for number, (step, batch) in enumerate(whole):
        mine = [part[number] for part in parts]
        assert {one[0] for one in mine} == {step}
        assert list(chain(*(one[1].index.tolist() for one in mine))) == batch.index.tolist()
        assert torch.equal(torch.cat([one[1].pixels for one in mine]), batch.pixels)


# The pixels


def test_canvases_lie_one_after_another_unpadded(folder: FolderSource) -> None:
    batch = loader(folder, batch_size=20, epochs=1).batch_at(0)
    assert len(set(batch.heights.tolist())) > 5 and batch.pixels.is_contiguous()
    first = 0
    for index, height, width in zip(batch.index, batch.heights, batch.widths, strict=True):
        size = int(height * width * 3)
        pixels = batch.pixels[first : first + size].reshape(height, width, 3).numpy()
        np.testing.assert_array_equal(pixels, folder.read(int(index)))
        first += size
    assert first == batch.pixels.numel()


def test_the_bound_reaches_the_decoder(folder: FolderSource) -> None:
    batch = read_batch(folder, np.array([0, 15]), 5)
    # 8 x 30 stays, for half of 8 is below 5; 23 x 15 is halved.
    assert (batch.heights.tolist(), batch.widths.tolist()) == ([8, 12], [30, 8])


def test_arrays_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 5, 3), np.uint8)
    source = ArraySource(images, None, "x")
    monkeypatch.setattr(source, "read", None)
    for _, batch in loader(source, workers=2):
        expected = images[batch.index]
        np.testing.assert_array_equal(batch.pixels.numpy().reshape(expected.shape), expected)
        assert set(batch.heights.tolist()) == {4} and set(batch.widths.tolist()) == {5}


# Workers


@pytest.fixture(scope="module")
def straight(folder: FolderSource) -> list[tuple[int, Batch]]:
    return list(loader(folder))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers(
    folder: FolderSource, straight: list[tuple[int, Batch]], workers: int
) -> None:
    assert len(straight) == 8 and any(batch.bad for _, batch in straight)
    assert_same(straight, list(loader(folder, workers=workers)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [2, 5, 8])
def test_any_step_to_start_from(
    folder: FolderSource, straight: list[tuple[int, Batch]], workers: int, start: int
) -> None:
    assert_same(straight[start:], list(loader(folder, workers=workers, start_step=start)))


def test_loading_draws_nothing_from_the_process_s_generator(folder: FolderSource) -> None:
    before = torch.get_rng_state()
    list(loader(folder, workers=1))
    assert torch.equal(before, torch.get_rng_state())


def processes() -> list[int]:
    """The workers of this process: descendants that are not its direct children."""
    tree: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                tree.setdefault(int(fields[1]), []).append(int(entry.name))
    children = tree.get(os.getpid(), [])
    return [grandchild for child in children for grandchild in tree.get(child, [])]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_writing(pid: int) -> bool:
    """Whether one of a process's threads waits for room in a pipe."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return any("pipe_write" in (task / "wchan").read_text() for task in tasks)


def wait_for_none(seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while processes() and time.monotonic() < end:
        time.sleep(0.02)
    assert processes() == []


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_workers_are_single_threaded_and_ignore_ctrl_c(
    folder: FolderSource, straight: list[tuple[int, Batch]]
) -> None:
    stream = iter(loader(folder, workers=2))
    arrived = [next(stream)]
    pids = processes()
    assert len(pids) == 2
    for pid in pids:
        names = {(t / "comm").read_text() for t in Path(f"/proc/{pid}/task").iterdir()}
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        # Besides the main one: the watch on the parent, multiprocessing's queue feeder and its
        # server of shared memory.
        assert threads <= 4, names
        os.kill(pid, signal.SIGINT)
    assert_same(straight, arrived + list(stream))
    wait_for_none()


@linux
@pytest.mark.parametrize("end", ["close", "generator", "exception", "second pass", "forgotten"])
def test_workers_end_with_their_reader(folder: FolderSource, end: str) -> None:
    made = loader(folder, workers=2)
    stream = iter(made)
    next(stream)
    assert len(processes()) == 2
    if end == "close":
        made.close()
        assert list(stream) == []
    elif end == "generator":
        stream.close()  # type: ignore[attr-defined]
    elif end == "exception":
        with pytest.raises(KeyboardInterrupt) as caught:
            stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
        wait_for_none()  # although the traceback still holds everything
        assert caught.tb
    elif end == "second pass":
        again = iter(made)
        assert next(again)[0] == 0 and len(processes()) == 2
        made.close()
    else:
        del stream, made
    wait_for_none()


@linux
def test_after_a_killed_worker_loading_goes_on(
    folder: FolderSource, straight: list[tuple[int, Batch]]
) -> None:
    told: list[str] = []
    stream = iter(loader(folder, workers=2, log=told.append))
    arrived = [next(stream)]
    os.kill(processes()[0], signal.SIGKILL)
    assert_same(straight, arrived + list(stream))
    assert len(told) == 1
    assert re.fullmatch(r"a worker ended .*data\.workers, now 2.*started again", told[0])
    wait_for_none()


@linux
@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_that_ends_its_worker_twice_is_reported(
    folder: FolderSource, straight: list[tuple[int, Batch]], workers: int
) -> None:
    """As an image does on which a decoder crashes."""
    deadly = Deadly(folder, straight[3][1].index[0])
    told: list[str] = []
    made = loader(deadly, workers=workers, log=told.append)
    arrived: list[tuple[int, Batch]] = []
    with pytest.raises(MocokitError, match=r"a worker ended .*data\.workers") as caught:
        for item in made:
            arrived.append(item)
    wait_for_none()  # although the traceback still holds everything
    assert caught.tb and told
    assert_same(straight[: len(arrived)], arrived)
    assert len(arrived) <= 3  # a batch made before may be lost with its process


@linux
@pytest.mark.parametrize("victim", ["mid-message", "all", "their server"])
def test_whatever_is_killed_loading_goes_on(victim: str) -> None:
    """Messages of 100 KB do not fit into a pipe: a process is still writing when it is killed."""
    source = Plain(20_000)
    options: Any = {"batch_size": 4096, "epochs": 2}
    straight = list(loader(source, **options))
    told: list[str] = []
    stream = iter(loader(source, workers=2, log=told.append, **options))
    arrived = [next(stream)]
    end = time.monotonic() + 20
    blocked: list[int] = []
    while not blocked and time.monotonic() < end:
        blocked = [pid for pid in processes() if is_writing(pid)]
        time.sleep(0.05)
    assert blocked
    server = parent_of(blocked[0])
    chosen = {"mid-message": blocked, "all": processes(), "their server": [server]}[victim]
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)
    assert_same(straight, arrived + list(stream))
    # Without their server the processes live on, and may be done before anybody looks.
    assert len(told) == 1 or (victim == "their server" and not told)
    assert all(text.startswith("a worker ended") for text in told)
    wait_for_none()


@linux
@pytest.mark.parametrize("end", ["a process", "the start"])
def test_scoring_goes_on_too(
    folder: FolderSource,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    wanted = np.arange(20)
    straight = list(read_batches(folder, wanted, 3, None))
    start, starts = workers_module._start, []

    def started(*arguments: Any) -> Any:
        starts.append(arguments)
        if end == "the start" and len(starts) == 1:
            raise EOFError  # as when the server of processes is killed before it has answered
        return start(*arguments)

    monkeypatch.setattr(workers_module, "_start", started)
    stream = read_batches(folder, wanted, 3, None, workers=2)
    arrived = [next(stream)]
    if end == "a process":
        os.kill(processes()[1], signal.SIGKILL)
    arrived += list(stream)
    assert_same(list(enumerate(straight)), list(enumerate(arrived)))
    assert len(starts) == 2 and len(caplog.messages) == 1
    assert caplog.messages[0].endswith("all workers are started again")


class Plain:
    """Images of one pixel each, their number."""

    name = "plain"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, index: int, bound: int | None = None) -> Any:
        return np.full((1, 1, 3), index % 251, np.uint8)


class Deadly:
    """The source, but who reads one of its images is killed."""

    def __init__(self, source: FolderSource, deadly: int) -> None:
        self.source, self.deadly = source, int(deadly)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # pickle asks before there is one
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, bound: int | None = None) -> Any:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(index, bound)


@linux
def test_loading_processes_do_not_see_what_asks_a_run_to_stop(folder: FolderSource) -> None:
    """Schedulers and terminals signal every process of a job, also while it starts.

    In a process that has started no other before.
    """
    script = (
        "import os, signal, threading, time\nfrom mocokit.data.open import open_data\n"
        "from mocokit.data.loader import *\n"
        f"source = open_data({str(folder.root)!r}).train\n"
        "numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)\n"
        "for number in numbers:\n"
        "    signal.signal(number, lambda *_: None)\n"
        "over = threading.Event()\n"
        "def ask():\n"
        "    while not over.wait(0.005):\n"
        "        for number in numbers:\n"
        "            os.killpg(0, number)\n"
        "asking = threading.Thread(target=ask, daemon=True)\n"
        "asking.start()\n"
        "made = Loader(source, seed=0, batch_size=4, epochs=9, last='keep', bound=None,"
        " workers=2)\n"
        "print(len(list(made)))\n"
        "over.set()\n"
        "asking.join()\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, start_new_session=True, timeout=100
    )
    assert (done.stdout, done.stderr) == ("45\n", "")


@linux
def test_workers_end_when_the_training_process_is_killed(folder: FolderSource) -> None:
    script = (
        "import sys\nfrom mocokit.data.open import open_data\nfrom mocokit.data.loader import *\n"
        f"source = open_data({str(folder.root)!r}).train\n"
        "made = iter(Loader(source, seed=0, batch_size=4, epochs=9, last='keep', bound=None,"
        " workers=1))\n"
        "next(made); print('started', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.kill()
    process.wait()
    # The pipe's other end is held by the server and the worker: it closes when the last has ended.
    started = time.monotonic()
    assert process.stdout.read() == b"" and time.monotonic() - started < 20
    process.stdin.close()
    process.stdout.close()


@linux
def test_a_script_ends_that_leaves_a_pass_open(folder: FolderSource) -> None:
    script = (
        "from mocokit.data.open import open_data\nfrom mocokit.data.loader import *\n"
        f"source = open_data({str(folder.root)!r}).train\n"
        "made = iter(Loader(source, seed=0, batch_size=4, epochs=9, last='keep', bound=None,"
        " workers=2))\n"
        "print(next(made)[0])\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_script_without_a_guard_is_not_run_again(folder: FolderSource, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "print('once')\nfrom mocokit.data.open import open_data\n"
        "from mocokit.data.loader import Loader\n"
        f"source = open_data({str(folder.root)!r}).train\n"
        "steps = Loader(source, seed=0, batch_size=4, epochs=1, last='keep', bound=None,"
        " workers=1)\n"
        "print(sum(len(batch.index) for _, batch in steps))\n"
    )
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("once\n20\n", "")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A user's script, as if this process ran it, that defines a source of its own."""
    text = """
        class Mine:
            name = "mine"

            def __len__(self):
                return 7

            def read(self, index, bound=None):
                import numpy
                return numpy.full((1, 1, 3), index, numpy.uint8)

        if __name__ == "__main__":
            raise AssertionError("trains")
    """
    (tmp_path / "own.py").write_text(textwrap.dedent(text))
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "own.py")
    main.__spec__ = None  # which python gives a script
    exec(textwrap.dedent(text).partition("if __name__")[0], main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    return main


def test_a_script_may_define_its_own_source(script: ModuleType) -> None:
    """Workers import the script for it, under another name than that which its guard asks for."""
    batches = [batch for _, batch in loader(script.Mine(), epochs=1, workers=1)]
    assert sorted(number for batch in batches for number in batch.index.tolist()) == [*range(7)]
    for batch in batches:
        assert (batch.pixels.reshape(-1, 3).numpy() == batch.index[:, None]).all()


def test_only_what_the_script_defines_needs_it(folder: FolderSource, script: ModuleType) -> None:
    own = script.Mine()
    for content in (own, type(own), {"in": [own]}, partial(read_batch, own), (folder, own)):
        assert Packed(content).needs_main
    for content in (folder, Plain(3), partial(read_batch, folder), 3, None):
        assert not Packed(content).needs_main


# What does not fit


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [1, 3, 4096])
def test_a_batch_is_shared_where_two_of_every_worker_fit(
    monkeypatch: pytest.MonkeyPatch, workers: int, size: int
) -> None:
    """Each worker makes one while its last one is read; what does not fit ends it by a signal."""
    monkeypatch.setattr(
        torch.utils.data, "get_worker_info", lambda: SimpleNamespace(num_workers=workers)
    )
    for free in (0, size, 2 * size, workers * size, 2 * workers * size):
        monkeypatch.setattr(batch_module, "free_shared_memory", lambda free=free: free)
        room = batch_module._room(size)
        assert (room.shape, room.dtype) == ((size,), torch.uint8) and not room.is_shared()
    monkeypatch.setattr(batch_module, "free_shared_memory", lambda: 2 * workers * size + 1)
    room = batch_module._room(size)
    assert (room.shape, room.dtype) == ((size,), torch.uint8) and room.is_shared()
    assert not batch_module._room(0).is_shared()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: None)  # not a worker
    assert not batch_module._room(size).is_shared()


@pytest.mark.parametrize("free, shared", [(0, False), (1000, False), (2000, False), (2049, True)])
def test_what_workers_read_is_shared_where_it_fits_twice(
    monkeypatch: pytest.MonkeyPatch, free: int, shared: bool
) -> None:
    monkeypatch.setattr(sharing_module, "free_shared_memory", lambda: free)
    numbers = np.arange(1024, dtype=np.uint8)
    packed = Packed(numbers)
    assert packed._memory.is_shared() == shared
    np.testing.assert_array_equal(packed.content, numbers)
    assert not Packed(3)._memory.is_shared()  # without arrays there is nothing to share


def test_arrays_of_a_packed_object_are_shared_and_equal(folder: FolderSource) -> None:
    packed = Packed(folder)
    assert packed._memory.is_shared() and not packed.needs_main
    assert folder.names.text.tobytes() not in packed._body
    again = packed.content
    assert again.fingerprint == folder.fingerprint and again.names[7] == folder.names[7]
    assert again.names.ends.ctypes.data % 64 == 0
    assert Packed(3).content == 3


def test_without_shared_memory_batches_come_through_a_pipe(
    folder: FolderSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(num_workers=2)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)
    answers = workers_module._Answers(Packed(_first_three))
    plain = answers[folder]
    for module in (sharing_module, batch_module):
        monkeypatch.setattr(module, "free_shared_memory", lambda: 100)
    piped = answers[folder]
    assert isinstance(plain, Batch) and isinstance(piped, workers_module._Piped)
    assert piped.batch.pixels.numel() == 0
    arrived = workers_module._receive(iter([piped]), False)
    assert arrived
    assert_same([(0, plain)], [(0, arrived)])
    assert not Packed(folder)._memory.is_shared()
    assert Packed(folder).content.fingerprint == folder.fingerprint


def _first_three(source: FolderSource) -> Batch:
    return read_batch(source, np.arange(3), None)


# Bad images


def test_bad_images_are_replaced_and_named(folder: FolderSource) -> None:
    made = loader(folder, batch_size=20, epochs=6)
    for epoch, batch in made:
        order = chance.Order(5, epoch, 20)[np.arange(20)]
        assert len(batch.index) == 20 and not set(batch.index.tolist()) & set(BAD)
        assert {number for number, _, _ in batch.bad} == set(BAD)
        kept = ~np.isin(order, BAD)
        np.testing.assert_array_equal(batch.index[kept], order[kept])
        for number, name, reason in batch.bad:
            assert name == f"{number:02}.png"
            assert ("empty" if number == 3 else "not an image") in reason
    substitutes = {
        tuple(batch.index[np.isin(chance.Order(5, e, 20)[np.arange(20)], BAD)].tolist())
        for e, batch in made
    }
    assert len(substitutes) > 3  # drawn anew in every epoch


def test_a_substitute_does_not_depend_on_the_batch(folder: FolderSource) -> None:
    def stand_ins(batch_size: int) -> dict[tuple[int, int], int]:
        found = {}
        made = loader(folder, batch_size=batch_size)
        for step, batch in made:
            window = made.window(step)
            asked = chance.Order(5, window.epoch, 20)[np.arange(window.first, window.last)]
            for one, got in zip(asked.tolist(), batch.index.tolist(), strict=True):
                found[window.epoch, one] = got
        return found

    assert stand_ins(6) == stand_ins(20) == stand_ins(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_images_end_the_run_in_one_sentence(tmp_path: Path, workers: int) -> None:
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"100 images .* in a row cannot be read") as caught:
        list(loader(open_data(tmp_path).train, workers=workers))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_bad_image_never_stands_in_for_itself(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"junk")
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    for _, batch in loader(open_data(tmp_path).train, epochs=12):
        assert batch.index.tolist() == [1, 1]
        assert [number for number, _, _ in batch.bad] == [0]


def test_the_only_image_is_its_own_substitute(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"junk")
    with pytest.raises(UserError, match="in a row"):
        loader(open_data(tmp_path).train).batch_at(0)


class Broken:
    """A source with a fault of our own: it must not look like a bad image or a dead worker."""

    name, labels, classes, fingerprint = "broken", None, (), "0"

    def __init__(self, fault: type[Exception]) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 4

    def read(self, index: int, bound: int | None = None) -> Any:
        raise self.fault("our own fault")

    def describe(self, index: int) -> str:
        return "x"


@pytest.mark.parametrize("fault", [RuntimeError, EOFError, ConnectionResetError])
@pytest.mark.parametrize("workers", [0, 1])
def test_other_faults_are_raised_as_they_are(workers: int, fault: type[Exception]) -> None:
    with pytest.raises(fault, match="our own fault"):
        list(loader(Broken(fault), workers=workers))


# Reading without training


def test_read_batch_leaves_bad_images_out(folder: FolderSource) -> None:
    batch = read_batch(folder, np.array([5, 3, 2, 5]), None)
    assert batch.index.tolist() == [5, 2, 5] and batch.heights.tolist() == [13, 10, 13]
    assert batch.bad == ((3, "03.png", "the file is empty"),)
    assert read_batch(folder, np.array([3]), None).pixels.numel() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_read_batches_keeps_the_order(folder: FolderSource, workers: int) -> None:
    wanted = np.array([9, 3, 0, 0, 17, 12, 5])
    batches: Iterator[Batch] = read_batches(folder, wanted, 3, None, workers)
    assert [batch.index.tolist() for batch in batches] == [[9, 0], [0, 17, 12], [5]]


def test_batches_can_be_pinned(folder: FolderSource) -> None:
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a CUDA device")
    for workers in (0, 1):
        for _, batch in loader(folder, workers=workers, pin=True):
            assert isinstance(batch, Batch) and batch.pixels.is_pinned()
