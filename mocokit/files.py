"""Files that are written whole, and memory that is kept."""

import os
from pathlib import Path

import numpy as np

_LARGEST = 2**25 - 2**16  # bytes; glibc's own limit is 32 MiB with what it adds to a block


def keep_freed_memory() -> None:
    """Under glibc, let what is freed stay with the process; elsewhere this does nothing.

    glibc returns large blocks to the system at once, and more below them, so that a loop that frees
    and takes some megabytes for each batch has every page cleared for it anew. What it calls large
    is the largest such block that was ever freed, up to 32 MiB: so one is taken and freed.
    """
    np.empty(_LARGEST, np.uint8)


def write_text(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
