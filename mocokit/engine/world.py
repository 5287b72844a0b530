"""The processes of a run, as the program that started them announces them."""

import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mocokit.errors import MocokitError, UserError
from mocokit.files import brief, printable

ATTEMPT = "MOCOKIT_ATTEMPT"  # set by `mocokit pretrain` for the processes that it starts


class ProcessLost(MocokitError):
    """Another process of the run no longer answers."""


def attempts(environment: Mapping[str, str]) -> int:
    """0 in the processes that were started first; another number, the same in all, after restarts.

    torchrun's count is that of one machine, and may differ between machines; ours does not.
    """
    name = ATTEMPT if environment.get(ATTEMPT) else "TORCHELASTIC_RESTART_COUNT"
    return number_in(environment, name, 0)


def number_in(environment: Mapping[str, str], name: str, default: int, high: int = 10**9) -> int:
    """A whole number from 0 to `high` that a starter of processes sets. Raises UserError."""
    text = environment.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > high:
        raise UserError(
            f"the environment has {name}={brief(text)}, which is no whole number from 0 to "
            f"{high:,}; it is for the program that starts the processes to set, so unset it, or "
            "correct it"
        )
    return int(text)


def check_name(address: str) -> None:
    """Raise UserError for the name of a machine that nobody knows: it would be waited for in vain.

    A name server that does not answer now may answer later.
    """
    try:
        socket.getaddrinfo(address, None)
    except socket.gaierror as error:
        if error.errno != socket.EAI_NONAME:
            return
        raise UserError(
            f"MASTER_ADDR, the machine of the first process, is {brief(address)!r}, which no "
            "machine is called; correct it"
        ) from None


def lost(error: RuntimeError) -> ProcessLost | None:
    """The error in one sentence, if gloo or NCCL report by it that another process is gone."""
    from torch.distributed import DistError

    text = str(error)
    if not isinstance(error, DistError) and "/gloo/" not in text and not text.startswith("Gloo "):
        return None
    why = text.splitlines()[0].rpartition("] ")[2].partition(". ")[0]
    return ProcessLost(
        f"lost another process of the run ({printable(why)[:200]}); the last line of the command "
        "that started that one says why; resume from the last checkpoint with the same command and "
        "--out RUN_FOLDER"
    )


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes. Only rank 0 writes files."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        return self.rank == 0


class Announced(NamedTuple):
    """The rank of a process, and the address at which the first one listens."""

    world: World
    local_size: int  # processes on this machine
    bound: bool  # whether each process is bound to its own processors
    address: str
    port: int


def announced(environment: Mapping[str, str]) -> Announced | None:
    """The announcement of torchrun, a SLURM step or Open MPI; None for a single process.

    MASTER_ADDR and MASTER_PORT take precedence if they are set. Raises UserError if the address of
    the first process is not known, or a number cannot be.
    """
    get = environment.get
    place: tuple[str, ...]
    address: str | None
    if "RANK" in environment and "WORLD_SIZE" in environment:  # torchrun
        place = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        address, port = get("MASTER_ADDR"), 29500
    # Before SLURM, because SLURM may have started mpirun.
    elif number_in(environment, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        place = tuple(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        one_machine = get(place[1]) == get(place[3])
        address = "127.0.0.1" if one_machine else None
        job = get("PMIX_NAMESPACE") or get("OMPI_MCA_ess_base_jobid")  # Open MPI 4 and 5; up to 4
        port = _port(zlib.crc32(job.encode())) if job else 29500
    # Not SLURM_NTASKS, which a batch script has outside of any step.
    elif number_in(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        place = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
        address = first_host(get("SLURM_STEP_NODELIST", ""))
        names = "SLURM_JOB_ID", "SLURM_STEP_ID"
        number, step = (number_in(environment, name, 0, 2**32) for name in names)
        port = _port(number * 16 + step)
    else:
        return None
    address = get("MASTER_ADDR", address)
    if not address:
        raise UserError(
            f"{place[0]} announces one of several processes, but MASTER_ADDR, the machine of the "
            "first process, is not set; set it, or start with `mocokit pretrain` or torchrun"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.:%-]{1,255}", address):
        raise UserError(
            f"MASTER_ADDR, the machine of the first process, is {brief(address)!r}, which is "
            "neither a name nor an address"
        )
    rank, size, local_rank = (number_in(environment, name, 0) for name in place[:3])
    if max(rank, local_rank) >= size:
        raise UserError(
            f"the environment announces process {rank}, on its machine {local_rank}, of {size} "
            f"({place[0]}, {place[2]}, {place[1]}), and processes count from 0; correct it, or "
            "start with `mocokit pretrain` or torchrun"
        )
    local = re.match(r"\d+", get(place[3], "1"))  # SLURM writes 4(x2) for two machines of 4
    return Announced(
        World(rank, size, local_rank),
        int(local[0]) if local else 1,
        place[0] != "RANK",
        address,
        number_in(environment, "MASTER_PORT", port, 2**16 - 1),
    )


def _port(job: int) -> int:
    """A port that follows from the job, so that two jobs on one machine use two ports."""
    return 20000 + job % 10000


def first_host(hosts: str) -> str | None:
    """The first host of a SLURM host list.

    >>> first_host("gpu[07-09,12],login1")
    'gpu07'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0]) if first else None
