"""Peak memory and time of an end-to-end step, undivided and in pieces, as the batch grows.

python benchmarks/gradcache.py [--backbone resnet18] [--size 32] [--batches 64 128 256 512]

Each figure is of a process of its own (its peak memory cannot be taken back); on CUDA the peak is
of the allocator, on a CPU it is the growth of the process's resident memory over that before the
step. Times are of the second of two steps; read them as ratios within one run.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from mocokit import recipes
from mocokit.methods.method import Step
from mocokit.run.build import build_method
from mocokit.settings import replace
from mocokit.settings.sizes import resolve


def measure(arguments, batch, micro_batch):
    """Peak MiB of a step beyond what stood before it, and seconds of the second step."""
    settings = replace(
        recipes.endtoend_cifar10(),
        {
            "net.backbone": arguments.backbone,
            "views.size": arguments.size,
            "train.batch_size": batch,
            "train.micro_batch": micro_batch,
        },
    )
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    method = build_method(settings, resolve(settings, 10 * batch)).to(device).train()
    views = torch.randn(2, batch, 3, arguments.size, arguments.size, device=device)
    index = torch.arange(batch, device=device)
    method(tuple(views[:, : 2 * 64]), index[: 2 * 64], Step(0, 0, min(batch, 128))).loss.backward()
    method.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = resident()
    for _ in range(2):
        started = time.perf_counter()
        method(tuple(views), index, Step(0, 0, batch)).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        method.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20 - before, seconds
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, seconds


def resident():
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments, *arguments.one)))
        return
    print("| batch | pieces of | peak MiB | seconds |\n| --- | --- | --- | --- |")
    for batch in arguments.batches:
        for micro_batch in (None, arguments.micro_batch):
            one = ["--one", json.dumps([batch, micro_batch])]
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], *one], capture_output=True, text=True
            )
            if done.returncode:
                print(f"| {batch} | {micro_batch or 'all'} | {done.stderr.splitlines()[-1]} | |")
                continue
            peak, seconds = json.loads(done.stdout.splitlines()[-1])
            print(f"| {batch} | {micro_batch or 'all'} | {peak:,.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
