"""On a CUDA device: images per second of two MoCo v2 views at 224 px, beside a ResNet-50 step.

The step is MoCo's: query forward and backward, key forward, under bfloat16, channels last. Both are
timed over whole batches with one synchronisation at the end, five rounds each, interleaved; the
median is told. Canvases are 300 x 400, pinned, sent to the device in every batch.

    python benchmarks/views_cuda.py [--batch-size 256]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from views import OURS, Task, mocokit_


def timed(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one run, device included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def step_of(batch: int) -> Callable[[], object]:
    encoder, key_encoder = (
        timm.create_model("resnet50", num_classes=128).cuda().to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    encoder.compile()
    key_encoder.compile()
    views = torch.randn(2, batch, 3, 224, 224, device="cuda")
    query, key = (view.to(memory_format=torch.channels_last) for view in views)

    def run() -> object:
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                keys = key_encoder(key)
            loss = (encoder(query) * keys).sum(1).float().mean()
        loss.backward()
        encoder.zero_grad(set_to_none=True)
        return loss

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    batch = parser.parse_args().batch_size
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device; benchmarks/views.py measures CPUs.")
    views, step, numbers = (
        mocokit_(Task(224, batch, 300, 400), "cuda"),
        step_of(batch),
        iter(range(10**6)),
    )
    runs = {OURS: lambda: views(next(numbers), slice(None)), "ResNet-50 step": step}
    for run in runs.values():
        timed(run, 5)  # compiled, and warm
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5):
        for name, run in runs.items():
            seconds[name].append(timed(run, 10))
    medians = {name: statistics.median(part) for name, part in seconds.items()}
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {batch}, 224 px, n = 5"
    )
    for name, median in medians.items():
        print(f"{name}: {batch / median:.0f} images/s, {1000 * median:.2f} ms a batch")
    print(f"views / step: {medians[OURS] / medians['ResNet-50 step']:.1%}")


if __name__ == "__main__":
    main()
