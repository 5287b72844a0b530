"""A checkpoint says whose it is; what was saved is there; a folder that changes is noticed."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_contract import interrupted_at
from test_full_disk import SETTINGS, left

import mocokit
from mocokit.data.open import open_data
from mocokit.data.sources.folder import open_folder
from mocokit.engine import checkpoint, identity
from mocokit.engine.finite import check_progress
from mocokit.engine.folder import RunFolder, locked
from mocokit.engine.optim import build_optimizer
from mocokit.engine.record import read_metrics
from mocokit.errors import Interrupted, MocokitError, NonFiniteLoss, UserError
from mocokit.methods.moco import MoCo
from mocokit.run import marks
from mocokit.run.state import RunState


def run(data, out, **settings):
    changes = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    return mocokit.pretrain("demo", data, out, epochs=1, batch_size=32, settings=changes)


def stop(data, out, after=2, **settings):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, MoCo, after)
        run(data, out, **settings)


def at(folder, step):
    return folder / "checkpoints" / checkpoint.name_of(step)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 64 images."""
    folder, draw = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(64):
        pixels = draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(images, folder, save__every_steps=1)
    return left(folder)


@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory):
    """A run of 2 steps that was stopped after the first."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop(images, folder, 0, save__every_steps=1)
    return folder


@pytest.fixture
def copied(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))


def changed(state, label, name):
    """A state and a label as another run would have them."""
    if name in ("run", "start"):
        return state, label | {name: "f" * 16}
    if name == "fingerprint":
        return state | {name: "f" * 32}, label
    before, after = {
        "seed": ("seed: 0", "seed: 7"),
        "lr": ("lr: 0.002", "lr: 0.5"),
        "unreadable": ("seed:", "seed: ["),
    }[name]
    assert before in state["settings"]
    return state | {"settings": state["settings"].replace(before, after, 1)}, label


OTHERS = {
    "run": "the run's own number",
    "start": "the weights that it began with",
    "fingerprint": "the data's images",
    "seed": r"seed \(7 there, 0 here\)",
    "lr": r"optim.lr \(0.5 there, 0.002 here\)",
    "unreadable": "its settings, which cannot be read",
}


def written_by_another(folder, name, step):
    state, label = checkpoint.load(at(folder, 1)), checkpoint.label_of(at(folder, 1))
    state, label = changed(state, label, name)
    checkpoint.save(folder / "checkpoints", step, state | {"step": step}, label)


@pytest.mark.parametrize("name", OTHERS)
def test_another_runs_checkpoint_is_refused_and_named(copied, images, name):
    written_by_another(copied, name, 2)
    at(copied, 1).unlink()
    before = sorted(copied.rglob("*"))
    with pytest.raises(UserError, match=f"step-00000002.pt is a checkpoint .* {OTHERS[name]}"):
        run(images, copied)
    assert sorted(copied.rglob("*")) == before  # nothing was renamed: a new start would lose it


def test_another_runs_checkpoint_is_set_aside_where_there_is_an_own_one(
    copied, images, capsys, straight
):
    written_by_another(copied, "seed", 2)
    run(images, copied, save__every_steps=1)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "seed (7 there, 0 here)" in told and "now called step-00000002.pt.other-run" in told
    assert (copied / "checkpoints/step-00000002.pt.other-run").is_file()
    assert left(copied) == straight


def test_a_folder_that_lost_its_number_goes_on_under_that_of_its_checkpoint(
    copied, images, straight, capsys
):
    before = identity.read(copied / "run.json").label
    (copied / "run.json").write_text("{")
    run(images, copied, save__every_steps=1)
    assert "run.json was missing" in capsys.readouterr().err.replace("\n", " ")
    assert identity.read(copied / "run.json").label == before
    assert checkpoint.label_of(at(copied, 2)) == before | {"step": 2}
    assert left(copied) == straight


def test_equal_runs_have_equal_states_and_numbers_of_their_own(copied, stopped, tmp_path, images):
    stop(images, tmp_path / "again", 0, save__every_steps=1)
    one, two = checkpoint.load(at(stopped, 1)), checkpoint.load(at(tmp_path / "again", 1))
    assert checkpoint.digest(one) == checkpoint.digest(two)
    labels = [checkpoint.label_of(at(folder, 1)) for folder in (stopped, tmp_path / "again")]
    assert labels[0]["run"] != labels[1]["run"] and labels[0]["start"] == labels[1]["start"]
    shutil.copy(at(tmp_path / "again", 1), at(copied, 1))
    with pytest.raises(UserError, match="differs in the run's own number"):
        run(images, copied)


# What a damaged file looks like; of each the run must resume from the one before.
DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "without end": lambda content: content[:-30],
    "zeros": lambda content: bytes(len(content)),
    "flipped": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "text": lambda content: b"not a checkpoint\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_next_is_kept(tmp_path, damage):
    """With one checkpoint kept, an old milestone, and damage in the newest."""
    folder, told = tmp_path / "checkpoints", []
    for step in (1, 9):
        checkpoint.save(folder, step, {"x": torch.randn(2000)})
    path = folder / checkpoint.name_of(9)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert checkpoint.is_saved(folder, 9) == (damage == "flipped")
    assert checkpoint.load_newest(folder, log=told.append)["step"] == 1
    assert path.with_name(f"{path.name}.damaged").is_file() and path.name in told[0]
    assert os.readlink(tmp_path / "last.pt") == "checkpoints/step-00000001.pt"
    checkpoint.save(folder, 2, {"x": torch.ones(2)})
    checkpoint.prune(folder, 1, frozenset({1}), newest=2)
    assert checkpoint.steps(folder) == [1, 2] and checkpoint.load(tmp_path / "last.pt")["step"] == 2


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_pruning_never_takes_what_was_just_written(tmp_path, keep):
    """Files with higher numbers that cannot be renamed, or came in meanwhile, count for nothing."""
    folder = tmp_path / "c"
    for step in (3, 4, 50, 60, 70):
        checkpoint.save(folder, step, {})
    checkpoint.save(folder, 5, {})
    checkpoint.prune(folder, keep, newest=5)
    assert checkpoint.steps(folder) == [*[3, 4, 5][-keep:], 50, 60, 70]


def test_a_deleted_run_folder_is_not_made_again(tmp_path):
    with pytest.raises(MocokitError, match="cannot write .*step-00000001.pt .No such file"):
        checkpoint.save(tmp_path / "deleted" / "checkpoints", 1, {})
    assert not (tmp_path / "deleted").exists()


def test_a_renamed_checkpoint_is_not_taken_for_another_step(copied, images):
    os.replace(at(copied, 1), at(copied, 2))
    assert not checkpoint.is_saved(copied / "checkpoints", 2)
    with pytest.raises(UserError, match="does not hold the step that its name says"):
        run(images, copied)


FORGED = {  # with a checksum that is right
    "no method": lambda state: state.pop("method"),
    "no optimizer": lambda state: state.pop("optimizer"),
    "no scaler": lambda state: state.pop("scaler"),
    "no bad images": lambda state: state.pop("bad_images"),
    "a tensor less": lambda state: state["method"].pop("encoder.head.0.weight"),
    "a list of tensors": lambda state: state.update(method=[torch.ones(2)]),
    "an optimiser of another shape": lambda state: forge_momentum(state, torch.ones(1)),
    "an optimiser of text": lambda state: forge_momentum(state, "x"),
    "a scale of text": lambda state: state.update(scaler={"scale": "x"}),
    "a number for the scaler": lambda state: state.update(scaler=7),
    "an image too many": lambda state: state.update(bad_images=torch.tensor([[10**9, 0]])),
    "a step below zero": lambda state: state.update(bad_images=torch.tensor([[0, -5]])),
}


def forge_momentum(state, value):
    values = state["optimizer"]["state"][0]
    name = next(name for name, one in values.items() if torch.is_tensor(one) and one.ndim)
    values[name] = value


@pytest.mark.parametrize("forged", FORGED)
def test_a_state_that_does_not_fit_is_a_sentence(copied, images, forged):
    state = checkpoint.load(at(copied, 1))
    FORGED[forged](state)
    checkpoint.save(copied / "checkpoints", 1, state, checkpoint.label_of(at(copied, 1)))
    with pytest.raises(UserError, match="step-00000001.pt"):
        run(images, copied)


def test_several_damaged_ones_keep_names_of_their_own(tmp_path):
    folder = tmp_path / "c"
    for _ in range(3):
        checkpoint.save(folder, 1, {})
        checkpoint.save(folder, 2, {})
        (folder / checkpoint.name_of(2)).write_bytes(b"x")
        checkpoint.load_newest(folder)
    assert sorted(path.name for path in folder.glob("*.damaged*")) == [
        f"step-00000002.pt.damaged{ending}" for ending in ("", "-2", "-3")
    ]


def test_saved_is_said_of_what_is_there(tmp_path, monkeypatch):
    """A disk that takes a file and does not have it."""
    replace = os.replace

    def losing(source, target):
        replace(source, target)
        if str(target).endswith(".pt") and "step-" in str(target):
            os.truncate(target, 100)

    monkeypatch.setattr(os, "replace", losing)
    with pytest.raises(MocokitError, match="was written, and is not there"):
        checkpoint.save(tmp_path / "c", 1, {"x": torch.ones(2)})


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_disk_without_links_gets_a_copy(images, tmp_path, monkeypatch, reason):
    def refusing(*_, **__):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "symlink", refusing)
    out = tmp_path / "run"
    assert run(images, out, save__every_steps=1).result["finished"]
    last = out / "last.pt"
    assert not last.is_symlink()
    assert checkpoint.load(last)["step"] == 2 and not list(out.rglob("*.partial"))


# What happens to a folder, or to a part of it, while its run goes on; whether the run may go on.
def _moved(folder):
    os.rename(folder, folder.with_name("elsewhere"))


def _started_over(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / ".lock").touch()
    identity.write(identity.Identity(identity.new_number()), folder / "run.json")


def _linked_elsewhere(folder):
    _moved(folder)
    (folder.with_name("empty")).mkdir()
    folder.symlink_to("empty")


FATES = {
    "deleted": (shutil.rmtree, False),
    "moved": (_moved, False),
    "started over": (_started_over, False),
    "linked elsewhere": (_linked_elsewhere, False),
    "checkpoints deleted": (lambda folder: shutil.rmtree(folder / "checkpoints"), True),
    "lock deleted": (lambda folder: (folder / ".lock").unlink(), True),
    "settings deleted": (lambda folder: (folder / "config.yaml").unlink(), True),
    "index deleted": (lambda folder: (folder / "images.idx").unlink(), True),
    "number deleted": (lambda folder: (folder / "run.json").unlink(), True),
    "metrics deleted": (lambda folder: (folder / "metrics.jsonl").unlink(), True),
    "moved there and back": (
        lambda folder: (_moved(folder), os.rename(folder.with_name("elsewhere"), folder)),
        True,
    ),
}


@pytest.mark.parametrize("fate", FATES)
def test_a_folder_that_changes_under_a_living_run(images, tmp_path, monkeypatch, fate):
    """A run never makes its folder anew, and never writes into another run's."""
    happens, goes_on = FATES[fate]
    out, update = tmp_path / "run", MoCo.update

    stating, before = [out / name for name in ("config.yaml", "images.idx", "run.json")], {}

    def updating(self, keep, step, progress):
        update(self, keep, step, progress)
        if step == 1:
            before.update({path: path.read_bytes() for path in stating})
            happens(out)

    monkeypatch.setattr(MoCo, "update", updating)
    if goes_on:
        assert run(images, out, save__every_steps=1).result["finished"]
        assert {path: path.read_bytes() for path in stating} == before
        assert checkpoint.load(out / "last.pt")["step"] == 2
        steps = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        assert steps == ([2] if fate == "metrics deleted" else [1, 2])
        assert run(images, out, save__every_steps=1).result["finished"]  # it is a run still
        return
    with pytest.raises(MocokitError, match="was deleted, moved or replaced"):
        happens_then = happens

        def happens(folder):
            happens_then(folder)
            before.clear()
            before.update({path: path.stat().st_size for path in out.rglob("*")})

        run(images, out, save__every_steps=1)
    assert {path: path.stat().st_size for path in out.rglob("*")} == before


def test_a_deleted_lock_is_taken_again_and_keeps_others_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with locked(folder) as hold:
        identity.write(identity.Identity("a" * 16), folder.identity)
        hold.number = "a" * 16
        folder.lock.unlink()
        hold.check()
        with pytest.raises(UserError, match="another process is running"), locked(folder):
            pass
        folder.lock.unlink()
        with locked(folder), pytest.raises(UserError, match="another process is running"):
            hold.check()


# What is done to the images between stop and resume; what is told of it.
def _rewrite(folder, size=32):
    draw = np.random.default_rng(1)
    for path in folder.iterdir():
        pixels = draw.integers(0, 255, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)


def _one(folder):
    (folder / "07.png").write_bytes((folder / "08.png").read_bytes() + b"\0")


def _in_place(folder):
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 10**18 + 1))


REPLACED = {
    "other images": (lambda folder: _rewrite(folder, 31), r"64 of the 64 .*\(64 of them"),
    "one": (_one, r"1 of the 64 .*\(1 of them"),
    "same sizes": (_in_place, "64 of the 64 .* sizes are the same"),
    "nothing": (lambda folder: None, None),
    "whole seconds": (
        lambda folder: [
            os.utime(p, ns=(0, p.stat().st_mtime_ns // 10**9 * 10**9)) for p in folder.iterdir()
        ],
        None,
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_images_are_noticed(images, tmp_path, name):
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    before = _identity(folder)
    change, expected = REPLACED[name]
    change(folder)
    found = marks.replaced(before, open_folder(folder, "auto")[0])
    if expected is None:
        assert found == ""
    else:
        assert re.search(expected, found) and "\n" not in found


def _identity(folder):
    source = open_folder(folder, "auto")[0]
    places, files = marks.places_of(source), marks.marks_of(source)
    path = folder.parent / "run.json"
    identity.write(identity.Identity("a", places=places, files=files), path)
    return identity.read(path)


def test_a_copy_with_other_times_is_the_same_data_and_other_sizes_are_not(images, tmp_path):
    before = _identity(images)
    copy = Path(shutil.copytree(images, tmp_path / "copy" / "images"))
    for path in copy.iterdir():
        os.utime(path, (0, 0))
    assert marks.replaced(before, open_folder(copy, "auto")[0]) == ""
    _rewrite(copy, 31)
    assert "64 of the 64" in marks.replaced(before, open_folder(copy, "auto")[0])


def test_each_of_several_places_has_marks_of_its_own(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(images, name)
    source = open_data("one::two").train
    before = identity.Identity("a", "", "", marks.places_of(source), marks.marks_of(source))
    assert before.places == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert len(before.files) == 128 and marks.replaced(before, source) == ""
    (tmp_path / "two" / "00.png").write_bytes(b"other")
    assert "1 of the 128 image files" in marks.replaced(before, source)


WHOLE = {"run": "a", "start": "", "fingerprint": "", "places": [], "files": {}}
DAMAGED = {
    "no text": b"\xff\xfe",
    "cut short": b'{"run": "a"',
    "no object": b"[1]",
    "lacking": b'{"run": "a"}',
    "deep": b"[" * 10**5,
    "run": WHOLE | {"run": 7},
    "places": WHOLE | {"places": 3},
    "a place": WHOLE | {"places": [3]},
    "files": WHOLE | {"files": [1]},
    "a file": WHOLE | {"files": {"x": 1}},
    "a size": WHOLE | {"files": {"x": [float("inf"), 1]}},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_number_is_as_a_missing_one(tmp_path, content):
    path = tmp_path / "run.json"
    assert identity.read(path) is None
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert identity.read(path) is None


def test_files_that_no_disk_can_have_are_as_those_that_are_gone(images):
    """A run.json of a stranger may name anything."""
    source = open_folder(images, "auto")[0]
    names = ["0/a\0b", "0/" + "x" * 300, "0/none.png", "9/07.png", "x/07.png", "\u00b2/07.png", ""]
    before = identity.Identity("a", files=dict.fromkeys(names, (1, 1)))
    assert marks.replaced(before, source) == ""


def test_numbers_differ_and_a_label_says_all_in_which_it_does():
    one, other = (identity.Identity(identity.new_number(), "weights") for _ in range(2))
    assert one.run != other.run
    assert one.differences(other.label) == ["the run's own number"]
    assert len(one.differences({"run": "x", "start": "y"})) == 2
    assert one.differences({}) == one.differences({"run": "", "start": ""}) == []


def test_a_million_names_cost_a_look_at_few_files(tmp_path, monkeypatch):
    from mocokit.data.names import Names
    from mocokit.data.sources.folder import FolderSource

    names = Names.of([b"%07d.jpg" % number for number in range(10**6)])
    source = FolderSource(tmp_path, names, None, (), "many")
    looked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: looked.append(path) or stat(path, **k))
    assert marks.marks_of(source) == {}
    assert marks.MOST / 2 < len(looked) <= marks.MOST
    assert [os.path.basename(looked[n]) for n in (0, -1)] == ["0000000.jpg", "0999999.jpg"]


def test_a_resume_tells_of_replaced_images_and_of_a_missing_index(
    stopped, tmp_path, images, capsys
):
    folder = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    data = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "images.idx").unlink()
    _rewrite(data, 31)
    run(data, folder)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "64 of the 64 image files that were compared have been replaced" in told
    assert "images.idx was missing: it is written again" in told
    assert (folder / "images.idx").is_file()


@pytest.mark.parametrize("known", [True, False], ids=["number", "old"])
def test_without_an_index_other_images_are_refused(copied, tmp_path, images, known):
    """`known`: run.json is there, which says what the images were; else the checkpoint does."""
    data = Path(shutil.copytree(images, tmp_path / "images"))
    (data / "07.png").rename(data / "7.png")
    (copied / "images.idx").unlink()
    if not known:
        (copied / "run.json").unlink()
    said = "images.idx is missing" if known else "differs in the data's images"
    with pytest.raises(UserError, match=said):
        run(data, copied)
    assert not (copied / "images.idx").exists()


def test_equal_folders_of_old_have_no_number_and_still_refuse_others(copied, images):
    """What 0.1 wrote has no label: settings and images are compared all the same."""
    written_by_another(copied, "seed", 2)
    state = checkpoint.load(at(copied, 2))
    torch.save({"format": 2, **state, "checksum": checkpoint.digest({"format": 2, **state})},
               at(copied, 2))  # fmt: skip
    assert checkpoint.label_of(at(copied, 2)) == {}
    at(copied, 1).unlink()
    with pytest.raises(UserError, match="another run: it differs in seed"):
        run(images, copied)


STATES = {"sgd": "momentum_buffer", "adamw": "exp_avg_sq", "lars": "velocity"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", STATES)
def test_an_optimisers_state_that_is_not_finite_is_never_saved(name, value):
    layer = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(name, [{"params": list(layer.parameters())}], 0.1, 0.9, 0.0)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    check_progress(optimizer.state_dict(), {}, 1)
    optimizer.state[layer.bias][STATES[name]][1] = 1e30  # large and finite
    check_progress(optimizer.state_dict(), {}, 1)
    optimizer.state[layer.bias][STATES[name]][1] = value
    with pytest.raises(NonFiniteLoss, match="optimiser's state after step 7"):
        check_progress(optimizer.state_dict(), {}, 7)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0])
def test_a_scaler_that_is_of_no_use_is_never_saved(scale):
    good = {"scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "_growth_tracker": 3}
    check_progress({}, good, 1)
    with pytest.raises(NonFiniteLoss):
        check_progress({}, good | {"scale": scale}, 1)


@pytest.mark.parametrize("where", ["save", "load"])
def test_a_run_keeps_the_last_good_optimiser(images, tmp_path, monkeypatch, where, straight):
    """The weights are finite: only the momentum is not."""
    save, out = RunState.save, tmp_path / "run"

    def saving(self):
        if self.step == 2:
            buffers = [s["momentum_buffer"] for s in self.parts.optimizer.state.values()]
            buffers[0][0] = float("nan")
        save(self)

    settings = {"save__every_steps": 1, "optim__name": "sgd", "optim__lr": 0.05}
    with monkeypatch.context() as patch, pytest.raises(NonFiniteLoss, match="step-00000001.pt"):
        patch.setattr(RunState, "save", saving)
        if where == "load":  # a checkpoint of a version that did not look
            patch.setattr("mocokit.run.state.check_progress", lambda *given: None)
            patch.setattr("mocokit.run.recording._write_backbone", _fails)
        run(images, out, **settings)
    assert checkpoint.steps(out / "checkpoints") == [1, 2][: 1 + (where == "load")]
    if where == "load":
        run(images, out, **settings)
        assert (out / "checkpoints/step-00000002.pt.damaged").is_file()


def _fails(run):
    raise NonFiniteLoss("step-00000001.pt: as after a kill")


def test_finished_is_said_of_a_backbone_and_a_checkpoint_that_are_there(images, tmp_path):
    out = tmp_path / "run"
    run(images, out)
    (out / "backbone.safetensors").unlink()
    assert run(images, out).result["finished"]
    assert (out / "backbone.safetensors").is_file()
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("finished")] == [2]
