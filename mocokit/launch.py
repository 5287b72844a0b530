"""One process for each GPU: starts torch.distributed.run, and passes on how they ended.

Started processes leave a report of a known error instead of printing it, so that it is told once.
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

REPORTS = "MOCOKIT_REPORTS"  # the environment's name for the folder of reports


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
    # What SIGUSR1 asks of a run, SIGTERM asks too; the starter knows the latter.
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
    """Leave a report of this process's error, if one is wanted."""
    folder = os.environ.get(REPORTS)
    if folder is None or not os.path.isdir(folder):
        return False
    rank = int(os.environ.get("RANK", "0"))
    told = {"rank": rank, "time": time.time(), "code": error.exit_code, "text": str(error)}
    path = Path(folder) / f"{rank}.json"
    path.with_suffix(".partial").write_text(json.dumps(told), encoding="utf-8")
    path.with_suffix(".partial").replace(path)
    return True


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports left behind, by time."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda told: told["time"])


def ended(reports: Sequence[Mapping[str, Any]], codes: Mapping[int, int]) -> MocokitError:
    """What to say of processes that did not all finish: their reports, and exit codes by rank."""
    if reports:
        first = reports[0]
        code, text = first["code"], first["text"]
        if any(told["text"] != text for told in reports) or len(codes) > len(reports):
            text = f"process {first['rank']}: {text}"
        if code == UserError.exit_code:
            return UserError(text)
        return Interrupted(text, code) if code != MocokitError.exit_code else MocokitError(text)
    going_on = "go on from the last checkpoint with the same command and --out RUN_FOLDER"
    # Those that were told to end for another's failure are no cause.
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    for rank, number in killed.items():
        name = signal.Signals(number).name
        memory = " (out of memory, or somebody's kill)" if number == signal.SIGKILL else ""
        return MocokitError(f"process {rank} was ended by {name}{memory}; {going_on}")
    if codes:
        return MocokitError(f"process {min(codes)} failed, as told above; {going_on}")
    return MocokitError(f"stopped before the processes had saved; {going_on}")
