"""One process for each GPU: starts torch.distributed.run, and reports how the processes ended.

Started processes write a known error to a file instead of printing it, so that it is printed once.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mocokit.errors import Interrupted, MocokitError, UserError
from mocokit.files import write_text

REPORTS = "MOCOKIT_REPORTS"  # the environment's name for the folder of reports
STOPS = (75, 130)
PATIENCE = 50  # seconds for processes to end after SIGTERM; then they are killed


def count_processes(device: str, processes: int | None, nodes: int) -> int | None:
    """How many processes to start on this machine; None to stay a single one."""
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
    return None if number == 1 and nodes == 1 else number


def launch(
    arguments: Sequence[str], processes: int, nodes: int, rdzv: str | None, restarts: int
) -> None:
    """Run `mocokit` with these arguments in so many processes on each of so many machines.

    Returns when all finished. Raises what ended them: UserError, Interrupted, MocokitError.
    """
    if nodes > 1 and rdzv is None:
        raise UserError(
            f"--nodes {nodes} needs --rdzv HOST:PORT, the same on every machine: one of them, and "
            "a free port there"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    where = ["--standalone"]
    if rdzv is not None:
        where = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rdzv}"]
        where += ["--rdzv-id=mocokit"]
    each = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    from mocokit.engine.runtime import default_threads

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, default_threads() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    # A run stops for either signal, but torch's launcher passes on SIGTERM only.
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="mocokit-") as folder:
        os.environ[REPORTS] = folder
        try:
            asked = parse_args([*where, *each, "-m", "mocokit", *arguments])  # type: ignore[no-untyped-call]
            run(asked)  # type: ignore[no-untyped-call]
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            raise ended(read_reports(Path(folder)), codes) from None
        except SignalException:
            raise ended(read_reports(Path(folder)), {}) from None
        finally:
            del os.environ[REPORTS]


def report(error: MocokitError) -> bool:
    """Report this process's error to the launcher; false without one, or if that fails."""
    folder = os.environ.get(REPORTS)
    if folder is None:
        return False
    rank, attempt = (int(os.environ.get(n, "0")) for n in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    content: dict[str, Any] = {"rank": rank, "attempt": attempt, "time": time.time()}
    content |= {"code": error.exit_code, "text": str(error)}
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


def end_again() -> None:
    """In a restarted process, raise an error that a new start cannot cure: a mistake or a stop."""
    if REPORTS in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        for one in read_reports(Path(os.environ[REPORTS])):
            if one["code"] != MocokitError.exit_code:
                raise _error(one["code"], one["text"])


def ended(reports: Sequence[Mapping[str, Any]], codes: Mapping[int, int]) -> MocokitError:
    """The error of processes that did not all finish.

    `codes` are the exit codes of the failed ones by rank; none if the launcher got the signal.
    A process that torch ends because another one failed may report a stop. A stop counts only if
    all failed processes report one.
    """
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
    remedy = "resume from the last checkpoint with the same command and --out RUN_FOLDER"
    ends = [_end(rank, code) for rank, code in sorted(codes.items()) if code not in STOPS]
    killed = [end for end in ends if "was ended by" in end]
    if ends:
        return MocokitError(f"{'; '.join(killed or ends)}; {remedy}")
    return MocokitError(f"stopped before the processes had saved; {remedy}")


def _end(rank: int, code: int) -> str:
    if code >= 0 or -code == signal.SIGTERM:  # ended because another failed
        return f"process {rank} failed; its error is above"
    why = " (out of memory, or killed by a user)" if -code == signal.SIGKILL else ""
    return f"process {rank} was ended by {signal.Signals(-code).name}{why}"


def _error(code: int, text: str) -> MocokitError:
    if code in STOPS:
        return Interrupted(text, code)
    return UserError(text) if code == UserError.exit_code else MocokitError(text)
