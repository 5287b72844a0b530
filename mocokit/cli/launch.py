"""One process for each GPU: starts them by torch's launcher, and reports how they ended.

Started processes write a known error to a file instead of printing it, so that it is printed once.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mocokit.engine.stop import PREEMPTED
from mocokit.engine.world import ATTEMPT, ProcessLost, attempts, number_in
from mocokit.errors import Interrupted, MocokitError, UserError
from mocokit.files import write_text

REPORTS = "MOCOKIT_REPORTS"  # the environment's name for the folder of reports
STARTER = "MOCOKIT_STARTER"  # and for the process number of the starter
STOPS = (75, 130)
PATIENCE = 50  # seconds for processes to end after SIGTERM; then they are killed
REMEDY = "resume from the last checkpoint with the same command and --out RUN_FOLDER"


def count_processes(
    device: str, processes: int | None, nodes: int, restarts: int = 0
) -> int | None:
    """How many processes to start on this machine; None to be the only one, never restarted."""
    with _without_logs_of_sockets():
        import torch

    if processes is None:
        number = 1
        if device in ("auto", "cuda") and torch.cuda.is_available():
            number = torch.cuda.device_count()
    else:
        number = processes
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number > visible and (device == "cuda" or (device == "auto" and visible)):
            raise UserError(
                f"--processes {number}, but {visible} GPUs are visible here; each process needs one"
            )
    return None if number == 1 and nodes == 1 and not restarts else number


def check_place(nodes: int, rdzv: str | None) -> None:
    """Raise UserError unless --rdzv is HOST:PORT for several machines, and absent for one."""
    if nodes > 1 and rdzv is None:
        raise UserError(
            f"--nodes {nodes} needs --rdzv HOST:PORT, the same on every machine: one of them, and "
            "a free port there"
        )
    if rdzv is not None and nodes == 1:
        raise UserError("--rdzv is where several machines meet; say how many with --nodes")
    if rdzv is not None:
        with _without_logs_of_sockets():
            from mocokit.cli import meeting

        meeting.place(rdzv)


def launch(
    arguments: Sequence[str],
    processes: int,
    nodes: int,
    rdzv: str | None,
    restarts: int,
    command: Mapping[str, str] | None = None,
) -> None:
    """Run `mocokit` with these arguments in so many processes on each of so many machines.

    `command` is what must be the same on all machines, by name. Returns when all finished. Raises
    what ended them: UserError, Interrupted, MocokitError.
    """
    with _quiet(), _signals(), tempfile.TemporaryDirectory(prefix="mocokit-") as folder:
        os.environ |= {REPORTS: folder, STARTER: str(os.getpid())}
        try:
            _start(arguments, processes, nodes, rdzv, restarts, dict(command or {}))
        finally:
            for name in (REPORTS, STARTER, ATTEMPT):
                os.environ.pop(name, None)


def _start(
    arguments: Sequence[str],
    processes: int,
    nodes: int,
    rdzv: str | None,
    restarts: int,
    command: dict[str, str],
) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from mocokit.cli import rounds
    from mocokit.engine.runtime import default_threads

    reports = Path(os.environ[REPORTS])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, default_threads() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    try:
        met = rounds.gather(rdzv, nodes, {**command, "--nodes": str(nodes)})
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            run_id="mocokit",
            rdzv_backend=rounds.BACKEND,
            rdzv_configs={"meeting": met, "ended": lambda: stopped(reports, processes)},
            max_restarts=restarts,
            signals_to_handle="SIGTERM,SIGINT,SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # or torch leaves a folder behind
        )
        # torch replaces ${local_rank} in arguments, and $$ by one $: ours must arrive as they are.
        words = [word.replace("$", "$$") for word in arguments]
        elastic_launch(config, sys.executable)("-u", "-m", "mocokit", *words)
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        raise ended(read_reports(reports), codes) from None
    except SignalException:
        raise ended(read_reports(reports), {}) from None
    except RendezvousError as error:
        if found := read_reports(reports):
            raise ended(found, {}) from None
        raise rounds.failure(error, rdzv, nodes) from None


@contextmanager
def _without_logs_of_sockets() -> Iterator[None]:
    """torch, loaded inside, prints no stack for each connection that fails; its processes may."""
    name = "TORCH_CPP_LOG_LEVEL"
    asked = os.environ.get(name)
    os.environ.setdefault(name, "FATAL")
    try:
        yield
    finally:
        if asked is None:
            del os.environ[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and tracebacks of torch's launcher: how a run ended is told in one sentence.

    LOGLEVEL, torch's own variable, asks for them.
    """
    before = logging.root.manager.disable
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _signals() -> Iterator[None]:
    """In the starter: each signal for a stop becomes SIGTERM, which torch's launcher passes on.

    Before torch has set its own handler there is nothing to save. A SIGHUP that was ignored when
    this began, as by nohup, stays ignored, here and in the processes, which inherit that.
    """

    def at_once(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped before the first step: there was nothing to save", PREEMPTED)

    def as_term(number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = {signal.SIGTERM: at_once, signal.SIGUSR1: as_term, signal.SIGHUP: as_term}
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGQUIT)
    }  # torch's
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def watch_starter() -> None:
    """In a process that `launch` started: if the starter dies, stop as if by SIGTERM.

    A thread looks every second. Where saving takes longer than PATIENCE, the process is killed, as
    the starter would do it.
    """
    if STARTER in os.environ and REPORTS in os.environ:
        threading.Thread(target=_end_with_starter, daemon=True).start()


def _end_with_starter() -> None:
    while not _orphaned():
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def _orphaned() -> bool:
    """Whether the starter of this process is gone: then it has another parent."""
    return os.name == "posix" and os.environ.get(STARTER, str(os.getppid())) != str(os.getppid())


def report(error: MocokitError) -> bool:
    """Report this process's error to the launcher; false without one, or if that fails."""
    folder = os.environ.get(REPORTS)
    if folder is None:
        return False
    if _orphaned():  # nobody is left to read it, or to clean up
        shutil.rmtree(folder, ignore_errors=True)
        return False
    rank, attempt = number_in(os.environ, "RANK", 0), attempts(os.environ)
    content: dict[str, Any] = {"rank": rank, "attempt": attempt, "time": time.time()}
    content |= {"code": error.exit_code, "text": str(error), "lost": isinstance(error, ProcessLost)}
    path = Path(folder) / f"{attempt}-{rank}.json"
    try:
        write_text(path, json.dumps(content))
    except OSError:
        return False
    return True


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of the latest attempt that left any, by time."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    latest = max((one["attempt"] for one in found), default=0)
    found = [one for one in found if one["attempt"] == latest]
    return sorted(found, key=lambda one: one["time"])


def stopped(folder: Path, processes: int) -> MocokitError | None:
    """The error that a new attempt cannot cure: a mistake of any process, or a stop of them all.

    A process that ends because another was killed reports a stop too, so one stop alone is none.
    """
    found = read_reports(folder)
    stops = [one for one in found if one["code"] in STOPS]
    mistakes = [one for one in found if one["code"] not in (*STOPS, MocokitError.exit_code)]
    final = mistakes or (stops if len(stops) >= processes else [])
    return _error(final[0]["code"], final[0]["text"]) if final else None


def end_again() -> None:
    """In a restarted process, raise an error that a new start cannot cure: a mistake or a stop."""
    if REPORTS in os.environ and attempts(os.environ):
        processes = number_in(os.environ, "LOCAL_WORLD_SIZE", 1)
        if error := stopped(Path(os.environ[REPORTS]), processes):
            raise error


def ended(reports: Sequence[Mapping[str, Any]], codes: Mapping[int, int]) -> MocokitError:
    """The error of processes that did not all finish.

    `codes` are the exit codes of the failed ones by rank; none if the launcher got the signal.
    A process that torch ends because another one failed may report a stop. A stop counts only if
    all failed processes report one. That another process was lost is told where nothing says why.
    """
    losses = [one for one in reports if one.get("lost")]
    reports = [one for one in reports if not one.get("lost")]
    stops = [one for one in reports if one["code"] in STOPS]
    mistakes = [one for one in reports if one["code"] not in STOPS]
    if stops and not mistakes and all(code in STOPS for code in codes.values()):
        return _error(stops[0]["code"], stops[0]["text"])
    if mistakes:
        first = mistakes[0]
        alone = len(codes) > 1 and any(one["text"] != first["text"] for one in reports)
        alone = alone or len(codes) > len(reports)
        who = f"process {first['rank']}: " if alone else ""
        return _error(first["code"], f"{who}{first['text']}")
    ends = [_end(rank, code) for rank, code in sorted(codes.items()) if code not in STOPS]
    killed = [end for end in ends if "was ended by" in end]
    if losses and not killed:
        return MocokitError(losses[0]["text"])
    if ends:
        return MocokitError(f"{'; '.join(killed or ends)}; {REMEDY}")
    return MocokitError(f"stopped before the processes had saved; {REMEDY}")


def _end(rank: int, code: int) -> str:
    if code >= 0 or -code == signal.SIGTERM:  # ended because another failed
        return f"process {rank} failed; its error is above"
    why = " (out of memory, or killed by a user)" if -code == signal.SIGKILL else ""
    return f"process {rank} was ended by {signal.Signals(-code).name}{why}"


def _error(code: int, text: str) -> MocokitError:
    if code in STOPS:
        return Interrupted(text, code)
    return UserError(text) if code == UserError.exit_code else MocokitError(text)
