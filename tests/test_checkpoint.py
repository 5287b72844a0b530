"""Checkpoints: whole or not at all, pruned, refused when damaged or dangerous."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from mocokit.engine import checkpoint
from mocokit.errors import MocokitError, UserError


def test_round_trip_and_link(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 7, {"x": torch.arange(3), "text": "a: 1"})
    checkpoint.save(folder, 12, {"x": torch.arange(4), "text": "b"})
    assert os.readlink(tmp_path / "last.pt") == "checkpoints/step-00000012.pt"
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["step"] == 12 and torch.equal(state["x"], torch.arange(4))
    assert checkpoint.steps(folder) == [7, 12]
    assert not list(tmp_path.rglob("*.partial"))


def test_the_newest_are_kept_and_milestones_too(tmp_path):
    for step in (10, 20, 30, 40, 50):
        checkpoint.save(tmp_path / "c", step, {})
        checkpoint.prune(tmp_path / "c", 2, frozenset({10, 20}))
    assert checkpoint.steps(tmp_path / "c") == [10, 20, 40, 50]


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    checkpoint.save(folder, 1, {"x": torch.ones(2)})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MocokitError, match="No space left.*about 1 MiB; what was saved before"):
        checkpoint.save(folder, 2, {"x": torch.ones(2)})
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    folder = tmp_path / "c"
    for step in (1, 2):
        checkpoint.save(folder, step, {"x": torch.randn(1000)})
    path = folder / checkpoint.name_of(2)
    path.write_bytes(path.read_bytes()[:1500])
    assert checkpoint.load_newest(folder)["step"] == 1
    (folder / checkpoint.name_of(1)).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        checkpoint.load_newest(folder)
    assert checkpoint.load_newest(tmp_path / "none") is None


def test_a_flipped_bit_is_found_named_and_the_one_before_is_used(tmp_path):
    folder = tmp_path / "c"
    for step in (1, 2):
        weights = torch.arange(1000, dtype=torch.float32) + step
        checkpoint.save(folder, step, {"optimizer": {0: [weights]}, "x": torch.tensor(step)})
    path = folder / checkpoint.name_of(2)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(500, 510).float().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    damaged = torch.load(path, weights_only=True)["optimizer"][0][0]
    assert len(damaged) == 1000 and not torch.equal(damaged, weights)  # torch sees nothing wrong
    with pytest.raises(UserError, match="step-00000002.pt is damaged: .* checksum"):
        checkpoint.load(path)
    told = []
    assert checkpoint.load_newest(folder, log=told.append)["step"] == 1
    assert len(told) == 1 and "step-00000002.pt" in told[0] and "checkpoint before" in told[0]


def test_a_checkpoint_of_another_version_is_refused_and_the_one_before_is_used(tmp_path):
    folder = tmp_path / "c"
    for step in (1, 2):
        checkpoint.save(folder, step, {"x": torch.ones(2)})
    state = torch.load(folder / checkpoint.name_of(2), weights_only=True)
    torch.save(state | {"format": 99}, folder / checkpoint.name_of(2))
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.load(folder / checkpoint.name_of(2))
    assert checkpoint.load_newest(folder)["step"] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a limit on file sizes is set in a child")
def test_a_disk_that_fills_up_while_writing_keeps_the_old_one_and_names_the_need(tmp_path):
    """The system stops the write itself, as a full disk would, in the middle of the file."""
    folder = tmp_path / "c"
    checkpoint.save(folder, 1, {"x": torch.ones(2)})
    code = (
        "import resource, sys, torch; from pathlib import Path; from mocokit.engine import "
        "checkpoint; from mocokit.errors import MocokitError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try: checkpoint.save(Path(sys.argv[1]), 2, {'x': torch.ones(2**20)})\n"
        "except MocokitError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "it needs about 4 MiB; what was saved before is untouched" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["step-00000001.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1


X = torch.arange(6)


@pytest.mark.parametrize(
    "other",
    [
        {"b": X},
        {"a": X, "b": X},
        {"a": {"a": X}},
        {"a": [X]},
        {"a": X.view(2, 3)},
        {"a": X.view(3, 2)},
        {"a": X.int()},
        {"a": X.double().view(torch.int64)},
        {"a": X.view(torch.float64)},
        {"a": X + 1},
        {"a": X.flip(0)},
        {"a": str(X)},
        {"a": 1},
        {"a": 1.0},
        {"a": "1"},
        {"a": None},
        {},
    ],
)
def test_a_digest_knows_place_shape_type_and_bits(other):
    """Each of them from every other one."""
    known = [{"a": X}, {"a": X.view(2, 3)}, {"a": [X, X]}, {"b": [X, X]}, {"a": 2}]
    digests = [checkpoint.digest(state) for state in known]
    assert len({*digests}) == len(known)
    same = [state for state in known if str(state) == str(other)]
    assert (checkpoint.digest(other) in digests) == bool(same)
    assert checkpoint.digest({"a": X}) == checkpoint.digest({"a": X.clone()})


class Trap:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, write):
    path = tmp_path / "evil.pt"
    if write == "torch":
        torch.save({"format": 1, "x": Trap()}, path)
    else:
        path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="could run any code, so it is refused"):
        checkpoint.load(path)
    assert not (tmp_path / "pwned").exists() and not os.path.exists("pwned")


def test_other_files_are_not_checkpoints(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


def test_a_label_names_its_step_and_is_not_endless(tmp_path):
    path = checkpoint.save(tmp_path / "c", 7, {"x": X}, {"run": "a"})
    assert checkpoint.label_of(path) == {"run": "a", "step": 7}
    os.rename(path, path.with_name(checkpoint.name_of(8)))
    assert not checkpoint.is_saved(tmp_path / "c", 8)
    path = checkpoint.save(tmp_path / "c", 9, {"x": X}, {"run": "a" * 2**16})
    assert checkpoint.label_of(path) == {}  # not read


@pytest.mark.parametrize("step", [True, 2.0, "2", None])
def test_a_step_is_a_whole_number(tmp_path, step):
    content = {"format": checkpoint.FORMAT, "step": step}
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.checked({**content, "checksum": checkpoint.digest(content)}, tmp_path / "x.pt")


def test_there_is_always_a_last_one(tmp_path, monkeypatch):
    one, two = (checkpoint.save(tmp_path / "c", step, {}) for step in (1, 2))
    link = tmp_path / "last.pt"
    (tmp_path / "last.pt.partial").symlink_to("what a kill left")
    monkeypatch.chdir(tmp_path)
    checkpoint.point(one.relative_to(tmp_path))
    assert os.readlink(link) == "c/step-00000001.pt" and not os.path.lexists("last.pt.partial")

    def fails(*rest):
        assert os.readlink(link) == "c/step-00000001.pt"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(MocokitError, match=r"cannot write .*last.pt \(No space left"):
        checkpoint.point(two)
    assert os.readlink(link) == "c/step-00000001.pt"


def taken(folder, **fates):
    """The step that is taken where checks find these fates, and what is told."""
    told = []

    def check(state, label):
        if (fate := fates.get(f"_{state['step']}")) is not None:
            raise fate(f"{state['step']} is of no use")

    state = checkpoint.load_newest(folder, log=told.append, check=check)
    return state["step"], told


def test_what_is_passed_over_is_set_aside_under_a_name_of_its_own(tmp_path):
    folder = tmp_path / "c"
    for step in (1, 2, 3, 4):
        checkpoint.save(folder, step, {})
    other = checkpoint.OtherRun
    assert taken(folder, _4=UserError, _3=other)[0] == 2
    assert os.readlink(tmp_path / "last.pt") == "c/step-00000002.pt"
    checkpoint.save(folder, 4, {})
    step, told = taken(folder, _4=UserError)
    assert step == 2 and "it is now called step-00000004.pt.damaged-2;" in told[0]
    left = ["1.pt", "2.pt", "3.pt.other-run", "4.pt.damaged", "4.pt.damaged-2"]
    assert sorted(os.listdir(folder)) == [f"step-0000000{name}" for name in left]
    with pytest.raises(UserError, match="can be read: 2 is of no use") as caught:
        taken(folder, _2=UserError, _1=other)
    assert not isinstance(caught.value, other)
    with pytest.raises(other, match="2 is of no use"):
        taken(folder, _2=other, _1=UserError)
    assert sorted(os.listdir(folder)) == [f"step-0000000{name}" for name in left]


def test_what_cannot_be_deleted_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    for step in (1, 2, 3):
        checkpoint.save(folder, step, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *rest, **named: None)
        patch.setattr("pathlib.Path.unlink", lambda *rest, **named: _refuse())
        assert "step-00000002.pt is kept: it cannot be deleted" in checkpoint.prune(folder, 1)
    assert checkpoint.prune(folder, 1) == "" and checkpoint.steps(folder) == [3]


def _refuse():
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("explicit", [True, False])
def test_what_torchs_writer_hides_is_said(tmp_path, monkeypatch, explicit):
    def hiding(content, file):
        try:
            raise OSError(122, "Disk quota exceeded")
        except OSError as error:
            if explicit:
                raise RuntimeError("unexpected pos 64 vs 0") from error
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    monkeypatch.setattr(torch, "save", hiding)
    with pytest.raises(MocokitError, match=r"cannot write .* \(Disk quota exceeded\)"):
        checkpoint.save(tmp_path / "c", 1, {})

    def failing(content, file):
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(MocokitError, match=r"cannot write .* \(unexpected pos 64 vs 0\)"):
        checkpoint.save(tmp_path / "c", 1, {})
    assert not list((tmp_path / "c").iterdir())
