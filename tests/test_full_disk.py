"""The system refuses to write, anywhere below a run folder: one sentence, and nothing is lost.

An audit hook makes the n-th attempt to open, rename, link, make or delete something in the folder
fail; a limit on file sizes stops a write in the middle. The run that is repeated afterwards must be
the one that nothing stopped, bit for bit.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest

import mocokit
from mocokit.engine import checkpoint
from mocokit.engine.world import World
from mocokit.errors import MocokitError
from mocokit.run.state import RunState

SETTINGS = {
    "engine.threads": 1,
    "engine.precision": "float32",
    "net.backbone": "resnet_tiny",
    "data.workers": 0,
    "save.every_steps": 2,
    "save.keep": 2,
    "log.every_steps": 1,
    "monitor.every_epochs": 0,
}
EVENTS = {"open", "os.mkdir", "os.rename", "os.symlink", "os.remove"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CLOCKS = {"images_per_s", "data_wait", "peak_memory_gib"}


class Refusals:
    """The attempts below a folder, and the number of the one that fails, with all after it."""

    def __init__(self):
        self.folder = None
        sys.addaudithook(self._audit)  # which stays until the process ends

    @contextlib.contextmanager
    def below(self, folder, number=None, reason=errno.ENOSPC, last=None):
        self.count, self.number, self.reason = 0, number, reason
        self.last = last  # of the attempts that fail; None: all that come
        self.folder = os.path.realpath(folder)
        try:
            yield self
        finally:
            self.folder = None

    def _audit(self, event, arguments):
        if self.folder is None or event not in EVENTS:
            return
        path = arguments[1] if event in ("os.rename", "os.symlink") else arguments[0]
        if event == "open" and not (arguments[2] or 0) & WRITES:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path)))) + "/"
        if not path.startswith(self.folder + "/"):
            return
        self.count += 1
        if self.number is not None and self.number <= self.count <= (self.last or self.count):
            raise OSError(self.reason, os.strerror(self.reason), os.fsdecode(arguments[0]))


REFUSALS = Refusals()


def run(data, out):
    return mocokit.pretrain("demo", data, out, epochs=1, batch_size=32, settings=SETTINGS)


def left(folder):
    """All that counts in a run folder: the state, the lines without clocks, the backbone."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]
    state = checkpoint.load(folder / "last.pt")
    return checkpoint.digest(state), lines, (folder / "backbone.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(toy_npz, tmp_path_factory):
    """A finished run, and how many attempts to write it makes."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with REFUSALS.below(folder) as seen:
        run(toy_npz, folder)
    return left(folder), seen.count


def stopped_and_repeated(data, folder, expected, number, reason, last=None):
    """Whether the refusal ended the run; in any case the run is whole in the end."""
    error = None
    with REFUSALS.below(folder, number, reason, last):
        try:
            run(data, folder)
        except MocokitError as caught:
            error = caught
    if error is not None:
        assert os.strerror(reason) in str(error) and "\n" not in str(error)
        assert str(folder) in str(error)
    steps = checkpoint.steps(folder / "checkpoints")
    for step in steps:
        checkpoint.load(folder / "checkpoints" / checkpoint.name_of(step))
    run(data, folder)
    assert left(folder) == expected, (number, error)
    assert not list(folder.rglob("*.partial*"))
    return error is not None


def spread(count, number):
    return [1 + place * (count - 1) // (number - 1) for place in range(number)]


def test_a_refused_write_is_a_sentence_and_loses_nothing(toy_npz, tmp_path, straight):
    expected, count = straight
    assert count > 30
    reasons = [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO]
    ended = 0
    for place, number in enumerate(spread(count, 6)):
        folder = tmp_path / str(number) / "run"
        ended += stopped_and_repeated(toy_npz, folder, expected, number, reasons[place % 4])
    assert ended >= 5


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["from-then-on", "once"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_every_refused_write(toy_npz, tmp_path, straight, reason, last):
    expected, count = straight
    for number in range(1, count + 1):
        folder = tmp_path / str(number) / "run"
        until = number if last else None
        stopped_and_repeated(toy_npz, folder, expected, number, reason, until)
        shutil.rmtree(folder.parent)


def limited(data, folder, limit):
    """What a run says that may write no file larger than `limit` bytes; empty: it finished."""
    import resource

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                run(data, folder)
            except MocokitError as error:
                os.write(writer, str(error).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit on file sizes is set in a child")
@pytest.mark.parametrize(
    ("limit", "name"),
    [
        (1000, "config.yaml"),
        (2000, "metrics.jsonl|step-"),
        (200_000, "step-00000002.pt"),
    ],
)
def test_a_disk_that_fills_up_in_the_middle_of_a_file(toy_npz, tmp_path, straight, limit, name):
    folder = tmp_path / "run"
    text = limited(toy_npz, folder, limit)
    assert re.search(f"^cannot write .*({name}).*File too large", text) and "\n" not in text
    assert not list(folder.rglob("*.partial*"))
    run(toy_npz, folder)
    assert left(folder) == straight[0]


@pytest.mark.parametrize("half", [False, True], ids=["nothing", "half-a-line"])
@pytest.mark.parametrize("line", [1, 3, 5])
def test_a_line_that_cannot_be_written_is_saved(toy_npz, tmp_path, straight, line, half):
    """The step is saved with its line: nothing is trained again, and no line is missing."""
    write, count = os.write, 0

    def failing(number, data):
        nonlocal count
        if bytes(data).startswith(b'{"step"'):
            count += 1
            if count == line:
                write(number, bytes(data)[: len(data) // 2 if half else 0])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(number, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", failing)
        with pytest.raises(MocokitError, match=r"cannot write .*metrics.jsonl \(No space left"):
            run(toy_npz, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run/checkpoints")[-1] == line
    for _ in range(2):  # from the same checkpoint again: the line is there once
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunState, "save", stop_at_once)
            with contextlib.suppress(KeyboardInterrupt):
                run(toy_npz, tmp_path / "run")
    run(toy_npz, tmp_path / "run")
    assert left(tmp_path / "run") == straight[0]


def stop_at_once(self):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("processes", "step", "saved", "saves"),
    [
        (1, 0, -1, False),
        (1, 1, -1, True),
        (1, 1, 0, True),
        (1, 3, 3, False),
        (1, 4, 3, True),
        (2, 4, 3, False),
    ],
)
def test_what_was_trained_is_saved_before_an_error_ends_the_run(processes, step, saved, saves):
    """Not by one of several processes, for which the others would have to wait."""
    done, told = [], []
    state = SimpleNamespace(
        world=World(0, processes), step=step, saved=saved, save=lambda: done.append(step),
        console=SimpleNamespace(note=told.append),
    )  # fmt: skip
    with pytest.raises(MocokitError, match="the disk"), RunState.between_steps(state):
        raise MocokitError("the disk")
    assert bool(done) == bool(told) == saves
