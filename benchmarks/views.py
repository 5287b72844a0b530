"""Images per second of two full MoCo v2 views, ours beside the pipelines that others use.

An image counts once, when both of its views are made. Every pipeline starts from decoded pixels in
the form it wants (PIL images, uint8 tensors, our flat buffer), ends with a normalised float32
batch, and draws anew for every batch. Rounds are interleaved (A B C A B C), each pipeline making
batches for at least a fifth of a second in its turn; ratios are taken within a round. On two cores
every pipeline runs in two processes of one thread, ours and kornia's also on two torch threads.
Freed memory stays with the process, as in `mocokit pretrain`, for all pipelines. Peers that are not
installed are skipped with a sentence.

    python benchmarks/views.py [--quick] [--rounds 15]
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from mocokit.files import keep_freed_memory
from mocokit.settings.schema import Views
from mocokit.views.params import ViewSpec, draw_table
from mocokit.views.views import make_views

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BASE = "authors' (torchvision v1 on PIL)"
OURS = "mocokit"
TURN = 0.2  # seconds
Run = Callable[[int, slice], object]  # (round, which images) -> two batches of views


@dataclass(frozen=True)
class Task:
    """Views of `size` pixels of `batch` images of height x width."""

    size: int
    batch: int
    height: int
    width: int

    def canvases(self) -> np.ndarray:
        """(N, H, W, 3) uint8: smooth coloured fields with noise."""
        draw = np.random.default_rng(0)
        shape = (self.batch, max(2, self.height // 16), max(2, self.width // 16), 3)
        coarse = draw.integers(0, 256, shape, dtype=np.uint8)
        size = (self.width, self.height)
        fields = [np.asarray(Image.fromarray(one).resize(size)) for one in coarse]
        noise = draw.normal(0, 8, (self.batch, self.height, self.width, 3))
        return (np.stack(fields) + noise).clip(0, 255).astype(np.uint8)


class AuthorsBlur:
    """moco/loader.py of the authors' code."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def kernel_size(size: int) -> int:
    """A tenth of the side, made odd: SimCLR's rule, for peers whose blur wants a kernel."""
    return max(3, size // 10 // 2 * 2 + 1)


def mocokit_(task: Task, device: str = "cpu") -> Run:
    spec = ViewSpec(**Views(size=task.size).model_dump(), resize=max(256, task.size))
    flat = torch.from_numpy(task.canvases().reshape(-1))
    if device == "cuda":
        flat = flat.pin_memory()
    heights, widths = np.full(task.batch, task.height), np.full(task.batch, task.width)

    def run(number: int, part: slice) -> object:
        pixels = flat.view(task.batch, -1)[part].view(-1).to(device, non_blocking=True)
        index, sizes = np.arange(task.batch)[part], (heights[part], widths[part])
        tables = [draw_table(spec, 0, number, index, view, *sizes) for view in (0, 1)]
        return [make_views(spec, table, pixels, *sizes, device) for table in tables]

    return run


def authors(task: Task) -> Run:
    import torchvision.transforms as T

    view = T.Compose(
        [
            T.RandomResizedCrop(task.size, scale=(0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([AuthorsBlur()], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )
    return each([Image.fromarray(one) for one in task.canvases()], lambda x: [view(x), view(x)])


def torchvision_v2(task: Task) -> Run:
    import torchvision.transforms.v2 as T

    view = T.Compose(
        [
            T.RandomResizedCrop(task.size, scale=(0.2, 1.0), antialias=True),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([T.GaussianBlur(kernel_size(task.size), (0.1, 2.0))], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )
    tensors = torch.from_numpy(task.canvases()).permute(0, 3, 1, 2).contiguous()
    return each(list(tensors), lambda x: [view(x), view(x)])


def lightly(task: Task) -> Run:
    from lightly.transforms import MoCoV2Transform

    return each([Image.fromarray(one) for one in task.canvases()], MoCoV2Transform(task.size))


def each(images: list, both: Callable[[object], list[Tensor]]) -> Run:
    """A pipeline of single images, and the stacking that a loader does."""

    def run(number: int, part: slice) -> object:
        pairs = [both(image) for image in images[part]]
        return [torch.stack(view) for view in zip(*pairs, strict=True)]

    return run


def kornia(task: Task) -> Run:
    import kornia.augmentation as K

    view = torch.nn.Sequential(
        K.RandomResizedCrop((task.size, task.size), scale=(0.2, 1.0)),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel_size(task.size),) * 2, (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(p=0.5),
        K.Normalize(MEAN, STD),
    )
    images = torch.from_numpy(task.canvases()).permute(0, 3, 1, 2).contiguous()

    def run(number: int, part: slice) -> object:
        levels = images[part].float().div_(255)
        with torch.no_grad():
            return [view(levels), view(levels)]

    return run


# (package, how to make it, whether torch's threads share its work)
PIPELINES: dict[str, tuple[str, Callable[[Task], Run], bool]] = {
    BASE: ("torchvision", authors, False),
    OURS: ("mocokit", mocokit_, True),
    "torchvision v2 on tensors": ("torchvision", torchvision_v2, False),
    "kornia": ("kornia", kornia, True),
    "lightly's MoCoV2Transform": ("lightly", lightly, False),
}


class Contender:
    """One pipeline on so many torch threads, or in so many processes of one thread each."""

    def __init__(self, run: Run, batch: int, threads: int = 1, processes: int = 0) -> None:
        self.run, self.batch, self.threads, self.repeats = run, batch, threads, 1
        bounds = [k * batch // max(processes, 1) for k in range(processes + 1)]
        self.links = [self._worker(slice(*pair)) for pair in itertools.pairwise(bounds)]
        self.repeats = max(1, round(TURN / min(self.time(number)[0] for number in range(2))))

    def _worker(self, part: slice):
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        context.Process(target=_serve, args=(theirs, self.run, part), daemon=True).start()
        return ours

    def time(self, number: int) -> tuple[float, float]:
        """Seconds of the clock and of the processor (this process's) for a batch."""
        torch.set_num_threads(self.threads)
        clock, processor = time.perf_counter(), time.process_time()
        for repeat in range(self.repeats):
            self._once(1000 * number + repeat)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends = time.perf_counter(), time.process_time()
        return (ends[0] - clock) / self.repeats, (ends[1] - processor) / self.repeats

    def _once(self, number: int) -> None:
        if not self.links:
            self.run(number, slice(None))
        for link in self.links:  # what they make is not sent back, which a loader would have to do
            link.send(number)
        for link in self.links:
            link.recv()


def _serve(link, run: Run, part: slice) -> None:
    torch.set_num_threads(1)
    random.seed(os.getpid())
    torch.manual_seed(os.getpid())
    while True:
        number = link.recv()
        run(number, part)
        link.send(True)


def contenders(task: Task, cores: int, chosen: list[str]) -> dict[str, Contender]:
    ready = {}
    for name in chosen:
        _, make, threads = PIPELINES[name]
        run = make(task)
        if cores == 1:
            ready[name] = Contender(run, task.batch)
            continue
        ready[name] = Contender(run, task.batch, processes=cores)
        if threads:
            ready[f"{name}, torch threads"] = Contender(run, task.batch, threads=cores)
    if torch.cuda.is_available() and cores == 1:
        ready[f"{OURS}, CUDA"] = Contender(mocokit_(task, "cuda"), task.batch)
    return ready


def installed() -> list[str]:
    """The pipelines that can run here."""
    found = []
    for name, (package, _, _) in PIPELINES.items():
        try:
            __import__(package)
            found.append(name)
        except ImportError as error:
            print(f"{name} is skipped: {package} cannot be imported ({error}).", file=sys.stderr)
    return found


def measure(task: Task, cores: int, chosen: list[str], rounds: int) -> list[str]:
    """Rows of the table."""
    ready = contenders(task, cores, chosen)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for number in range(2, 2 + rounds):
        for name, contender in ready.items():
            seconds[name].append(contender.time(number))
    rows = []
    for name, pairs in seconds.items():
        rates = [task.batch / clock for clock, _ in pairs]
        ratios = np.array(seconds[BASE]) / np.array(pairs)  # (rounds, 2): by clock, by processor
        ratio, of_processor = np.median(ratios, axis=0)
        alone = f"{of_processor:.2f}" if cores == 1 else "-"
        rows.append(
            f"| {task.size} | {cores} | {name} | {statistics.median(rates):.0f} | "
            f"{min(rates):.0f}-{max(rates):.0f} | {ratio:.2f} | {alone} |"
        )
    return rows


def processor_name() -> str:
    found = Path("/proc/cpuinfo")
    lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor() or "unknown processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, three rounds")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    keep_freed_memory()
    rounds = 3 if arguments.quick else arguments.rounds
    small, large = (32, 4) if arguments.quick else (256, 32)
    tasks = [Task(32, small, 32, 32), Task(224, large, 300, 400)]
    chosen = installed()
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("torch", "torchvision", "pillow", "kornia", "lightly")
        if importlib.util.find_spec("PIL" if package == "pillow" else package)
    )
    device = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{date.today()}; {processor_name()}, {os.cpu_count()} cores{device}; {versions};")
    print(f"n = {rounds} interleaved rounds.\n")
    print("| px | cores | pipeline | images/s, median | min-max | x authors' | x by CPU time |")
    print("|" + 7 * "---|")
    for task, cores in itertools.product(tasks, (1, 2)):
        for row in measure(task, cores, chosen, rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
