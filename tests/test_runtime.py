"""Which device each of several processes takes, what they decide together, what fits into memory.

No GPU is asked; torch's answers are made up.
"""

import pickle
import resource
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mocokit.engine import hardware, runtime
from mocokit.engine.hardware import room_for
from mocokit.engine.runtime import (
    choose_device,
    claim_device,
    decided_by_rank_zero,
    joined_world,
    local_rank,
    peak_memory,
)
from mocokit.engine.world import World
from mocokit.errors import MocokitError, UserError


@pytest.fixture
def machine(monkeypatch):
    """A machine that has so many CUDA devices, or MPS."""

    def have(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


@pytest.mark.parametrize(
    ("system", "told"), [("linux", 3 * 2**20), ("freebsd14", 3 * 2**20), ("darwin", 3 * 2**30)]
)
def test_the_peak_memory_is_in_gib(monkeypatch, system, told):
    """getrusage tells kilobytes, but on a Mac bytes."""
    usage = SimpleNamespace(ru_maxrss=told)
    monkeypatch.setattr(resource, "getrusage", lambda who: {resource.RUSAGE_SELF: usage}[who])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**29)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", system)
        found = [peak_memory(torch.device(name)) for name in ("cpu", "mps", "cuda:1")]
    assert found == [3.0, 3.0, 2.5]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_the_peak_memory_is_that_of_this_process():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert resident / 2**30 * 0.9 < peak_memory(torch.device("cpu")) < 64
    held = torch.ones(2**28, dtype=torch.uint8)  # a quarter of a GiB
    assert peak_memory(torch.device("cpu")) > 0.25 and held[-1] == 1


@pytest.mark.parametrize(
    ("set_to", "rank", "devices", "expected"),
    [("2", 5, 4, 2), (None, 5, 4, 1), (None, 3, 1, 0), (None, 3, 0, 0)],
)
def test_a_local_rank_that_nobody_set(machine, monkeypatch, set_to, rank, devices, expected):
    machine(cuda=devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if set_to:
        monkeypatch.setenv("LOCAL_RANK", set_to)
    assert local_rank(rank) == expected


@pytest.mark.parametrize("wrong", ["first", "-1", "1.5"])
def test_a_local_rank_that_is_no_number(machine, monkeypatch, wrong):
    machine(cuda=4)
    monkeypatch.setenv("LOCAL_RANK", wrong)
    with pytest.raises(UserError, match=f"the environment has LOCAL_RANK={wrong}, which is no"):
        local_rank(1)


def test_a_machine_that_nobody_knows_is_not_waited_for(machine, monkeypatch):
    """A name server that fails for now is: it may answer later."""
    machine()
    answer = {}

    def look_up(host, port, *rest, **named):
        raise socket.gaierror(answer[host], "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu-1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    class Joined(Exception):
        pass

    def join(cuda):
        raise Joined

    monkeypatch.setattr("mocokit.engine.runtime._join_group", join)
    answer["gpu-1"] = socket.EAI_NONAME
    with (
        pytest.raises(UserError, match=r"^MASTER_ADDR, .*, is 'gpu-1', which no machine is called"),
        joined_world("cpu"),
    ):
        pass
    answer["gpu-1"] = socket.EAI_AGAIN
    with pytest.raises(Joined), joined_world("cpu"):
        pass


def test_processes_of_the_callers_own_group_take_a_device_each(machine, monkeypatch):
    machine(cuda=4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    chosen = []
    for rank in range(8):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        with joined_world("auto") as world:
            chosen.append(choose_device("auto", world).index)
    assert chosen == [0, 1, 2, 3, 0, 1, 2, 3]


def test_more_processes_than_devices(machine):
    machine(cuda=2)
    assert [choose_device("cuda", World(r, 3, r)).index for r in (0, 1)] == [0, 1]
    with pytest.raises(
        UserError, match="there are 2 CUDA devices for 3 or more processes.*at most one"
    ):
        choose_device("auto", World(2, 3, 2))
    machine(cuda=1)  # each may see its own, which `claim_device` finds out
    assert choose_device("cuda", World(1, 2, 1)).index == 0


def see(monkeypatch, uuid):
    device = SimpleNamespace(name="NVIDIA H100", uuid=uuid)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)


def test_a_device_is_held_by_one_process(monkeypatch):
    store = dist.HashStore()
    for uuid in ("a", "b"):
        see(monkeypatch, uuid)
        claim_device(store)
    with pytest.raises(UserError, match=r"\(NVIDIA H100\) is used by another process of the run"):
        claim_device(store)


def test_a_shared_device_is_told_before_the_group_is_joined(machine, monkeypatch):
    """Two processes of torchrun where both see the same device alone; a restart begins anew."""
    machine(cuda=1)
    see(monkeypatch, "a")
    store, joined = dist.HashStore(), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *name, **more: joined.append(name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "1")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            answer = iter([(store, rank, 2)])
            monkeypatch.setattr(runtime, "rendezvous", lambda *where, a=answer, **more: a)
            if rank == 0:
                with joined_world("auto") as world:
                    assert world == World(0, 2, 0)
            else:
                with (
                    pytest.raises(UserError, match="is used by another process"),
                    joined_world("auto"),
                ):
                    pass
    assert joined == [("nccl",), ("nccl",)]


def test_several_processes_do_not_share_mps(machine):
    machine(mps=True)
    assert choose_device("auto").type == "mps"
    assert choose_device("mps").type == "mps"
    assert choose_device("auto", World(1, 2, 1)).type == "cpu"
    with pytest.raises(UserError, match="device mps is one GPU for 2 processes; use cpu"):
        choose_device("mps", World(0, 2, 0))


def raising(error):
    raise error


@pytest.mark.parametrize(
    ("decide", "kind", "said"),
    [
        (lambda: {"resume": True}, None, {"resume": True}),
        (lambda: None, None, None),
        (lambda: raising(UserError("no such folder")), UserError, "no such folder"),
        (lambda: raising(MocokitError("the disk is full")), MocokitError, "the disk is full"),
        (lambda: raising(MocokitError("")), MocokitError, ""),
    ],
)
def test_what_the_first_process_decides_or_finds_wrong_holds_for_all(
    monkeypatch, decide, kind, said
):
    """The same answer, or an error of the same kind, so that all end with the same exit code."""
    sent = []

    def broadcast(box, source):
        assert source == 0
        sent[:] = sent or [pickle.dumps(box)]
        box[:] = pickle.loads(sent[0])

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    for rank, size in ((0, 3), (1, 3), (2, 3), (0, 1)):
        asked = []
        turn = lambda: asked.append(1) or decide()  # noqa: B023, E731
        if kind is None:
            assert decided_by_rank_zero(World(rank, size), turn) == said
        else:
            with pytest.raises(MocokitError) as error:
                decided_by_rank_zero(World(rank, size), turn)
            assert type(error.value) is kind and str(error.value) == said
            assert error.value.exit_code == (2 if kind is UserError else 1)
        assert len(asked) == (rank == 0)


PLENTY = 2**60  # bytes, which no machine has


@pytest.mark.parametrize(
    ("take", "kind"),
    [
        (lambda: None, None),
        (lambda: torch.empty(PLENTY, dtype=torch.uint8), UserError),
        (lambda: np.empty(PLENTY, np.uint8), UserError),
        (lambda: bytearray(2**62), UserError),
        (lambda: raising(torch.OutOfMemoryError("CUDA: tried to allocate 9 GiB")), UserError),
        (lambda: torch.ones(2, 3) @ torch.ones(2, 3), RuntimeError),  # a wrong shape
        (lambda: raising(ValueError("cannot allocate")), ValueError),
        (lambda: raising(UserError("net.dim is too small")), UserError),
    ],
)
def test_lack_of_memory_alone_is_told_as_such(take, kind):
    """What torch, numpy and Python raise for want of it; a fault of ours stays what it was."""
    if kind is None:
        with room_for("a queue", 2**20):
            take()
        return
    with pytest.raises(kind) as error, room_for("a queue of net.dim 9", 3 * 2**29):
        take()
    assert type(error.value) is kind
    lacking = "a queue of net.dim 9 needs about 1.5 GiB of memory, which is not to be had"
    own = kind is not UserError or "net.dim is too small" in str(error.value)
    assert (lacking in str(error.value)) == (not own)


@pytest.mark.parametrize(("needed", "have", "fits"), [(8, 8, True), (8, 7, False), (8, None, True)])
def test_what_exceeds_the_machine_is_refused_before_it_is_taken(monkeypatch, needed, have, fits):
    monkeypatch.setattr(hardware, "memory_gib", lambda: have)
    taken = []
    if fits:
        with room_for("a queue", needed * 2**30):
            taken.append(1)
    else:
        sentence = "a queue needs about 8.0 GiB of memory, and this machine has 7; set smaller ones"
        with pytest.raises(UserError, match=sentence), room_for("a queue", needed * 2**30):
            taken.append(1)
    assert bool(taken) == fits
