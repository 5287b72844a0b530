"""Processes, device and precision of a run."""

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from mocokit.chance import Slot, library_seed
from mocokit.engine.world import ATTEMPT, World, announced, attempts, check_name, lost, number_in
from mocokit.errors import Interrupted, MocokitError, UserError
from mocokit.files import keep_freed_memory

T = TypeVar("T")
MAX_WORKERS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """Join the process group that the environment announces, if it announces one."""
    if dist.is_initialized():  # the caller's own group
        rank = dist.get_rank()
        yield World(rank, dist.get_world_size(), local_rank(rank))
        return
    found = announced(os.environ)
    alone = found is not None and found.world.size == 1 and ATTEMPT in os.environ  # of --restarts
    if found is None or alone:
        yield World()
        return
    check_name(found.address)
    world = found.world
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    os.environ |= {"MASTER_ADDR": found.address, "MASTER_PORT": str(found.port)}
    cuda = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if cuda:
        torch.cuda.set_device(choose_device("cuda", world))
    # The functions of this module have the current group as a default argument. timm loads it when
    # it builds a network (by torchvision and torch._dynamo). Loaded inside the group, it would keep
    # the group alive after `_leave`.
    importlib.import_module("torch.distributed.nn.functional")

    try:
        _join_group(cuda)
        try:
            yield world
        except Interrupted as error:
            if error.agreed:  # after any other error some processes may never arrive
                with suppress(RuntimeError):  # all is saved, even if one of them never arrives
                    _leave()
            raise
        _leave()
    except RuntimeError as error:
        if (gone := lost(error)) is not None:
            raise gone from None
        raise


def _join_group(cuda: bool) -> None:
    # The others wait this long at most while the first process scores and saves.
    patience = timedelta(hours=1)
    store, rank, size = next(rendezvous("env://", timeout=patience))
    # torchrun's store survives a restart, and still holds the addresses of the ended processes.
    run_store = PrefixStore(f"mocokit/{attempts(os.environ)}", store)
    if cuda:
        claim_device(run_store)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=run_store, rank=rank, world_size=size, timeout=patience)


def local_rank(rank: int) -> int:
    """The number of a process on its machine.

    Without LOCAL_RANK, all machines are assumed to have the same number of GPUs.
    """
    if os.environ.get("LOCAL_RANK"):
        return number_in(os.environ, "LOCAL_RANK", 0)
    return rank % max(1, torch.cuda.device_count())


def claim_device(store: Store) -> None:
    """Raise UserError if another process of the run uses the same GPU, compared by UUID.

    Device numbers prove nothing: a scheduler may show each process only its own GPU, as number 0.
    """
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    if store.add(f"device/{device.uuid}", 1) > 1:
        raise UserError(
            f"the GPU of this process ({device.name}) is used by another process of the run; start "
            "at most one process per GPU, or give each its own GPU with CUDA_VISIBLE_DEVICES"
        )


def _leave() -> None:
    """End the group and its threads, once every process has done its work."""
    dist.barrier()
    # A reference cycle can keep the group and its threads alive. If one of these threads frees a
    # tensor while the interpreter shuts down, the process aborts.
    gc.collect()
    dist.destroy_process_group()


def decided_by_rank_zero(world: World, decide: Callable[[], T]) -> T:
    """The first process decides. Every process returns its decision, or raises its error."""
    if world.size == 1:
        return decide()
    box: list[Any] = [None, None]
    if world.rank == 0:
        try:
            box = [decide(), None]
        except MocokitError as error:
            box = [None, (isinstance(error, UserError), str(error))]
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        mistake, text = box[1]
        raise UserError(text) if mistake else MocokitError(text)
    answer: T = box[0]
    return answer


def choose_device(name: str, world: World = World()) -> torch.device:
    """The named device, or with `auto` the best one. Raises UserError if it is not available."""
    several = world.size > 1
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    if name == "auto":  # gloo, the backend without CUDA, cannot send tensors of MPS
        one_on_mps = torch.backends.mps.is_available() and not several
        return torch.device("mps" if one_on_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is not None and several:
            raise UserError(f"device {name} is one GPU for {world.size} processes; use cuda")
        # A scheduler may show each process only its own GPU, as number 0.
        default = 0 if count == 1 else world.local_rank
        number = default if device.index is None else device.index
        if number >= count:
            there = f"there are {count} CUDA devices" if count else "there is no CUDA device here"
            if several and count:
                raise UserError(
                    f"device {name}: {there} for {number + 1} or more processes on this machine; "
                    "start at most one process per GPU, or use --device cpu"
                )
            raise UserError(f"device {name}: {there}; use --device auto")
        return torch.device("cuda", number)
    if device.type == "mps" and several:
        raise UserError(
            f"device mps is one GPU for {world.size} processes; use cpu, or one process"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name} is not available here; use --device auto")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"device {name} is not supported; use auto, cpu, cuda, cuda:1 or mps")
    return device


def default_precision(device: torch.device) -> Literal["float32", "bfloat16", "float16"]:
    """bfloat16 if the device supports it natively, float16 on older GPUs, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bfloat16" if native else "float32"
    return "float32"


def instruction_set(device: torch.device) -> str:
    """What decides, beside the settings, in which order a device adds numbers up.

    On a CPU the widest vector instructions that torch uses, else the GPU's name.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type


def default_threads() -> int:
    """The number of processors for this process: its share, if several run on this machine."""
    there = count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    found = announced(os.environ)
    if found is None:
        return count
    part = (there if found.bound else count) // found.local_size
    return max(1, min(count, part))


def default_workers(device: torch.device) -> int:
    """Processes or threads that decode: one beside a CPU that computes, several beside a GPU."""
    return 1 if device.type == "cpu" else min(MAX_WORKERS, default_threads())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Run the encoders in this precision. Losses and updates leave autocast by themselves."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def prepare(device: torch.device, threads: int, deterministic: bool) -> None:
    """Set torch's global options, as a function of the settings alone."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.set_float32_matmul_precision("highest")  # for the float32 logits; encoders use autocast
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 must mean float32, not TF32
        # The products that make views have float16 factors and need float32 sums.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cudnn.benchmark = False  # it chooses kernels by timing, so runs would differ
        torch.backends.cudnn.deterministic = deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)


def seed_libraries(seed: int, step: int, slot: int = Slot.LIBRARY) -> None:
    """Seed torch's generator, for dropout and initialisation, from the seed and the step alone."""
    torch.manual_seed(library_seed(seed, step, slot))


def peak_memory(device: torch.device) -> float:
    """The peak memory in GiB: of the GPU, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
