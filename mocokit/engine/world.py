"""Which processes make up a run, as whoever started them announces it."""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mocokit.errors import UserError


@dataclass(frozen=True)
class World:
    """Which of how many processes this is; rank 0 alone writes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def writes(self) -> bool:
        return self.rank == 0


class Announced(NamedTuple):
    """A process's place, and where the first one listens."""

    world: World
    local_size: int  # processes on this machine
    bound: bool  # each to processors of its own
    address: str
    port: int


def announced(environment: Mapping[str, str]) -> Announced | None:
    """What torchrun, a step of SLURM or Open MPI announces; None for a process on its own.

    MASTER_ADDR and MASTER_PORT hold wherever they are set. Raises UserError where the address of
    the first process is not known.
    """
    get = environment.get
    place: tuple[str, ...]
    address: str | None
    if "RANK" in environment and "WORLD_SIZE" in environment:  # torchrun
        place = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        address, port = get("MASTER_ADDR"), 29500
    elif int(get("OMPI_COMM_WORLD_SIZE", "1")) > 1:  # before SLURM, which may have started it
        place = tuple(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        one_machine = get(place[1]) == get(place[3])
        address = "127.0.0.1" if one_machine else None
        job = get("PMIX_NAMESPACE") or get("OMPI_MCA_ess_base_jobid")  # of Open MPI 4 and 5; to 4
        port = _port(zlib.crc32(job.encode())) if job else 29500
    elif int(get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # not a job's: its script has no step
        place = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"
        address = first_host(get("SLURM_STEP_NODELIST", ""))
        number, step = (int(get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = _port(number * 16 + step)
    else:
        return None
    address = get("MASTER_ADDR", address)
    if not address:
        raise UserError(
            f"{place[0]} announces a process of several, but MASTER_ADDR, the machine of the first "
            "one, is not set; set it, or start with `mocokit pretrain` or torchrun"
        )
    rank, size, local_rank = (int(get(name, "0")) for name in place[:3])
    local = re.match(r"\d+", get(place[3], "1"))  # SLURM writes 4(x2) for two machines of 4
    return Announced(
        World(rank, size, local_rank),
        int(local[0]) if local else 1,
        place[0] != "RANK",
        address,
        int(get("MASTER_PORT", str(port))),
    )


def _port(job: int) -> int:
    """One that follows from the job: two on one machine need two."""
    return 20000 + job % 10000


def first_host(hosts: str) -> str | None:
    """The first of SLURM's list of hosts.

    >>> first_host("gpu[07-09,12],login1")
    'gpu07'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first[0]) if first else None
