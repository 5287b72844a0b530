"""A folder that changes under a run: the run goes on, on the images that it began with."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import mocokit
from mocokit.data.index import load_index
from mocokit.data.open import open_data
from mocokit.engine import checkpoint
from mocokit.errors import Interrupted, UserError
from mocokit.run import build as mocokit_build
from mocokit.run.state import RunState

SETTINGS = {
    "engine.threads": 1,
    "save.every_steps": 1,
    "log.every_steps": 1,
    "data.workers": 0,
    "data.last": "keep",
}


def run(data, out, **settings):
    changes = SETTINGS | settings
    return mocokit.pretrain("demo", data, out, epochs=2, batch_size=32, settings=changes)


@pytest.fixture
def stopped(photos, tmp_path, monkeypatch):
    """A run of 6 steps, interrupted after the second; its folder, and that of its images."""
    folder, out = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, folder)

    write = RunState.save

    def save(job):
        write(job)
        if job.step == 2:
            raise Interrupted("stopped", 75)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", save)
        with pytest.raises(Interrupted):
            run(folder, out)
    assert checkpoint.steps(out / "checkpoints")[-1] == 2
    return folder, out


def test_missing_images_are_bad_and_new_ones_ignored(stopped, capsys):
    folder, out = stopped
    before = load_index(out / "images.idx")
    gone = sorted(path for path in folder.iterdir() if path.is_file())[:3]
    for path in gone:
        path.unlink()
    for number in range(20):
        Image.new("RGB", (40, 40)).save(folder / f"0{number}.png")
    capsys.readouterr()
    run(folder, out)
    said = capsys.readouterr().err
    assert "3 of the run's images are gone, and count as bad and 20 new ones are ignored" in said
    assert "resumed after step 2 of 6" in said
    after = load_index(out / "images.idx")
    assert after.fingerprint == before.fingerprint and after.length == 80
    named = (out / "bad_images.txt").read_text()
    for path in gone:
        assert path.name in named and "no longer" in named
    state = checkpoint.load(out / "last.pt")
    assert state["step"] == 6 and len(state["bad_images"]) == 3


def test_the_numbers_of_the_images_stay(stopped, tmp_path):
    """New images that sort before all others change nothing: bit for bit the undisturbed run."""
    folder, out = stopped
    other = tmp_path / "undisturbed"
    shutil.copytree(out, other)
    run(folder, other)
    for number in range(20):
        Image.new("RGB", (40, 40)).save(folder / f"0{number}.png")
    run(folder, out)
    one, two = (checkpoint.load(place / "last.pt")["method"] for place in (out, other))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_resume_finds_the_run_of_a_changed_folder(stopped, tmp_path, monkeypatch):
    folder, out = stopped
    monkeypatch.chdir(tmp_path)
    out.parent.joinpath("runs").mkdir()
    shutil.move(out, tmp_path / "runs/demo-photos-001")
    Image.new("RGB", (40, 40)).save(folder / "000.png")
    options = {"epochs": 2, "batch_size": 32, "settings": SETTINGS}
    done = mocokit.pretrain("demo", folder, resume=True, **options)
    assert done.folder.name == "demo-photos-001"


def test_other_images_are_still_another_run(stopped):
    folder, out = stopped
    for path in list(folder.rglob("*.jpg")):
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(UserError, match="the data's images"):
        run(folder, out)


@pytest.fixture
def classed(tmp_path, photos):
    """train/ and val/ of three classes."""
    folder, files = tmp_path / "classed", sorted(photos.rglob("*.jpg"))
    for number, file in enumerate(files):
        place = folder / ("val" if number >= 64 else "train") / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return folder


@pytest.mark.parametrize("sides", [["train"], ["train", "val"]])
def test_a_class_that_vanishes_leaves_the_others_their_numbers(
    classed, tmp_path, monkeypatch, sides
):
    out, seen = tmp_path / "run", []
    write, build = RunState.save, mocokit_build.build_monitor

    def save(job):
        write(job)
        if job.step == 2:
            raise Interrupted("stopped", 75)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", save)
        with pytest.raises(Interrupted):
            run(classed, out)
    before = open_data(classed).validation
    expected = {before.describe(i): before.classes[n] for i, n in enumerate(before.labels)}
    for side in sides:
        shutil.rmtree(classed / side / "b")
    if sides == ["train"]:
        with pytest.raises(UserError, match="class b to validate on that no training image has"):
            run(classed, tmp_path / "anew")
    with monkeypatch.context() as patch:
        patch.setattr(
            mocokit_build,
            "build_monitor",
            lambda settings, splits, device: seen.append(splits) or build(settings, splits, device),
        )
        done = run(classed, out, **{"data.bad_share": 0.9})
    train, validation = seen[-1]
    assert train.classes == validation.classes == ("a", "b", "c")
    assert set(train.labels) == {0, 1, 2}
    found = {validation.describe(i): validation.classes[n] for i, n in enumerate(validation.labels)}
    assert found == {name: expected[name] for name in found}
    assert ("b" in found.values()) == (sides == ["train"])
    assert "knn_backbone" in done.result


@pytest.mark.parametrize("every", [1, None])
def test_too_many_missing_images_end_the_run_with_the_remedy(stopped, every):
    """They are met in the middle of an epoch, where no checkpoint is due if not after each step."""
    folder, out = stopped
    for path in sorted(folder.rglob("*.jpg"))[:20]:
        path.unlink()
    said = r"more than the limit of 10; .* --set data\.bad_share"
    with pytest.raises(UserError, match=said):
        run(folder, out, **{"save.every_steps": every})
    saved = checkpoint.steps(out / "checkpoints")[-1]
    lines = (out / "metrics.jsonl").read_text()
    assert saved > 2 and f'"step": {saved},' in lines.splitlines()[-1]  # nothing is lost
    assert saved % 3 != 0 and checkpoint.load(out / "last.pt")["step"] == saved
    with pytest.raises(UserError, match=said):
        run(folder, out)
    assert (out / "metrics.jsonl").read_text() == lines
    assert run(folder, out, **{"data.bad_share": 0.5}).folder == out


def family(pid):
    """A process and all that it started and that still run."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def left_behind(pids):
    """Files of shared memory that these processes made: torch names them torch_<pid>_..."""
    return [p.name for p in Path("/dev/shm").glob("torch_*") if int(p.name.split("_")[1]) in pids]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /dev/shm")
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL]
)
def test_nothing_is_left_in_shared_memory_nor_running(photos, tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mocokit", "pretrain", "demo", str(photos), "--out", str(out)]
    command += ["--set", "data.workers=2", "--set", "log.every_steps=1", "--epochs", "100000"]
    command += ["--batch-size", "32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    pids = family(process.pid)
    assert len(pids) >= 4  # itself, the server, two workers
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    process.stderr.read()  # ends when the last process that holds it has ended
    process.wait()
    assert time.monotonic() < end
    process.stderr.close()
    assert left_behind(pids) == []
