"""Peak memory and time of InfoNCE and its gradient against a queue of a million keys.

python benchmarks/streamed.py [--queries 256] [--keys 1000000] [--chunks 0 4096 65536]

Each chunk size is a process of its own; 0 compares with all keys at once. The peak is the growth of
resident memory beyond queries and queue. Read times as ratios within one run.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from mocokit.methods.losses import InfoNCE
from mocokit.methods.similarity import Negatives


def measure(queries, keys, chunk):
    """Peak MiB, seconds, loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    query, key = (F.normalize(torch.randn(queries, 128), dim=1) for _ in range(2))
    rows = torch.randn(keys, 128)
    rows /= rows.norm(dim=1, keepdim=True)
    query.requires_grad_()
    InfoNCE(0.2)((query * key).sum(1), *_compare(query, rows[:512], None)).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    loss = InfoNCE(0.2)((query * key).sum(1), *_compare(query, rows, chunk or None))
    loss.backward()
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return peak, seconds, float(loss.detach())


def _compare(query, rows, chunk):
    compared = Negatives(rows, chunk=chunk).compare(query, [0.2])
    return compared.log_sums, compared.number


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 65536, 4096])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(*measure(arguments.queries, arguments.keys, arguments.one))
        return
    print("| keys at a time | peak MiB | seconds | loss |\n| --- | --- | --- | --- |")
    for chunk in arguments.chunks:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, seconds, loss = map(float, done.stdout.split())
        print(f"| {chunk or 'all'} | {peak:,.0f} | {seconds:.1f} | {loss:.6f} |", flush=True)


if __name__ == "__main__":
    main()
