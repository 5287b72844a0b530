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
