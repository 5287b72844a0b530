"""Nobody listens: closed pipes, full logs, closed streams, hang-ups; exit codes stay right."""

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from test_contract import interrupted_at
from test_full_disk import SETTINGS

import mocokit
from mocokit.cli import streams
from mocokit.engine.record import Console, Progress
from mocokit.engine.stop import StopSignals
from mocokit.errors import Interrupted, MocokitError, UserError
from mocokit.files import Unheard
from mocokit.methods.moco import MoCo

COMMAND = [sys.executable, "-m", "mocokit"]


class Broken:
    """A stream that refuses everything in its own way."""

    encoding = "utf-8"

    def __init__(self, error, terminal):
        self.error, self.terminal = error, terminal

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    def isatty(self):
        return self.terminal

    def fileno(self):
        raise ValueError("no file")


REFUSALS = {
    "closed pipe": BrokenPipeError(32, "Broken pipe"),
    "full disk": OSError(28, "No space left on device"),
    "terminal gone": OSError(5, "Input/output error"),
    "closed": ValueError("I/O operation on closed file."),
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", [*REFUSALS, "none"])
def test_everything_that_prints_goes_on_in_silence(monkeypatch, name, terminal):
    monkeypatch.setattr(sys, "stderr", None if name == "none" else Broken(REFUSALS[name], terminal))
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    console.say("a sentence")
    console.note("a note")
    console.table("title", ["a"], [("b",)])
    for step in (1, 2, 3):
        with console.counting("images", 3) as advance:
            advance(step)
    progress = Progress(console.terminal, 2, 0, 1)
    values = {"loss": 1.0, "images_per_s": 1.0, "data_wait": 0.0}
    for step in (1, 2):
        progress.show(step, values)
        time.sleep(0.3 * terminal)  # the line is redrawn by a thread
    progress.close()
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # Python prints it
        warnings.warn("a library's", stacklevel=1)


def test_text_that_a_stream_cannot_encode_is_escaped(tmp_path):
    with open(tmp_path / "log", "w", encoding="ascii") as file:
        Unheard(file).write("caf\xe9 \udce9 \u202e\n")
    assert (tmp_path / "log").read_text() == "caf\\xe9 \\udce9 \\u202e\n"


@pytest.mark.parametrize("name", REFUSALS)
def test_a_run_that_nobody_hears_finishes(toy_npz, tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "stderr", Broken(REFUSALS[name], terminal=True))
    changes = {"out": tmp_path / "run", "epochs": 1, "batch_size": 32, "settings": SETTINGS}
    assert mocokit.pretrain("demo", toy_npz, **changes).result["finished"]


def run_command(shell):
    """The exit codes of a pipeline, and what it said."""
    line = f"{shell}; echo codes ${{PIPESTATUS[@]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    *text, codes = done.stdout.splitlines()
    return [int(code) for code in codes.split()[1:]], "\n".join(text) + done.stderr


RECIPES = f"{sys.executable} -m mocokit recipes"
NONE = f"{sys.executable} -m mocokit pretrain mocov2 /no/such/images"


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        (f"{RECIPES} | head -c 1", 0, ""),
        (f"{RECIPES} | sleep 0", 0, ""),
        (f"{RECIPES} > /dev/full", 1, "mocokit: cannot write the output (No space left on device)"),
        (f"{RECIPES} >&-", 0, ""),
        (f"{NONE} 2>&1 >/dev/null | true", 2, ""),
        (f"{NONE} 2>/dev/full", 2, ""),
        (f"{NONE} 2>&-", 2, ""),
        (f"{NONE} <&- >&- 2>&-", 2, ""),
        (f"PYTHONIOENCODING=ascii {RECIPES} simclr_imagenet > /dev/null", 2, "mocokit"),
    ],
    ids=range(9),
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full and bash")
def test_exit_codes_stay_right(shell, code, says):
    codes, text = run_command(shell)
    assert codes[0] == code, text
    assert "Traceback" not in text and "Exception" not in text
    assert says in text
    if not says:
        assert "mocokit:" not in text


def refused(verb, monkeypatch, capsys):
    """main() while a verb raises: its exit code, and what it says."""
    from mocokit.cli import app

    def failing(*arguments, **named):
        raise verb

    monkeypatch.setattr(app.show_, "recipe_list", failing)
    monkeypatch.setattr(sys, "argv", ["mocokit", "recipes"])
    with pytest.raises(SystemExit) as end:
        app.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(28, "No space left on device", "/a/b"), 1, "/a/b: No space left on device"),
        (PermissionError(13, "Permission denied", b"/a\xe9"), 1, "/a\\udce9: Permission denied"),
        (OSError(18, "Invalid link", "/a", None, "/b"), 1, "/a or /b: Invalid link"),
        (OSError(9, "Bad file descriptor", 7), 1, "mocokit: Bad file descriptor"),
        (OSError("nothing else\nis known"), 1, "mocokit: nothing else is known"),
        (BrokenPipeError(32, "Broken pipe"), 1, "mocokit: Broken pipe"),  # not the output's
        (TimeoutError(), 1, "mocokit: "),
        (UserError("a mistake"), 2, "mocokit: a mistake"),
        (MocokitError("a failure"), 1, "mocokit: a failure"),
        (Interrupted("stopped", 75), 75, "mocokit: stopped"),
    ],
)
def test_whatever_escapes_is_one_sentence(monkeypatch, capsys, error, code, says):
    found, text = refused(error, monkeypatch, capsys)
    assert found == code and says in text
    assert len(text.splitlines()) == 1 and "Traceback" not in text


def test_output_that_is_lost_is_told_apart():
    for error, text in (
        (BrokenPipeError(32, "Broken pipe"), ""),
        (ValueError("closed"), ""),
        (OSError(5, "Input/output error"), "cannot write the output (Input/output error)"),
    ):
        assert streams.lost(Unheard(Broken(error, terminal=False))) == text


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on Windows")
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_a_hang_up_saves_unless_it_is_ignored(toy_npz, tmp_path, monkeypatch, ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: kill(pid, signal.SIGHUP))
    interrupted_at(monkeypatch, MoCo, 1)
    changes = {"out": tmp_path / "run", "epochs": 1, "batch_size": 32, "settings": SETTINGS}
    try:
        if ignored:
            assert mocokit.pretrain("demo", toy_npz, **changes).result["finished"]
        else:
            with pytest.raises(Interrupted, match="stopped after step 2 and saved") as caught:
                mocokit.pretrain("demo", toy_npz, **changes)
            assert caught.value.exit_code == 75
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on Windows")
def test_all_signals_for_a_stop_are_taken_and_given_back(hangups):
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with StopSignals() as stop:
            os.kill(os.getpid(), number)
            assert stop.asked and stop.exit_code == (130 if number == signal.SIGINT else 75)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [("2>&1 | head -2", 0), ("2>/dev/full", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0)],
)
def test_a_command_that_nobody_hears_finishes(toy_npz, tmp_path, ending, code):
    words = [*COMMAND, "pretrain", "demo", str(toy_npz), "--out", str(tmp_path / "run")]
    words += ["--epochs", "1", "--batch-size", "32", "--set", "log.every_steps=1"]
    codes, text = run_command(f"{' '.join(words)} {ending}")
    assert codes[0] == code and "Traceback" not in text
    assert (tmp_path / "run/backbone.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on Windows")
def test_a_terminal_that_closes(hangups, toy_npz, tmp_path):
    """The real thing: a pseudo-terminal, whose closing sends SIGHUP and fails every write."""
    import pty

    out = tmp_path / "run"
    words = [*COMMAND, "pretrain", "demo", str(toy_npz), "--out", str(out), "--epochs", "100000"]
    words += ["--batch-size", "32", "--set", "log.every_steps=1", "--set", "data.workers=1"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
        assert time.monotonic() < deadline
        os.read(terminal, 10000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert (out / "last.pt").is_file()
