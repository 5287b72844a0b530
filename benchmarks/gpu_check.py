"""Pieces of the GPU check: micro (every method against a CPU), resume, warm, bench, weights.

python gpu_check.py micro CASE | resume | warm NAME | bench NAME | weights RUN
                    [--device cuda] [--tiny] [--out DIR]
Every result is one line, printed and appended to DIR/report.txt at once.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from mocokit import recipes
from mocokit.engine.finite import FiniteWatch, gradient_norm
from mocokit.engine.optim import set_lr
from mocokit.engine.runtime import autocast, prepare, seed_libraries
from mocokit.methods.method import Step
from mocokit.nets import batchnorm
from mocokit.run import build
from mocokit.settings import replace
from mocokit.settings.sizes import resolve
from mocokit.train import optimizer_step
from mocokit.transfer import to_device
from mocokit.views.params import draw_table
from mocokit.views.views import make_views
from mocokit.weights.encoder import view_spec

BEGAN = time.perf_counter()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("piece")
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile", default="both", choices=["off", "on", "both", "graphs"])
    parser.add_argument("--only", help="bench: this way alone")
    return parser.parse_args()


def say(text):
    line = f"[{time.perf_counter() - BEGAN:6.1f}s] {text}"
    print(line, flush=True)
    with open(Path(ARGS.out) / "report.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def attempt(what):
    """One failure costs one line, not the rest."""
    try:
        yield
    except Exception as error:
        say(f"FAIL {what}: {type(error).__name__}: {str(error).strip()[:300]!r}")
        traceback.print_exc()
        sys.stdout.flush()


# ------------------------------------------------------------------ micro: every method, 20 steps

# A small network: the reference runs on one core.
SMALL = {"net.backbone": "resnet_tiny", "net.stem": "small", "views.size": 32,
         "train.batch_size": 64, "method.group_size": 16, "optim.lr_batch": 64}  # fmt: skip


def cases():
    queue = {"method.queue_size": 256}
    v2 = {**SMALL, **queue, "net.head": "mlp", "net.hidden": 64}
    return {
        "mocov2": (recipes.mocov2_cifar10(), v2),
        "symmetric": (recipes.mocov2_cifar10_symmetric(), v2),
        "mocov2plus": (recipes.mocov2plus(), {**SMALL, **queue, "net.hidden": 64, "net.dim": 32,
                                              "optim.warmup_epochs": 0.0}),
        "chunk": (recipes.mocov2_cifar10(), {**v2, "method.chunk": 64}),
        "micro_batch": (recipes.mocov2_cifar10(), {**v2, "train.micro_batch": 32}),
        "dclw": (recipes.mocov2_cifar10(), {**v2, "train.micro_batch": 32, "method.loss": "dclw"}),
        "simclr": (recipes.simclr_cifar10(), SMALL),
        "endtoend_pieces": (recipes.endtoend_cifar10(), {**SMALL, "train.micro_batch": 32}),
        "bank": (recipes.memorybank_cifar10(), SMALL),
        "bank_nce": (recipes.memorybank(), {**SMALL, "method.bank_negatives": 64}),
    }  # fmt: skip


def settings_for(name, precision, compiled):
    recipe, changes = cases()[name]
    changes = {**changes, "engine.precision": precision, "engine.compile": compiled,
               "engine.memory_format": "channels_last", "engine.threads": 1,
               "engine.cuda_graphs": ARGS.compile == "graphs"}  # fmt: skip
    if ARGS.tiny:
        changes |= {"net.backbone": "resnet_tiny", "train.batch_size": 32, "method.group_size": 8}
        if changes.get("train.micro_batch"):
            changes["train.micro_batch"] = 16
    return replace(recipe, changes)


def train_some(settings, device, steps, inputs=None, watch_waits=False):
    """The loop's sequence without files: losses on the host, how often the host waited, strides."""
    images = 10 * settings.train.batch_size
    effect = resolve(settings, images)
    prepare(device, 1 if device.type == "cpu" else 8, False)
    parts = build.build_parts(settings, effect, device)
    method, optimizer, scaler = parts.method.train(), parts.optimizer, parts.scaler
    batch, losses, waits, strides = settings.train.batch_size, [], [], 0
    watch = FiniteWatch(device)
    for step in range(steps):
        index = np.arange(batch) + step % 10 * batch
        views = tuple(view.to(device) for view in inputs[step])
        sync()
        late = watch_waits and device.type == "cuda" and step >= steps - 3
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if late:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                seed_libraries(settings.seed, step)
                set_lr(optimizer, parts.schedule(step))
                number = to_device(index, device)
                with autocast(device, settings.engine.precision):
                    output = method(
                        views, number, Step(settings.seed, step, batch, scaler.get_scale())
                    )
                watch.note(step + 1, output.loss)
                torch.autograd.backward(scaler.scale(output.loss))
                if step == 0:
                    trained = [p for p in method.trained() if p.grad is not None]
                    strides = sum(p.stride() != p.grad.stride() for p in trained)
                scaler.unscale_(optimizer)
                norm = gradient_norm(method.trained())
                if optimizer_step(scaler, optimizer):
                    method.update(output.keep, step, (step + 1) / 100)
                optimizer.zero_grad(set_to_none=True)
            finally:
                if late:
                    torch.cuda.set_sync_debug_mode("default")
        waits += [str(one.message)[:120] + f" at {one.filename}:{one.lineno}" for one in caught
                  if "called a synchroniz" in str(one.message)]  # fmt: skip
        losses.append((output.loss.detach(), norm))
    watch.check()
    return np.array([[float(loss), float(norm)] for loss, norm in losses]), waits, strides


def micro():
    name, steps = ARGS.name, 4 if ARGS.tiny else 20
    base = settings_for(name, "float32", False)
    spec, batch = view_spec(base), base.train.batch_size
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (10 * batch, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    count = 1 if base.method.name == "memorybank" else 2
    inputs = []
    for step in range(steps):
        index = np.arange(batch) + step % 10 * batch
        flat = torch.from_numpy(coarse[index].reshape(-1).copy())
        sizes = np.full(batch, 32), np.full(batch, 32)
        tables = [draw_table(spec, 0, step // 10, index, view, *sizes) for view in range(count)]
        inputs.append([make_views(spec, table, flat, *sizes, "cpu") for table in tables])
    with attempt(f"micro {name} reference on the CPU"):
        reference, _, _ = train_some(base, torch.device("cpu"), steps, inputs)
        say(f"     micro {name} CPU float32: loss {reference[0, 0]:.4f} -> {reference[-1, 0]:.4f}")
    modes = {"off": [False], "on": [True], "both": [True, False], "graphs": [True]}[ARGS.compile]
    for compiled in modes:
        for precision in ("float32", "bfloat16", "float16"):
            what = f"micro {name} {precision} compile {'on' if compiled else 'off'}"
            if DEVICE.type == "cpu" and precision == "float16":
                continue
            with attempt(what):
                torch._dynamo.reset()
                start = time.perf_counter()
                settings = settings_for(name, precision, compiled)
                found, waits, strides = train_some(settings, DEVICE, steps, inputs, True)
                error = np.abs(found - reference) / np.maximum(np.abs(reference), 0.05)
                first = 2e-3 if precision == "float32" else 4e-2
                # Trajectories part slowly: the later ones are compared by their mean.
                ours, theirs = found[-5:, 0].mean(), reference[-5:, 0].mean()
                late = abs(ours - theirs) / abs(theirs)
                good = error[0, 0] < first and late < (0.03 if precision == "float32" else 0.15)
                good = good and bool(np.isfinite(found[:, 0]).all())
                # float16 asks for its scale on the host, three times a step.
                expected = precision == "float16" or not waits
                say(
                    f"{'PASS' if good else 'FAIL'} {what}: first loss off by {error[0, 0]:.1e}, "
                    f"first gradient norm by {error[0, 1]:.1e}, late loss by {late:.1e}; "
                    f"waits in 3 steps {len(waits)}{'' if expected else ' UNEXPECTED'}; "
                    f"gradients with other strides {strides}; {time.perf_counter() - start:.0f} s"
                )
                for wait in sorted(set(waits))[:4]:
                    print("      waits:", wait, flush=True)


# ------------------------------------------------------------------ kill and resume, bit for bit

DYING = """
import json, os, signal, sys
import mocokit
from mocokit.methods.moco import MoCo
update = MoCo.update
def dying(self, keep, step, progress):
    update(self, keep, step, progress)
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[4] == "die":
    MoCo.update = dying
if __name__ == "__main__":
    data, out, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    mocokit.pretrain("demo", data, out, epochs=4, batch_size=32, settings=settings)
"""


def toy():
    """A small labelled set, for dry runs and resuming; gives its folder."""
    folder = Path(tempfile.gettempdir()) / "gpu_resume"
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 160), ("test", 40)):
        labels = np.arange(count) % 4
        colours = np.array([[40, 90, 160], [200, 60, 60], [60, 180, 70], [150, 150, 40]])
        noise = draw.integers(-40, 40, (count, 32, 32, 3))
        images = np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(folder / "toy.npz", **arrays)
    return folder


def resume():
    folder = toy()
    (folder / "dying.py").write_text(DYING)
    from mocokit.engine import checkpoint

    for compiled in [False] if ARGS.compile == "off" else [False, True]:
        what = f"kill and resume, compile {'on' if compiled else 'off'}, {ARGS.name or 'bfloat16'}"
        with attempt(what):
            settings = {"engine.device": ARGS.device, "engine.deterministic": True,
                        "engine.compile": compiled, "engine.precision": ARGS.name or "bfloat16",
                        "engine.threads": 1, "optim.name": "sgd", "optim.lr": 0.05,
                        "save.every_steps": 3, "log.every_steps": 1}  # fmt: skip
            states = []
            for name, ways in (
                ("straight", ["live"]),
                ("again", ["live"]),
                ("killed", ["die", "live"]),
            ):
                place = folder / f"{name}-{compiled}-{ARGS.name}"
                shutil.rmtree(place, ignore_errors=True)
                for way in ways:
                    script, data = str(folder / "dying.py"), str(folder / "toy.npz")
                    command = [sys.executable, script, data, str(place), json.dumps(settings), way]
                    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                    if done.returncode != (-signal.SIGKILL if way == "die" else 0):
                        raise RuntimeError(
                            f"{name} {way} ended {done.returncode}: {done.stderr[-600:]}"
                        )
                states.append(checkpoint.load(place / "last.pt"))
            flats = [{**state["method"], **{f"m{n}": s["momentum_buffer"] for n, s in
                      state["optimizer"]["state"].items()}} for state in states]  # fmt: skip
            for other, what_else in ((1, "the same twice"), (2, what)):
                differ = [n for n, t in flats[0].items() if not torch.equal(t, flats[other][n])]
                say(f"{'FAIL' if differ else 'PASS'} {what_else}: {len(differ)} of {len(flats[0])} "
                    f"tensors differ {differ[:3]}")  # fmt: skip


# ------------------------------------------------------------------ throughput


def bench_settings(name, compiled, graphs=False):
    engine = {"engine.precision": "bfloat16", "engine.compile": compiled,
              "engine.memory_format": "channels_last", "engine.cuda_graphs": graphs}  # fmt: skip
    if name == "r50":
        settings = replace(recipes.mocov2(), {**engine, "method.queue_size": 65536})
        side, count = (300, 400), 512
    else:
        settings = replace(recipes.mocov2_cifar10(), engine)
        side, count = (32, 32), 50000
    if ARGS.tiny:
        settings = replace(settings, {
            "net.backbone": "resnet_tiny", "net.stem": "small",
            "views.size": 32,
            "train.batch_size": 32, "method.group_size": 8, "method.queue_size": 64})  # fmt: skip
        side, count = (40, 44), 64
    return settings, side, count


class Rig:
    """One configuration, ready to step."""

    def __init__(self, settings, side, count):
        prepare(DEVICE, 8 if DEVICE.type == "cuda" else 1, False)
        self.settings, self.count = settings, count
        self.effect = resolve(settings, max(count, 10 * settings.train.batch_size))
        self.parts = build.build_parts(settings, self.effect, DEVICE)
        self.method = self.parts.method.train()
        generator = torch.Generator(DEVICE).manual_seed(0)
        pixels = count * side[0] * side[1]
        self.pixels = torch.randint(
            0, 256, (pixels, 3), dtype=torch.uint8, device=DEVICE, generator=generator
        )
        self.side, self.step, self.fixed = side, 0, None
        self.batch = settings.train.batch_size

    def views(self):
        (spec, *_), batch = self.parts.specs.values(), self.batch
        index = (np.random.default_rng(self.step).permutation(self.count)[:batch]).astype(np.int64)
        sizes = np.full(batch, self.side[0]), np.full(batch, self.side[1])
        starts = index * (self.side[0] * self.side[1])
        tables = [draw_table(spec, 0, self.step, index, view, *sizes) for view in range(2)]
        made = tuple(
            make_views(spec, table, self.pixels, *sizes, DEVICE, starts) for table in tables
        )
        return made, to_device(index, DEVICE)

    def train(self, views, index):
        parts, method = self.parts, self.method
        seed_libraries(0, self.step)
        set_lr(parts.optimizer, parts.schedule(self.step))
        with autocast(DEVICE, self.settings.engine.precision):
            output = method(views, index, Step(0, self.step, self.batch))
        torch.autograd.backward(output.loss)
        parts.optimizer.step()
        method.update(output.keep, self.step, 0.1)
        parts.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def run(self, what):
        if what == "views":
            self.views()
            self.step += 1
        elif what == "step":
            if self.fixed is None:
                self.fixed = self.views()
            self.train(*self.fixed)
        elif what == "keys":
            if self.fixed is None:
                self.fixed = self.views()
            with torch.no_grad(), autocast(DEVICE, self.settings.engine.precision):
                self.method.key_encoder(self.fixed[0][1])
            self.step += 1
        else:
            self.train(*self.views())


def timed(rig, what, warm, repeats):
    """ms a batch, and ms in which the host had launched it: if they are near, it is the limit."""
    for _ in range(warm):
        rig.run(what)
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        rig.run(what)
    ordered = time.perf_counter() - start
    sync()
    return 1000 * (time.perf_counter() - start) / repeats, 1000 * ordered / repeats


def bench():
    """As a run does it first; then without graphs, without a compiler, with a loop over groups."""
    name, best = ARGS.name, None
    ways = {
        "compiled, graphs": True,
        "compiled": True,
        "uncompiled": False,
        "uncompiled, loop over groups": False,
    }
    for way, compiled in ways.items():
        if (ARGS.only and way != ARGS.only) or (compiled and ARGS.compile == "off"):
            continue
        label = f"bench {name} {way}"
        with attempt(label), groups_in_turn("loop" in way):
            torch._dynamo.reset()
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rig = Rig(*bench_settings(name, compiled, "graphs" in way))
            start = time.perf_counter()
            rig.run("step")
            sync()
            say(f"     {label}: first step {time.perf_counter() - start:.1f} s")
            repeats = 2 if ARGS.tiny else 40 if name == "cifar" else 10
            for what in ("keys", "views", "step", "all"):
                total, ordered = timed(rig, what, 1 if ARGS.tiny else 3, repeats)
                rate = 1000 * rig.batch / total
                times = f"{total:8.2f} ms, host {ordered:8.2f} ms"
                say(f"     {label}: {what:5} {times}, {rate:9.0f} images/s")
                if what == "all" and (best is None or rate > best[0]):
                    best = rate, compiled
            if DEVICE.type == "cuda":
                say(f"     {label}: peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
            if "loop" not in way:
                profile(rig, label)
            del rig
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    if best:
        say(f"BEST {name}: compile {best[1]}, {best[0]:.0f} images/s end to end")


@contextmanager
def groups_in_turn(on):
    """Batch norm as a CPU does it, a group after another."""
    before = batchnorm._at_once
    if on:
        batchnorm._at_once = lambda inputs, sizes: False
    try:
        yield
    finally:
        batchnorm._at_once = before


def profile(rig, label):
    """The twenty kernels that cost most, how many a step has, and how long the device was busy."""
    from torch.profiler import ProfilerActivity, profile as profiler

    steps = 1 if ARGS.tiny else 5
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with profiler(activities=activities) as found:
        start = time.perf_counter()
        for _ in range(steps):
            rig.run("all")
        sync()
        wall = time.perf_counter() - start
    key = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    events = found.key_averages()
    with open(Path(ARGS.out) / "profiles.txt", "a", encoding="utf-8") as file:
        file.write(f"\n\n=== {label}, {steps} steps of views and training\n")
        file.write(events.table(sort_by=key, row_limit=40, max_name_column_width=110))
    kernels = (
        [e for e in events if str(e.device_type).endswith("CUDA")]
        if DEVICE.type == "cuda"
        else events
    )
    busy = sum(getattr(e, "self_device_time_total", 0) or 0 for e in kernels) / 1e3 / steps
    count = sum(e.count for e in kernels) / steps
    each = 1000 * wall / steps
    say(
        f"     {label}: {count:.0f} device activities a step, device busy {busy:.2f} of "
        f"{each:.2f} ms (profiled); a share is the most that its removal would bring"
    )
    left = list(kernels)
    for text, words in KINDS.items():
        part = [e for e in left if any(word in e.key for word in words)]
        left = [e for e in left if e not in part]
        took = sum(getattr(e, "self_device_time_total", 0) or 0 for e in part) / 1e3 / steps
        say(f"       {text:22} {took:8.2f} ms a step, {took / each:6.1%}")
    say(f"       {'launches and waiting':22} {each - busy:8.2f} ms a step, {1 - busy / each:6.1%}")


# What a kernel is by its name; the first that fits.
KINDS = {
    "batch norm (torch's)": ("batch_norm", "bn_", "BatchNorm"),
    "fused (norm, act, views)": ("triton",),
    "convolution, product": ("conv", "cudnn", "xmma", "cutlass", "gemm", "sm90", "nvjet"),
    "copies": ("copy", "Cat", "cat_", "Memcpy", "memcpy", "Memset"),
    "other": ("",),
}


def warm():
    """Compile once, so that what is timed later finds the kernels in the cache."""
    with attempt(f"warm {ARGS.name}"):
        rig = Rig(*bench_settings(ARGS.name, True, True))
        start = time.perf_counter()
        rig.run("step")
        rig.run("all")
        sync()
        say(f"     warm {ARGS.name}: compiled in {time.perf_counter() - start:.0f} s, cold")


def weights():
    """The backbone of a run, finished or not, in files small enough to be brought home.

    `cat` makes one of them again.
    """
    from mocokit.weights import resolve, write

    finished = Path(ARGS.name, "backbone.safetensors")
    if not finished.is_file():
        settings, _ = resolve.read(ARGS.name)
        write.write_backbone(finished, resolve.load(ARGS.name), settings)
    data, size = finished.read_bytes(), 15 * 2**20
    for number, start in enumerate(range(0, len(data), size)):
        (Path(ARGS.out) / f"backbone.{number}").write_bytes(data[start : start + size])


if __name__ == "__main__":
    ARGS = arguments()
    DEVICE = torch.device(ARGS.device, 0) if ARGS.device == "cuda" else torch.device(ARGS.device)
    if ARGS.tiny:  # a CPU takes the GPU's way, so that a dry run goes through it
        batchnorm._at_once = lambda inputs, sizes: len(set(sizes)) == 1
    pieces = (micro, toy, resume, bench, warm, weights)
    {piece.__name__: piece for piece in pieces}[ARGS.piece]()
