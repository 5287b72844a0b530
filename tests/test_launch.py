"""Processes of a run: announced by others, or started, ended and told of by us."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mocokit
from mocokit.cli import launch
from mocokit.engine import checkpoint
from mocokit.engine.runtime import default_threads, joined_world
from mocokit.engine.world import ATTEMPT, World, announced, attempts, first_host
from mocokit.errors import Interrupted, MocokitError, UserError

SLURM_STEP = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


def mpi(rank, size, local_rank, local_size):
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


class TestAnnounced:
    def test_a_process_on_its_own(self):
        assert announced({}) is None
        assert announced(mpi(0, 1, 0, 1)) is None

    def test_torchrun(self):
        place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        found = announced(place | {"MASTER_ADDR": "a", "MASTER_PORT": "7"})
        assert found == (World(3, 4, 1), 2, False, "a", 7)
        with pytest.raises(UserError, match="MASTER_ADDR"):
            announced(place)

    @pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "\x1b[2J\n", "9" * 99, "\uff11"])
    def test_what_is_no_number_is_one_sentence(self, value):
        """Of every variable that is read as a number, in each kind of announcement."""
        torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        place = {"MASTER_ADDR": "a", "MASTER_PORT": "7"}
        for environment, texts in (
            (torchrun | place, ()),
            (SLURM_STEP | place, ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE")),
            (mpi(0, 2, 0, 2) | place, ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
        ):
            for name in environment.keys() - {"MASTER_ADDR", *texts}:
                with pytest.raises(UserError, match=f"^the environment has {name}=") as error:
                    announced(environment | {name: value})
                assert str(error.value).isprintable() and len(str(error.value)) < 400
            with pytest.raises(UserError, match="MASTER_PORT=65536"):
                announced(environment | {"MASTER_PORT": "65536"})
        for name in ("MOCOKIT_ATTEMPT", "TORCHELASTIC_RESTART_COUNT"):
            if value or name != "MOCOKIT_ATTEMPT":
                with pytest.raises(UserError, match=f"^the environment has {name}="):
                    attempts({name: value})

    @pytest.mark.parametrize(
        "wrong",
        [
            {"RANK": "2"}, {"LOCAL_RANK": "2"}, {"WORLD_SIZE": "0"}, {"MASTER_ADDR": "a\x1b[2J"},
            {"MASTER_ADDR": "a b"}, {"MASTER_ADDR": "x" * 999}, {"MASTER_ADDR": ""},
        ],
    )  # fmt: skip
    def test_what_cannot_be_is_one_sentence(self, wrong):
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
        with pytest.raises(UserError, match="|".join(wrong)) as error:
            announced(place | wrong)
        assert str(error.value).isprintable() and len(str(error.value)) < 400

    def test_a_step_of_slurm(self):
        world, local_size, bound, address, port = announced(SLURM_STEP)
        assert (world, local_size, bound, address) == (World(5, 8, 1), 4, True, "gpu03")
        assert 20000 <= port < 30000
        assert announced(SLURM_STEP | {"SLURM_STEP_ID": "3"}).port != port
        set_by_hand = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}
        assert announced(SLURM_STEP | set_by_hand)[3:] == ("10.0.0.1", 99)

    def test_steps_of_neighbouring_slurm_jobs_have_ports_of_their_own(self):
        """Sixteen steps of each of three jobs, wherever in the numbers of SLURM they are."""
        for first in (1, 1234, 2**32 - 3):
            names = [(job, step) for job in range(first, first + 3) for step in range(16)]
            ports = [
                announced(SLURM_STEP | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)}).port
                for j, s in names
            ]
            assert len({*ports}) == 48 and min(ports) >= 20000 and max(ports) < 30000

    def test_a_script_of_slurm_is_no_step(self):
        """There, a job's variables are set, though only one process runs."""
        job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1234"}
        assert announced(job) is None
        assert announced(job | {"SLURM_STEP_NUM_TASKS": "1"}) is None  # srun --pty bash

    def test_open_mpi(self):
        assert announced(mpi(1, 2, 1, 2)) == (World(1, 2, 1), 2, True, "127.0.0.1", 29500)
        with pytest.raises(UserError, match="MASTER_ADDR, the machine of the first"):
            announced(mpi(5, 8, 1, 4))
        assert announced(mpi(5, 8, 1, 4) | {"MASTER_ADDR": "b"}).address == "b"

    def test_each_job_of_open_mpi_has_a_port(self):
        """PMIX_NAMESPACE as Open MPI 5 and 4 write it; the latter's own name for it."""
        ports = {}
        for name, jobs in (
            ("PMIX_NAMESPACE", ["prterun-gpu01-4711@1", "prterun-gpu01-4712@1", "961478657"]),
            ("OMPI_MCA_ess_base_jobid", ["961478658"]),
        ):
            for job in jobs:
                one, two = (announced(mpi(r, 2, r, 2) | {name: job}).port for r in (0, 1))
                assert one == two and 20000 <= one < 30000
                ports[job] = one
        assert len({*ports.values()}) == 4
        job = {"PMIX_NAMESPACE": "1", "MASTER_PORT": "99"}
        assert announced(mpi(0, 2, 0, 2) | job).port == 99

    @pytest.mark.parametrize(
        ("hosts", "first"),
        [
            ("gpu[07-09,12],login1", "gpu07"), ("node3", "node3"), ("a1,a2", "a1"),
            ("rack[2-3]n[1,4]", "rack2n1"), ("x[5]", "x5"), ("", None),
        ],
    )  # fmt: skip
    def test_first_host(self, hosts, first):
        assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("environment", "there", "mine", "expected"),
    [
        ({}, 64, 16, 16),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 64, 64, 8),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, 64, 4, 1),
        (SLURM_STEP, 64, 6, 6),  # bound to its own already
        (SLURM_STEP, 64, 64, 16),
        (mpi(0, 2, 0, 2), 64, 1, 1),
    ],
)
def test_processes_of_a_machine_share_its_processors(
    environment, there, mine, expected, monkeypatch
):
    if environment.get("RANK"):
        environment = environment | {"MASTER_ADDR": "a"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mine)))
    assert default_threads() == expected


class TestEnded:
    def told(self, rank, code, text, at=0.0):
        return {"rank": rank, "code": code, "text": text, "time": at}

    def test_what_all_say_is_said_once(self):
        error = launch.ended([self.told(r, 2, "no such data") for r in (0, 1)], {0: 2, 1: 2})
        assert isinstance(error, UserError) and str(error) == "no such data"

    def test_the_first_to_fail_is_named(self):
        reports = [self.told(3, 2, "no disk", 1.0), self.told(0, 1, "lost process 3", 2.0)]
        assert str(launch.ended(reports, {0: 1, 3: 2})) == "process 3: no disk"

    @pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
    def test_reports_are_read_in_the_order_of_their_times(self, tmp_path, order):
        """Not of the processes' numbers: the first to fail is told, and is the cause."""
        for rank in range(3):
            told = self.told(rank, 1, f"fault of {rank}", 100.0 + order.index(rank))
            (tmp_path / f"0-{rank}.json").write_text(json.dumps({"attempt": 0, **told}))
        found = launch.read_reports(tmp_path)
        assert [one["rank"] for one in found] == [*order]
        error = launch.ended(found, dict.fromkeys(range(3), 1))
        assert str(error) == f"process {order[0]}: fault of {order[0]}"

    def test_saved_and_stopped(self):
        error = launch.ended([self.told(0, 75, "saved"), self.told(1, 75, "saved")], {})
        assert isinstance(error, Interrupted) and error.exit_code == 75

    def test_killed_or_failed(self):
        told = str(launch.ended([], {0: 1, 1: -9}))
        assert "process 1 was ended by SIGKILL (out of memory, or killed by a user)" in told
        assert "(out of memory" not in str(launch.ended([], {0: 1, 1: -11}))
        error = launch.ended([], {2: 1})
        assert "process 2 failed" in str(error) and error.exit_code == MocokitError.exit_code
        assert "before the processes had saved" in str(launch.ended([], {}))

    def test_who_ends_for_anothers_failure_has_not_stopped_the_run(self):
        error = launch.ended([self.told(0, 75, "stopped before the first step")], {0: 75, 1: -9})
        assert error.exit_code == 1 and "process 1 was ended by SIGKILL" in str(error)

    def test_the_latest_attempt_counts(self, tmp_path, monkeypatch):
        monkeypatch.setenv(launch.REPORTS, str(tmp_path))
        for attempt, text in (("0", "old"), ("1", "new")):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
            assert launch.report(MocokitError(text))
        assert [told["text"] for told in launch.read_reports(tmp_path)] == ["new"]

    def test_a_mistake_or_a_stop_is_not_tried_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv(launch.REPORTS, str(tmp_path))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        launch.end_again()
        launch.report(MocokitError("lost a process"))
        launch.end_again()
        launch.report(Interrupted("saved", 75))
        with pytest.raises(Interrupted, match="saved"):
            launch.end_again()

    def test_a_report_that_cannot_be_written_is_said_instead(self, tmp_path, monkeypatch):
        monkeypatch.setenv(launch.REPORTS, str(tmp_path / "gone"))
        assert not launch.report(MocokitError("x"))


def test_mistakes_before_the_start():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 GPUs are visible"):
            launch.count_processes("cuda", 2, 1)
    assert launch.count_processes("cpu", None, 1) is None
    assert launch.count_processes("cpu", 2, 1) == 2
    assert launch.count_processes("cpu", None, 2) == 1
    assert launch.count_processes("cpu", None, 1, restarts=1) == 1


@pytest.mark.parametrize(("device", "started"), [("auto", 3), ("cuda", 3), ("cuda:1", None)])
def test_without_a_number_each_visible_gpu_gets_a_process(monkeypatch, device, started):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert launch.count_processes(device, None, 1) == started
    assert launch.count_processes(device, 2, 1) == 2


def test_a_process_alone_is_started_again_too(mocokit, toy_npz, tmp_path, monkeypatch):
    """By a program in place of Python that is killed the first time; alone it joins no group."""
    program, starts = tmp_path / "python", tmp_path / "starts"
    program.write_text(
        f'#!/bin/sh\necho "$WORLD_SIZE" >> {starts}\n'
        f'[ "$(wc -l < {starts})" -gt 1 ] || kill -9 $$\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    words = ["pretrain", "demo", toy_npz, "--device", "cpu", "--out", tmp_path / "run"]
    code, _, said = mocokit(*words, "--restarts", 1)
    assert code == 0 and starts.read_text() == "1\n1\n", said
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(ATTEMPT, "1")
    with joined_world("cpu") as world:
        assert world == World() and not torch.distributed.is_initialized()
    code, _, said = mocokit(*words, "--restarts", 1)
    assert code == 2 and "--restarts: this is a process of several already" in said


STEPS = 40
QUICK = ["--device", "cpu", "--epochs", "8", "--batch-size", "32", "--processes", "3"]
SETTINGS = {
    "engine.threads": 1, "method.group_size": 8, "save.every_steps": 3, "log.every_steps": 1,
    "engine.compare_steps": 4, "monitor.every_epochs": 1,  # after which the processes agree
}  # fmt: skip
for name, value in SETTINGS.items():
    QUICK += ["--set", f"{name}={value}"]


@pytest.fixture
def start():
    """Starts a run of 40 steps in three processes; what is left of it ends with the test."""
    started = []

    def begin(*arguments):
        command = [sys.executable, "-m", "mocokit", "pretrain", "demo", *map(str, arguments)]
        started.append(subprocess.Popen([*command, *QUICK], stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=100)


def processes_of(starter):
    """The process of each rank, once all are there."""
    deadline = time.monotonic() + 100
    while (
        len(found := {rank: pid for rank in range(3) if (pid := process_of_rank(starter, rank))})
        < 3
    ):
        assert starter.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return found


def process_of_rank(starter, rank):
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == starter.pid and f"\0RANK={rank}\0" in (path / "environ").read_text():
                return int(path.name)
        except (OSError, ValueError):
            continue
    return None


def wait_for_step(out, step, starter):
    deadline = time.monotonic() + 200
    while not (steps := checkpoint.steps(out / "checkpoints")) or steps[-1] < step:
        assert starter.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def further(out, steps):
    """A step after the last that was saved."""
    saved = checkpoint.steps(out / "checkpoints")
    return (saved[-1] if saved else 0) + steps


def same_run(a, b):
    one, two = (checkpoint.load(folder / "last.pt") for folder in (a, b))
    assert one["step"] == two["step"] == STEPS
    assert {"queue.rows", "encoder.head.0.weight"} < one["method"].keys()
    for name, tensor in one["method"].items():
        assert torch.equal(tensor, two["method"][name]), name


def straight(data, out):
    mocokit.pretrain("demo", data, out, epochs=8, batch_size=32, device="cpu", settings=SETTINGS)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_killed_restarted_stopped_and_gone_on_with_equals_straight(
    start, forks, toy_npz, tmp_path, monkeypatch, capsys
):
    """kill -9 of one process of three, of all, of one again; SIGTERM to the starter; the rest.

    Three, because a sum of two does not depend on its order. Without --out at first: what is
    restarted must find the folder that had been chosen.
    """
    monkeypatch.chdir(tmp_path)
    first = start(toy_npz, "--restarts", "2")
    out = tmp_path / "runs" / f"demo-{toy_npz.stem}-001"
    for killed in ([1], [0, 1, 2], [1]):
        processes = processes_of(first)
        wait_for_step(out, further(out, 2), first)
        for rank in killed:
            os.kill(processes[rank], signal.SIGKILL)
        ended = time.monotonic()
        while any(Path(f"/proc/{pid}/environ").exists() for pid in processes.values()):
            assert time.monotonic() - ended < 60
            time.sleep(0.02)
    _, text = first.communicate(timeout=100)
    assert time.monotonic() - ended < 60
    assert first.returncode == 1, text
    assert text.count("resumed after step") == 2, text
    assert text.rstrip().splitlines()[-1].startswith("mocokit: process 1 was ended by SIGKILL")

    second = start(toy_npz, "--out", out)
    wait_for_step(out, further(out, 2), second)
    second.send_signal(signal.SIGTERM)
    _, text = second.communicate(timeout=200)
    assert second.returncode == 75, text
    assert text.count("and saved; resume with the same command") == 1, text
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [out.name]
    shutil.copytree(out, tmp_path / "fewer" / "runs" / out.name)

    third = start(toy_npz, "--out", out)
    _, text = third.communicate(timeout=200)
    assert third.returncode == 0, text
    assert text.count("finished: ") == 1
    forks.run(3, tmp_path / "log", "test_launch:straight", str(toy_npz), str(tmp_path / "straight"))
    same_run(tmp_path / "straight", out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, STEPS + 1)]

    monkeypatch.chdir(tmp_path / "fewer")
    settings = {name: value for name, value in SETTINGS.items() if name != "engine.compare_steps"}
    mocokit.pretrain("demo", toy_npz, epochs=8, batch_size=32, resume=True, settings=settings)
    said = capsys.readouterr().err
    assert "written by 3 processes, now there is 1" in said
    assert checkpoint.load(Path("runs") / out.name / "last.pt")["step"] == STEPS


def test_a_mistake_is_told_once_with_its_code(start, toy_npz):
    process = start(toy_npz, "--set", "method.groups=1")
    _, text = process.communicate(timeout=100)
    assert process.returncode == 2
    assert text.count("3 processes for 1 batch-norm groups") == 1, text
    assert "Traceback" not in text
