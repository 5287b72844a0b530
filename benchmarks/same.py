"""Whether the working tree computes what an earlier commit computed, bit for bit.

Both sides run in turn on this machine, on one thread, and are driven by the command line alone. A
table line per comparison shows a hash of each side and a verdict: `same`, `names differ` (equal
contents under other names), or `DIFFERS`. The exit status is 1 unless all are the same.

    python benchmarks/same.py [--commit 796d664] [--only NAME ...] [--work DIR]
    python benchmarks/same.py --self-test      # a changed seed must be found
    python benchmarks/same.py --list
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES, BATCH, EPOCHS = 96, 16, 2  # six steps an epoch, twelve in all
STEPS_PER_EPOCH = IMAGES // BATCH
CLOCKS = {"images_per_s", "data_wait", "peak_memory_gib", "seconds"}
ADDED = {"scored_images"}  # what 796d664 did not record

Words = tuple[str, ...]
Leaves = dict[str, str]  # of what a run computed: name -> hash or number


def assign(**values: object) -> Words:
    """--set words; `__` stands for the dot."""
    pairs = ((name.replace("__", "."), value) for name, value in values.items())
    return tuple(word for name, value in pairs for word in ("--set", f"{name}={value}"))


@dataclass(frozen=True)
class Case:
    """A command to compare. `old` and `new` are words that only one side gets."""

    name: str
    kind: str  # a key of KINDS
    words: Words
    needs: str | None = None  # the case whose run folder it reads
    old: Words = ()
    new: Words = ()


ONE_THREAD = ("--device", "cpu", *assign(engine__threads=1))
SMALL = (
    "{data}", "--epochs", str(EPOCHS), "--batch-size", str(BATCH), *ONE_THREAD,
    *assign(
        net__backbone="resnet18", net__dim=32, views__size=32, views__resize=32,
        method__group_size=8, engine__precision="float32", log__every_steps=1,
        monitor__every_epochs=0, monitor__k=200,
    ),
)  # fmt: skip
QUEUE = assign(method__queue_size=64)
WARM_UP = assign(optim__warmup_epochs=1)
HIDDEN = assign(net__hidden=64)
PIECES = assign(train__micro_batch=8)
KNN = assign(monitor__every_epochs=1, monitor__k=5)

# Settings of the old side that the new side calls otherwise, such as {"a.b": "a.c"}. What only one
# side takes goes into a case's `old` or `new`.
RENAMED = {"views.resize": "monitor.resize"}

CASES = [
    Case("chance", "chance", ()),
    Case("demo", "train", ("demo", "--epochs", "2", *ONE_THREAD)),
    Case("mocov1", "train", ("mocov1", *SMALL, *QUEUE)),
    Case("mocov2", "train", ("mocov2", *SMALL, *QUEUE, *KNN)),
    Case("mocov2_symmetric", "train", ("mocov2_symmetric", *SMALL, *QUEUE)),
    Case("mocov2plus", "train", ("mocov2plus", *SMALL, *QUEUE, *HIDDEN, *WARM_UP)),
    Case("simclr_256", "train", ("simclr_256", *SMALL, *WARM_UP)),
    Case("memorybank", "train", ("memorybank", *SMALL, *assign(method__bank_negatives=32))),
    Case(
        "memorybank_softmax", "train",
        ("memorybank_softmax", *SMALL, *assign(method__bank_negatives=64)),
    ),
    Case("mocov2 in pieces", "train", ("mocov2", *SMALL, *QUEUE, *PIECES)),
    Case("endtoend in pieces", "train", ("endtoend", *SMALL, *PIECES, *assign(method__chunk=8))),
    Case("two processes", "train", ("mocov2", *SMALL, *QUEUE, "--processes", "2")),
    Case("resumed", "resume", ("mocov2", *SMALL, *QUEUE, *KNN), needs="mocov2"),
    Case("knn", "evaluate", ("knn", "{run}", "--k", "5", "--k", "20"), needs="mocov2"),
    Case("linear quick", "evaluate", ("linear", "{run}", "--protocol", "quick"), needs="mocov2"),
    Case("linear paper", "evaluate", ("linear", "{run}", "--epochs", "3"), needs="mocov2"),
]  # fmt: skip


def renamed(word: str) -> str:
    """A path=value word with the path that the new side uses."""
    path, equals, value = word.partition("=")
    return f"{RENAMED.get(path, path)}{equals}{value}"


@dataclass
class Side:
    """One of the two packages, and the folder that its runs go to."""

    name: str
    root: Path
    work: Path
    data: Path
    runs: dict[str, Path] = field(default_factory=dict)  # by case, of this session

    def environment(self) -> dict[str, str]:
        """The same on both sides but for the package and the cache."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        own = {"PYTHONPATH": str(self.root), "MOCOKIT_CACHE": str(self.work / "cache")}
        return kept | fixed | own

    def start(self, words: Sequence[str]) -> subprocess.Popen[str]:
        pipe, command = subprocess.PIPE, [sys.executable, *words]
        return subprocess.Popen(
            command, cwd=self.work, env=self.environment(), stdout=pipe, stderr=pipe, text=True
        )

    def run(self, words: Sequence[str]) -> str:
        """What the command prints; ends this script where it fails."""
        return self.finish(self.start(words), 0)

    def finish(self, process: subprocess.Popen[str], expected: int) -> str:
        out, errors = process.communicate()
        if process.returncode != expected:
            sys.exit(f"{self.name} side: exit {process.returncode}, not {expected}\n{errors}{out}")
        return out

    def words(self, case: Case) -> list[str]:
        own = case.old if self.name == "old" else case.new
        given = case.words if self.name == "old" else tuple(map(renamed, case.words))
        names = {"data": str(self.data)}
        if case.needs is not None:
            names["run"] = str(self.runs[case.needs])
        return [word.format(**names) for word in (*given, *own)]

    def fresh(self, case: Case) -> Path:
        """The run folder of a case, which is not there yet."""
        folder = self.work / case.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        self.runs[case.name] = folder
        return folder


def train(side: Side, case: Case) -> dict[str, Leaves]:
    """Train from the start to the end."""
    out = side.fresh(case)
    side.run(["-m", "mocokit", "pretrain", *side.words(case), "--out", str(out)])
    return computed(out)


def resume(side: Side, case: Case) -> dict[str, Leaves]:
    """Stop a run in the middle of an epoch, and resume it."""
    for _ in range(5):
        out = side.fresh(case)
        words = ["-m", "mocokit", "pretrain", *side.words(case), "--out", str(out)]
        process = side.start(words)
        wait_for_lines(process, out / "metrics.jsonl", 2)
        process.send_signal(signal.SIGTERM)
        side.finish(process, 75)
        if int(checkpoint(out)["step"]) % STEPS_PER_EPOCH:
            side.run(words)
            return computed(out)
    sys.exit(f"{side.name} side: five runs did not stop in the middle of an epoch")


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    while process.poll() is None:
        if path.is_file() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)


def evaluate(side: Side, case: Case) -> dict[str, Leaves]:
    """The figures of `mocokit evaluate`."""
    file = side.work / f"{case.name.replace(' ', '-')}.json"
    words = [*side.words(case), "--device", "cpu", "--json", str(file)]
    side.run(["-m", "mocokit", "evaluate", *words])
    return {"figures": numbers(json.loads(file.read_text())["results"])}


CHANCE = """
import hashlib, json
import numpy as np
from mocokit.chance import uniform
seeds = np.array([0, 1, 2**62])[:, None, None, None]
epochs = np.arange(4)[:, None, None]
images = np.array([*range(64), 2**31, 10**12])[:, None]
views = np.arange(3)
table = lambda slot: np.ascontiguousarray(uniform(seeds, epochs, images, views, slot), "<f8")
hashes = {f"slot {s}": hashlib.sha256(table(s).tobytes()).hexdigest() for s in range(600)}
print(json.dumps(hashes))
"""


def chance(side: Side, case: Case) -> dict[str, Leaves]:
    """Random numbers of a grid of arguments."""
    return {"numbers": json.loads(side.run(["-c", CHANCE]))}


KINDS: Mapping[str, Callable[[Side, Case], dict[str, Leaves]]] = {
    "chance": chance,
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
}


def computed(run: Path) -> dict[str, Leaves]:
    """The last weights of a run, and the numbers that it recorded on the way."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return {"weights": tensors(checkpoint(run)["method"]), "metrics": numbers(lines)}


def checkpoint(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
    return state


def tensors(state: Mapping[str, torch.Tensor]) -> Leaves:
    """A hash of type, shape and bytes by name."""
    found = {}
    for name, tensor in state.items():
        content = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        found[name] = content.hexdigest()
    return found


def numbers(tree: Any, place: str = "") -> Leaves:
    """Every number by its place. Clocks, added numbers and texts are left out."""
    if isinstance(tree, dict):
        inner = ((f"{place}/{k}", branch) for k, branch in tree.items() if k not in CLOCKS | ADDED)
    elif isinstance(tree, list):
        inner = ((f"{place}/{number}", branch) for number, branch in enumerate(tree))
    else:
        return {place: repr(tree)} if isinstance(tree, (bool, int, float)) else {}
    return {name: leaf for at, branch in inner for name, leaf in numbers(branch, at).items()}


def digest(leaves: Leaves) -> str:
    """A hash of contents alone, in an order that names do not set."""
    return hashlib.sha256("\n".join(sorted(leaves.values())).encode()).hexdigest()[:16]


def verdict(old: Leaves, new: Leaves) -> str:
    if old == new:
        return "same"
    return "names differ" if digest(old) == digest(new) else "DIFFERS"


def details(old: Leaves, new: Leaves, most: int = 4) -> str:
    """The first names that are on one side only, or whose contents differ."""
    found = [f"only old: {name}" for name in old if name not in new]
    found += [f"only new: {name}" for name in new if name not in old]
    found += [name for name in old if name in new and old[name] != new[name]]
    return f"    {len(found)} of {len(old)}: {', '.join(found[:most])}"


def show(case: str, what: str, old: Leaves, new: Leaves, seconds: str = "") -> bool:
    """Print a line of the table; whether both are the same."""
    found = verdict(old, new)
    line = f"{case:20} {what:9} {digest(old):16} {digest(new):16} {found:12} {seconds}"
    print(line.rstrip(), flush=True)
    if found != "same":
        print(details(old, new), flush=True)
    return found == "same"


def compare(cases: Sequence[Case], sides: Sequence[Side]) -> bool:
    """Run the cases on both sides; whether all are the same."""
    print(f"{'case':20} {'what':9} {'old':16} {'new':16} {'verdict':12} CPU seconds")
    results: dict[tuple[str, str], dict[str, Leaves]] = {}
    same = []
    for case in cases:
        spent = []
        for side in sides:
            before = cpu_seconds()
            results[case.name, side.name] = KINDS[case.kind](side, case)
            spent.append(f"{cpu_seconds() - before:.0f}")
        old, new = (results[case.name, side.name] for side in sides)
        for what in old:
            same.append(show(case.name, what, old[what], new[what], " + ".join(spent)))
        if case.kind == "resume":
            same += [show_resumed(case, side, results) for side in sides]
    return all(same)


def cpu_seconds() -> float:
    """Processor time of all commands so far, which a shared machine changes less than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show_resumed(
    case: Case, side: Side, results: Mapping[tuple[str, str], dict[str, Leaves]]
) -> bool:
    """Whether a resumed run is the straight one; the columns are straight and resumed."""
    straight, resumed = (results[name, side.name] for name in (case.needs or "", case.name))
    shown = [
        show(f"straight, {side.name}", what, straight[what], resumed[what]) for what in resumed
    ]
    return all(shown)


def chosen(names: Sequence[str]) -> list[Case]:
    """The named cases, and those that they need, in the order of the table; all without names."""
    wanted = set(names or (case.name for case in CASES))
    if unknown := wanted - {case.name for case in CASES}:
        sys.exit(f"unknown case {', '.join(sorted(unknown))}; --list prints all")
    wanted |= {case.needs for case in CASES if case.name in wanted and case.needs}
    return [case for case in CASES if case.name in wanted]


def make_images(path: Path) -> None:
    """Write images of four classes that differ by a faint tint, so that no score is perfect."""
    draw = np.random.default_rng(0)
    tints = draw.integers(-16, 17, (4, 3))
    arrays: dict[str, Any] = {}
    for split, count in (("train", IMAGES), ("test", IMAGES // 2)):
        labels = np.arange(count) % 4
        colour = draw.integers(64, 192, (count, 1, 1, 3)) // 4 + 90 + tints[labels][:, None, None]
        noise = draw.integers(-40, 41, (count, 32, 32, 3))
        images = np.clip(colour + noise, 0, 255).astype(np.uint8)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(path, **arrays)


def check_out(commit: str, work: Path) -> Path:
    """The package at a commit, in a folder of its own; what is there already is used."""
    full = subprocess.check_output(
        ["git", "rev-parse", f"{commit}^{{commit}}"], cwd=REPOSITORY, text=True
    ).strip()
    root = work / f"at-{full}"
    if not root.is_dir():
        partial = Path(tempfile.mkdtemp(dir=work))
        archive = subprocess.check_output(["git", "archive", full], cwd=REPOSITORY)
        subprocess.run(["tar", "-x", "-C", str(partial)], input=archive, check=True)
        partial.rename(root)
    return root


def check_root(side: Side) -> None:
    """Whether the side's package is the one that its processes import."""
    found = side.run(["-c", "import mocokit; print(mocokit.__file__)"]).strip()
    if not Path(found).is_relative_to(side.root):
        sys.exit(f"{side.name} side: mocokit comes from {found}, not from {side.root}")


def prepare(commit: str, work: Path) -> list[Side]:
    data = work / "images.npz"
    make_images(data)
    sides = []
    for name, root in (("old", check_out(commit, work)), ("new", REPOSITORY)):
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        sides.append(Side(name, root, folder, data))
        check_root(sides[-1])
    return sides


def self_test(sides: Sequence[Side]) -> int:
    """Give the new side another seed; 0 if its weights and its metrics are found to differ."""
    case = next(case for case in CASES if case.name == "mocov2")
    found = [compare([replace(case, new=("--seed", seed))], sides) for seed in ("0", "1")]
    passed = found == [True, False]
    print("self-test: " + ("seed 0 is the same, seed 1 differs" if passed else "FAILED"))
    return 0 if passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commit", default="796d664", help="the old side (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases alone")
    parser.add_argument("--work", type=Path, help="a folder to keep; default: one that is removed")
    parser.add_argument("--self-test", action="store_true", help="show that a difference is found")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(case.name for case in CASES))
        return 0
    cases = chosen(asked.only)
    work = (asked.work or Path(tempfile.mkdtemp(prefix="mocokit-same-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        sides = prepare(asked.commit, work)
        if asked.self_test:
            return self_test(sides)
        return 0 if compare(cases, sides) else 1
    finally:
        if asked.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
