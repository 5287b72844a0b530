"""An epoch's order for one process of many: time, memory, and that each image comes once.

Nothing is listed or read: this is what deciding who reads what costs.

    python benchmarks/order.py [--images 1000000000] [--processes 8 64 512] [--per-gpu 32]
"""

import argparse
import resource
import time

import numpy as np

from mocokit.chance import Order

BLOCK = 2**20  # positions asked at once where the whole of a process's share is drawn


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def share_of_epoch(images: int, processes: int, per_gpu: int) -> tuple[float, float]:
    """Seconds of one process for a step's window, and for those of an epoch."""
    batch = processes * per_gpu
    steps = images // batch
    tried = min(2000, steps)
    start = time.process_time()
    order = Order(0, 1, images)
    for step in range(tried):
        order[np.arange(step * batch, step * batch + per_gpu)]
    seconds = time.process_time() - start
    return seconds / tried, seconds * steps / tried


def whole(images: int) -> tuple[float, bool]:
    """Seconds for all positions, and whether every image came once."""
    start = time.process_time()
    seen = np.zeros(images, bool)
    order = Order(0, 1, images)
    for first in range(0, images, BLOCK):
        seen[order[np.arange(first, min(first + BLOCK, images))]] = True
    return time.process_time() - start, bool(seen.all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--per-gpu", type=int, default=32)
    parser.add_argument("--whole", action="store_true", help="draw all of it; a byte an image")
    asked = parser.parse_args()
    print(f"{asked.images:,} images, {asked.per_gpu} of each batch for each process")
    before = peak()
    for processes in asked.processes:
        seconds, epoch = share_of_epoch(asked.images, processes, asked.per_gpu)
        print(
            f"{processes:4d} processes: {1e6 * seconds:.0f} us a step, {epoch:,.1f} s of one "
            f"process for its share of an epoch; memory +{peak() - before:.1f} MiB"
        )
    if asked.whole:
        seconds, once = whole(asked.images)
        print(f"all positions: {seconds:,.0f} s, every image once: {once}, peak {peak():,.0f} MiB")


if __name__ == "__main__":
    main()
