"""Images per second from disk to uint8 canvas, ours beside the loaders that others use.

Every pipeline yields batches of 32 images of their own sizes, in random order, as uint8 pixels in
the training process. Each measurement is a process of its own that is held to its cores; the clock
starts when the first batch has arrived. Rounds are interleaved; ratios are taken within a round.
On one core one loading process serves, on two cores two; the training process does nothing else.

    python benchmarks/data.py FOLDER [--rounds 5] [--on 1 2] [--large] [--beside]

FOLDER has train/<class>/<image>. `--large` first enlarges its images to three times their sides.
`--beside` compares loading processes with loading threads while the training process is as busy as
one that trains on a GPU: after each batch it goes forward and back through a ResNet-50 of one image
of 32 pixels, whose time is that of Python and of launching operations. On two cores one loader
serves, and one core is the training process's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BATCH, BOUND, EPOCHS = 32, 579, 2
BASE = "torchvision ImageFolder + DataLoader"


def ours(place: Path, workers: int) -> Iterator[int]:
    from mocokit.data.loader import Loader
    from mocokit.data.open import open_data

    loader = Loader(
        open_data(place, "none").train,
        seed=0,
        batch_size=BATCH,
        epochs=EPOCHS,
        last="keep",
        bound=BOUND,
        workers=workers,
    )
    return (len(batch.index) for _, batch in loader)


def our_threads(place: Path, workers: int) -> Iterator[int]:
    """What threads would give instead of processes: the same reader, two batches ahead each."""
    from mocokit.data.loader import Loader
    from mocokit.data.open import open_data

    loader = Loader(
        open_data(place, "none").train,
        seed=0,
        batch_size=BATCH,
        epochs=EPOCHS,
        last="keep",
        bound=BOUND,
        workers=0,
    )
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(loader.batch_at, step) for step in range(2 * workers)]
        for step in range(len(loader)):
            yield len(waiting.pop(0).result().index)
            if step + 2 * workers < len(loader):
                waiting.append(pool.submit(loader.batch_at, step + 2 * workers))


def imagefolder(place: Path, workers: int) -> Iterator[int]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    yield from _loaded(ImageFolder(str(place / "train"), transform=pil_to_tensor), workers)


def lightly(place: Path, workers: int) -> Iterator[int]:
    from lightly.data import LightlyDataset
    from torchvision.transforms.functional import pil_to_tensor

    yield from _loaded(LightlyDataset(str(place / "train"), transform=pil_to_tensor), workers)


def _loaded(dataset: object, workers: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        collate_fn=list,
        persistent_workers=True,
    )
    for _ in range(EPOCHS):
        for batch in loader:
            yield len(batch)


PIPELINES = {  # name: (function, what it reads)
    BASE: (imagefolder, "folder"),
    "lightly LightlyDataset + DataLoader": (lightly, "folder"),
    "mocokit, folder": (ours, "folder"),
    "mocokit, folder, threads": (our_threads, "folder"),
    "mocokit, tar": (ours, "images.tar"),
    "mocokit, pack": (ours, "images.pack"),
    "mocokit, pack of bare pixels": (ours, "raw.pack"),
}

BESIDE = ("mocokit, folder", "mocokit, folder, threads")


def busy(pid: int) -> float:
    """Seconds of processor time of a process and of all that it started and that still run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    for task in Path(f"/proc/{pid}/task").iterdir():
        own += sum(map(busy, map(int, (task / "children").read_text().split())))
    return own


def launching() -> Callable[[], None]:
    """What the training process does at a step, where a GPU does the computing."""
    import torch
    from torchvision.models import resnet50

    torch.set_num_threads(1)
    network, image = resnet50(weights=None).eval(), torch.zeros(1, 3, 32, 32)

    def step() -> None:
        network(image).sum().backward()

    step()
    return step


def measure(name: str, place: Path, cores: int, beside: bool) -> tuple[float, float]:
    """Images per second after the first batch, and per second of processor time of all processes.

    Processor time is read while the processes still run, at every eighth batch.
    """
    function, what = PIPELINES[name]
    step = launching() if beside else lambda: None
    where = place if what == "folder" else place.parent / what
    arriving = function(where, 1 if beside else cores)
    next(arriving)
    started, worked = time.perf_counter(), busy(os.getpid())
    images, seen, used = 0, 0, 1e-9
    for number, count in enumerate(arriving):
        images += count
        step()
        if number % 8 == 7:
            seen, used = images, busy(os.getpid()) - worked
    return images / (time.perf_counter() - started), seen / used


def measured(name: str, place: Path, cores: int, beside: bool) -> tuple[float, float]:
    command = [sys.executable, __file__, str(place), "--one", name, "--cores", str(cores)]
    command += ["--beside"] * beside
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rate, per_work = json.loads(done.stdout.splitlines()[-1])
    return rate, per_work


def prepare(source: Path, folder: Path, large: bool) -> Path:
    """A copy of the images, and the same in the other forms."""
    from PIL import Image

    from mocokit.data.open import open_data
    from mocokit.data.sources.pack import write_pack

    place = folder / "images"
    for path in sorted((source / "train").rglob("*.jpg")):
        target = place / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if large:
            image = Image.open(path).convert("RGB")
            image.resize((3 * image.width, 3 * image.height)).save(target, quality=90)
        else:
            target.write_bytes(path.read_bytes())
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(place / "train", "images")
    splits = open_data(place, "none")
    write_pack(splits, folder / "images.pack", BOUND, False, 2, lambda count: None)
    write_pack(splits, folder / "raw.pack", BOUND, True, 2, lambda count: None)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--on", type=int, nargs="+", default=[1, 2], help="numbers of cores")
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-asked.cores :])
        print(json.dumps(measure(asked.one, asked.folder, asked.cores, asked.beside)))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(asked.folder, Path(folder), asked.large)
        rates: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for _ in range(asked.rounds):
            for cores in asked.on:
                for name in BESIDE if asked.beside else PIPELINES:
                    rate = measured(name, place, cores, asked.beside)
                    rates.setdefault((cores, name), []).append(rate)
    base = BESIDE[0] if asked.beside else BASE
    print(f"| cores | pipeline | images/s, median | min-max | x {base} | x by CPU time |")
    print("|---|---|---|---|---|---|")
    for (cores, name), found in rates.items():
        pairs = list(zip(found, rates[cores, base], strict=True))
        ratios = [statistics.median(one[n] / other[n] for one, other in pairs) for n in (0, 1)]
        each = [rate for rate, _ in found]
        shown = f"{statistics.median(each):.0f} | {min(each):.0f}-{max(each):.0f}"
        print(f"| {cores} | {name} | {shown} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
