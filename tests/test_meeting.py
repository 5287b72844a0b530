"""Starters that meet: what they pass on, where they meet, who is late, who dies."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forks import free_port
from hypothesis import given, settings, strategies as st
from torch.distributed.run import get_args_parser

import mocokit
from mocokit.cli import launch, meeting, rounds
from mocokit.engine import checkpoint
from mocokit.engine.world import ATTEMPT, ProcessLost, attempts, lost
from mocokit.errors import Interrupted, MocokitError, UserError


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    """In place of Python: a program that writes down the arguments it gets."""
    folder = tmp_path_factory.mktemp("recorder")
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > "{folder}/got"\n')
    program.chmod(0o755)
    return program


def arrive(recorder, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(recorder))
        launch.launch(words, 1, 1, None, 0)
    found = os.fsdecode((recorder.parent / "got").read_bytes()).split("\0")[:-1]
    assert found[:3] == ["-u", "-m", "mocokit"]
    return found[3:]


def torch_options():
    """Every option of torchrun, and every prefix of one, which its parser would take for it."""
    options = {text for action in get_args_parser()._actions for text in action.option_strings}
    return sorted({option[:end] for option in options for end in range(1, len(option) + 1)})


class TestArguments:
    def test_no_option_of_torchrun_is_read(self, recorder):
        words = torch_options()
        assert {"--rdzv", "--nodes", "--n", "-m", "-h", "--"} - {"--nodes"} <= {*words}
        words += [f"{word}=1" for word in words]
        assert arrive(recorder, words) == words

    def test_hostile_ones_arrive(self, recorder):
        words = [
            "", " ", "$", "$$", "${local_rank}", "$local_rank", "$$local_rank", "%s", "{rank}",
            "a\nb", "'", '"', "`id`", "$(id)", "--", "-", "ä", "\udcff", "*", "~", "#", "a=b", "\\",
            "x" * 9999,
        ]  # fmt: skip
        assert arrive(recorder, words) == words

    @settings(max_examples=5)
    @given(
        st.lists(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=40
        )
    )
    def test_any_arrive(self, recorder, words):
        assert arrive(recorder, words) == words


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("host1:29500", "host1", 29500), ("10.0.0.1:1", "10.0.0.1", 1),
        ("a-b.c_d:65535", "a-b.c_d", 65535), ("localhost:80", "localhost", 80),
        ("[::1]:29500", "::1", 29500), ("[FD00::0:1]:2", "fd00::1", 2),
    ],
)  # fmt: skip
def test_a_place(text, host, port):
    found = meeting.place(text)
    assert found == (host, port)
    assert meeting.place(str(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "host", "host:", ":29500", "host:0", "host:65536", "host:-1", "host:1e3",
        "host:29500x", "host: 29500", "host:٣", "::1:29500", "fd00::1",
        "[::1]", "[::1]29500", "[host]:1", "[]:1",
        "http://host:1", "user@host:1", "ho st:1", "host/:1", "host:1\n", "-host:1", "host-:1",
        "ho\x1b[31mst:1", "h" * 300 + ":1", "host:1:2", "\u202ehost:1", "[::1%eth0]:1",
    ],
)  # fmt: skip
def test_what_is_no_place(text):
    with pytest.raises(UserError, match="write HOST:PORT") as error:
        meeting.place(text)
    assert str(error.value).isprintable()
    with pytest.raises(UserError):
        launch.check_place(2, text)


@pytest.mark.parametrize(
    ("chosen", "found", "used"),
    [(None, "eth7", "eth7"), ("ib0", "eth7", "ib0"), ("ib0", None, "ib0"), (None, None, None)],
)
def test_gloo_takes_the_interface_that_met_unless_another_is_chosen(
    monkeypatch, chosen, found, used
):
    met, asked = meeting.Meeting(None, "10.1.2.3"), []
    name = "GLOO_SOCKET_IFNAME"
    monkeypatch.setenv(name, "to be restored")
    if chosen is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, chosen)
    monkeypatch.setattr(meeting, "meet", lambda *words: asked.append(words) or met)
    monkeypatch.setattr(meeting, "interface", lambda address: {"10.1.2.3": found}[address])
    assert rounds.gather("host1:29500", 2, {"a": "b"}) is met
    assert asked == [(("host1", 29500), {"a": "b"})] and os.environ.get(name) == used
    if chosen is None:
        os.environ.pop(name, None)
    monkeypatch.setattr(meeting, "interface", None)  # would fail if called
    assert rounds.gather(None, 1, {}).address and os.environ.get(name) == chosen


EVERYBODY = "255.255.255.255"


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "0", "[::]", "224.0.0.1", EVERYBODY, "no-such.invalid"]
)
def test_a_host_that_is_none(host):
    with pytest.raises(UserError):
        meeting.meet(meeting.place(f"{host}:29500"), {})


def test_places_and_numbers_of_machines_go_together():
    launch.check_place(1, None)
    launch.check_place(2, "host:1")
    with pytest.raises(UserError, match="--nodes 2 needs --rdzv HOST:PORT"):
        launch.check_place(2, None)
    with pytest.raises(UserError, match="--nodes"):
        launch.check_place(1, "host:1")


class TestMeet:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", socket.gethostname()])
    def test_the_first_keeps_the_store_and_others_join(self, host):
        if host == "[::1]" and not meeting._is_here("::1"):
            pytest.skip("no IPv6 here")
        where = meeting.place(f"{host}:{free_port()}")
        first = meeting.meet(where, {"seed": "0"})
        second = meeting.meet(where, {"seed": "0"})
        first.store.set("x", "1")
        assert second.store.get("x") == b"1"
        assert {first.address, second.address} == {where.host}

    def test_another_command(self):
        where = meeting.Place("127.0.0.1", free_port())
        kept = meeting.meet(where, {"seed": "0", "a": "x"})
        with pytest.raises(UserError, match="seed is 0 there, 1 here"):
            meeting.meet(where, {"seed": "1", "a": "x"})
        with pytest.raises(UserError, match="b is None there, 2 here"):
            meeting.meet(where, {"seed": "0", "a": "x", "b": "2"})
        del kept

    @pytest.mark.parametrize("says", [b"", b"HTTP/1.0 400 Bad\r\n\r\n", b"\x00" * 4096])
    def test_a_port_that_another_program_uses(self, says, monkeypatch):
        monkeypatch.setattr(meeting, "ANSWER", 1.0)
        done = threading.Event()

        def answer():
            with other.accept()[0] as caller:
                caller.send(says)
                done.wait(20)

        with socket.create_server(("127.0.0.1", 0)) as other:
            thread = threading.Thread(target=answer)
            thread.start()
            where = meeting.Place(*other.getsockname())
            with pytest.raises(UserError, match="what listens there is no starter"):
                meeting.meet(where, {})
            done.set()
            thread.join()

    def test_another_programs_answer_puts_no_stack_on_the_screen(self):
        """As in the command, which looks at the place before anything else loads torch."""
        script = (
            "import sys; from mocokit.cli import launch\n"
            "launch.check_place(2, sys.argv[1])\n"
            "from mocokit.cli import meeting; meeting.ANSWER = 1.0\n"
            "try: meeting.meet(meeting.place(sys.argv[1]), {})\n"
            "except ValueError as error: print(error)\n"
        )
        with socket.create_server(("127.0.0.1", 0)) as other:

            def answer():
                with suppress(OSError):
                    while True:
                        with other.accept()[0] as caller:
                            caller.send(b"HTTP/1.0 400 Bad\r\n\r\n")

            threading.Thread(target=answer, daemon=True).start()
            where = f"127.0.0.1:{other.getsockname()[1]}"
            done = subprocess.run(
                [sys.executable, "-c", script, where], capture_output=True, text=True, timeout=120,
                check=False,
            )  # fmt: skip
            other.shutdown(socket.SHUT_RDWR)
        assert "is no starter of a run" in done.stdout and done.stderr == ""

    def test_nobody_there(self):
        where = meeting.Place("192.0.2.1", 29500)  # of no machine (RFC 5737)
        began = time.monotonic()
        with pytest.raises(MocokitError, match="nothing answered at 192.0.2.1:29500") as error:
            meeting.meet(where, {}, wait=0.5)
        assert error.value.exit_code == 1 and time.monotonic() - began < 20

    def test_a_second_machine_that_never_comes(self, monkeypatch, recorder):
        monkeypatch.setattr(meeting, "WAIT", 1.0)
        monkeypatch.setattr(sys, "executable", str(recorder))
        (recorder.parent / "got").unlink(missing_ok=True)
        with pytest.raises(MocokitError, match="not all of 2 machines had met") as error:
            launch.launch(["x"], 1, 2, f"127.0.0.1:{free_port()}", 0)
        assert error.value.exit_code == 1
        assert not (recorder.parent / "got").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[/__w/x/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:7. This",
        "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv",
    ],
)  # fmt: skip
def test_a_lost_process_is_told_in_a_sentence(text):
    found = lost(RuntimeError(text))
    assert isinstance(found, ProcessLost) and "gloo" not in str(found)
    assert lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost(torch.distributed.DistBackendError("NCCL error")) is not None


def test_a_process_knows_that_its_starter_is_gone(monkeypatch):
    assert not launch._orphaned()  # nobody started it
    monkeypatch.setenv(launch.STARTER, str(os.getppid()))
    assert not launch._orphaned()
    monkeypatch.setenv(launch.STARTER, "1" if os.getppid() != 1 else "2")
    assert launch._orphaned()


def test_attempts_are_counted_alike_on_all_machines():
    assert attempts({}) == attempts({"TORCHELASTIC_RESTART_COUNT": "0"}) == 0
    assert attempts({"TORCHELASTIC_RESTART_COUNT": "2"}) == 2  # torchrun
    assert attempts({"TORCHELASTIC_RESTART_COUNT": "0", ATTEMPT: "3"}) == 3


class TestStopped:
    def reports(self, folder, *codes):
        for rank, code in enumerate(codes):
            content = {"rank": rank, "attempt": 0, "time": rank, "code": code, "text": "why"}
            (folder / f"0-{rank}.json").write_text(json.dumps(content))

    def test_a_stop_of_all_is_final_and_that_of_one_is_not(self, tmp_path):
        self.reports(tmp_path, 75)
        assert launch.stopped(tmp_path, 2) is None  # the other was killed
        self.reports(tmp_path, 75, 1)
        assert launch.stopped(tmp_path, 2) is None
        self.reports(tmp_path, 75, 75)
        assert isinstance(launch.stopped(tmp_path, 2), Interrupted)

    def test_a_mistake_is_final(self, tmp_path):
        self.reports(tmp_path, 75, 2)
        assert isinstance(launch.stopped(tmp_path, 2), UserError)

    def test_a_lost_process_is_told_where_nothing_else_says_why(self):
        gone = {"rank": 0, "code": 1, "text": "lost", "time": 0.0, "lost": True}
        assert str(launch.ended([gone], {0: 1})) == "lost"
        assert "process 1 was ended by SIGKILL" in str(launch.ended([gone], {0: 1, 1: -9}))
        known = {"rank": 1, "code": 2, "text": "no disk", "time": 1.0}
        assert str(launch.ended([gone, known], {0: 1, 1: 2})).endswith("no disk")


RUN = ["pretrain", "demo", "--device", "cpu", "--batch-size", "32"]
SETTINGS = {
    "engine.threads": 1, "engine.precision": "float32", "method.group_size": 8,
    "save.every_steps": 3, "log.every_steps": 1, "monitor.every_epochs": 0,
    "data.workers": 0, "optim.lr": 1e-3,
}  # fmt: skip
for name, value in SETTINGS.items():
    RUN += ["--set", f"{name}={value}"]


def begin(*words, wrap=(), **options):
    command = [*wrap, sys.executable, "-m", "mocokit", *RUN, *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def end(process, seconds=150):
    try:
        return process.communicate(timeout=seconds)[1]
    finally:
        process.kill()


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_starters_equal_one_process(toy_npz, tmp_path):
    out = tmp_path / "two"
    place = f"localhost:{free_port()}"
    words = [toy_npz, "--epochs", "2", "--out", out, "--nodes", "2", "--rdzv", place]
    starters = [begin(*words), begin(*words)]
    texts = [end(process) for process in starters]
    assert [process.returncode for process in starters] == [0, 0], texts
    assert sum(text.count("finished: ") for text in texts) == 1
    one = tmp_path / "one"
    mocokit.pretrain("demo", toy_npz, one, epochs=2, batch_size=32, device="cpu", settings=SETTINGS)
    assert len(losses(one)) == 10
    assert losses(out) == pytest.approx(losses(one), rel=1e-5)
    assert checkpoint.load(out / "last.pt")["processes"] == 2


def processes_of(starter):
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == starter.pid and "\0RANK=" in (path / "environ").read_text():
                found.append(int(path.name))
        except (OSError, ValueError):
            continue
    return found


def wait_for(what, starter):
    deadline = time.monotonic() + 150
    while not (found := what()):
        assert starter.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_hangups_and_the_death_of_the_starter(hangups, toy_npz, tmp_path):
    """Ignored SIGHUP: nothing happens. kill -9 of the starter, whose stderr nobody reads: its
    processes save and end. SIGHUP that is not ignored: saved, 75.
    """
    out = tmp_path / "run"
    steps = lambda: checkpoint.steps(out / "checkpoints")  # noqa: E731
    words = [toy_npz, "--epochs", "400", "--out", out, "--processes", "2"]
    ignoring = begin(*words, wrap=["nohup"], stdout=subprocess.DEVNULL)
    wait_for(steps, ignoring)
    children = processes_of(ignoring)
    assert len(children) == 2
    for process in (ignoring.pid, *children):
        os.kill(process, signal.SIGHUP)
    ignoring.stderr.close()
    before = steps()[-1]
    wait_for(lambda: steps()[-1] > before + 3, ignoring)
    ignoring.kill()
    killed = time.monotonic()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() - killed < 60
        time.sleep(0.05)
    ignoring.wait()
    last = checkpoint.load(out / "last.pt")["step"]
    assert last % 3 or len(losses(out)) == last  # saved at its end, not when it was due
    assert last < 400 * 5

    usual = begin(*words)
    wait_for(lambda: steps()[-1] > last + 3, usual)
    usual.send_signal(signal.SIGHUP)
    text = end(usual)
    assert usual.returncode == 75, text
    assert f"resumed after step {last}" in text
    assert text.count("and saved; resume with the same command") == 1
    assert "Traceback" not in text


@pytest.fixture
def namespaces():
    """Two network namespaces joined by a cable, 10.77.0.1 and .2: two hosts, as far as IP goes."""
    names = [f"mocokit{os.getpid()}{side}" for side in "ab"]
    tool = shutil.which("ip")
    if tool is None or os.geteuid() != 0:
        pytest.skip("needs root, and the command ip, to make network namespaces")

    def ip(*words):
        done = subprocess.run([tool, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this machine makes no network namespaces: {done.stderr.strip()}")

    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip(
            "-n",
            names[0],
            "link",
            "add",
            "cable",
            "type",
            "veth",
            "peer",
            "cable",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield [[tool, "netns", "exec", name] for name in names]
    finally:
        for name in made:
            subprocess.run([tool, "netns", "del", name], check=False)


@pytest.mark.slow
def test_two_hosts_equal_one_process(toy_npz, tmp_path, namespaces):
    """Two processes on the first, one on the second; the second is stopped, and both resume."""
    out = tmp_path / "hosts"
    words = [toy_npz, "--epochs", "2", "--out", out, "--nodes", "2", "--rdzv", "10.77.0.1:29500"]
    first = begin(*words, "--processes", "2", wrap=namespaces[0])
    second = begin(*words, wrap=namespaces[1])
    texts = [end(first), end(second)]
    assert [first.returncode, second.returncode] == [0, 0], texts
    one = tmp_path / "one"
    mocokit.pretrain("demo", toy_npz, one, epochs=2, batch_size=32, device="cpu", settings=SETTINGS)
    assert losses(out) == pytest.approx(losses(one), rel=1e-5)
    assert checkpoint.load(out / "last.pt")["processes"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("end_of", ["the host of the store", "the other"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_one_starter_of_two(toy_npz, tmp_path, end_of, number):
    out = tmp_path / "run"
    place = f"127.0.0.1:{free_port()}"
    words = [toy_npz, "--epochs", "400", "--out", out, "--nodes", "2", "--rdzv", place]
    host = begin(*words)
    wait_for(lambda: not free(place), host)
    other = begin(*words)
    wait_for(lambda: checkpoint.steps(out / "checkpoints"), host)
    ended, left = (host, other) if end_of == "the host of the store" else (other, host)
    ended.send_signal(number)
    text = end(left, 70)
    assert left.returncode == 75, text
    assert text.count("and saved; resume with the same command") == 1
    assert "Traceback" not in text
    end(ended)
    assert ended.returncode == (-9 if number == signal.SIGKILL else 75)


@pytest.mark.slow
def test_all_machines_begin_again_after_a_failure_on_one(toy_npz, tmp_path):
    """torch counts the restart where the killed process was, and not always elsewhere."""
    out = tmp_path / "run"
    place = f"127.0.0.1:{free_port()}"
    words = [toy_npz, "--epochs", "400", "--out", out, "--nodes", "2", "--rdzv", place]
    host = begin(*words, "--restarts", "1")
    wait_for(lambda: not free(place), host)
    other = begin(*words, "--restarts", "1")
    wait_for(lambda: checkpoint.steps(out / "checkpoints"), host)
    os.kill(processes_of(other)[0], signal.SIGKILL)
    before = checkpoint.steps(out / "checkpoints")[-1]
    wait_for(lambda: checkpoint.steps(out / "checkpoints")[-1] > before + 9, host)
    host.terminate()
    texts = [end(process) for process in (host, other)]
    assert [host.returncode, other.returncode] == [75, 75], texts
    assert sum(text.count("resumed after step") for text in texts) == 1


def free(place):
    try:
        with socket.create_server((place.split(":")[0], int(place.split(":")[1]))):
            return True
    except OSError:
        return False
