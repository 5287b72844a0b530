"""A folder of a million images: time to list it, to load the listing again, and memory.

The tree is synthetic: 1,000 folders of 1,000 hard links each to twenty small images, so that disk
holds a million names but twenty files. Made below FOLDER, and left there for another time.

    python benchmarks/index.py FOLDER [--images 1000000]
"""

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

PER_FOLDER, FILES = 1000, 20


def make(root: Path, images: int) -> None:
    import numpy as np
    from PIL import Image

    draw, originals = np.random.default_rng(0), root.parent / "originals"
    originals.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        pixels = draw.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(originals / f"{number}.jpg")
    for first in range(0, images, PER_FOLDER):
        folder = root / f"folder_{first // PER_FOLDER:05d}"
        folder.mkdir(parents=True)
        for number in range(first, min(first + PER_FOLDER, images)):
            os.link(originals / f"{number % FILES}.jpg", folder / f"image_{number:08d}.jpg")


def own_memory(pid: int) -> float:
    """MiB that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children(child)]
    return found


def timed(text: str, started: float) -> None:
    print(f"{text}: {time.perf_counter() - started:.2f} s")


def workers_memory(root: Path, workers: int) -> float:
    """MiB of its own that each loading process has, the mean."""
    from mocokit.data.loader import Loader
    from mocokit.data.open import open_data

    options = {"seed": 0, "batch_size": 32, "epochs": 1, "bound": 64, "workers": workers}
    batches = iter(Loader(open_data(root).train, last="drop", **options))  # type: ignore[arg-type]
    for _ in range(20):
        next(batches)
    sizes = sorted((own_memory(pid) for pid in children(os.getpid())), reverse=True)[:workers]
    batches.close()  # type: ignore[attr-defined]
    return sum(sizes) / workers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    asked = parser.parse_args()
    root = asked.folder / f"tree_{asked.images}"
    if not root.is_dir():
        started = time.perf_counter()
        make(root, asked.images)
        timed("made the tree", started)
    os.environ["MOCOKIT_CACHE"] = tempfile.mkdtemp()
    from mocokit.data.open import open_data

    started = time.perf_counter()
    names = sum(len(files) for _, _, files in os.walk(root))
    timed(f"os.walk over {names:,} names, which warms the disk", started)
    for text in ("listed", "loaded from the cached listing"):
        started = time.perf_counter()
        source = open_data(root).train
        timed(f"{text}, {len(source):,} images", started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    index = source.index()
    assert index.names is not None
    beyond = index.names.ends.nbytes + (0 if index.labels is None else index.labels.nbytes)
    print(
        f"memory beyond the names: {beyond / len(source):.0f} bytes an image; peak {peak:.0f} MiB"
    )
    small = asked.folder / "tree_1000"
    if not small.is_dir():
        make(small, 1000)
    for place in (small, root):
        mean = workers_memory(place, 2)
        print(f"each of 2 loading processes has {mean:.0f} MiB of its own ({place.name})")


if __name__ == "__main__":
    main()
