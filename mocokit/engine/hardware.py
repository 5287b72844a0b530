"""The names and sizes of this machine's parts, for results and bug reports."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mocokit.errors import UserError


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not name the model."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """The machine's main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):  # not POSIX
        return None


@contextmanager
def room_for(what: str, needed: int) -> Iterator[None]:
    """Raise UserError if `needed` bytes exceed the main memory, or what the block takes does.

    `what` names the settings that the size follows from.
    """
    have = memory_gib()
    problem = f"{what} needs about {needed / 2**30:,.1f} GiB of memory"
    if have is not None and needed / 2**30 > have:
        raise UserError(f"{problem}, and this machine has {have:,.0f}; set smaller ones")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for a CPU's memory.
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise UserError(f"{problem}, which is not to be had; set smaller ones") from None


def gpus() -> list[str]:
    """Each visible GPU with its memory."""
    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{one.name}, {one.total_memory / 2**30:.1f} GiB" for one in found]
