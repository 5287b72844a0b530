"""Loading processes: how they start, what they answer, and what happens when one ends."""

import atexit
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mocokit.data.batch import Batch
from mocokit.data.sharing import Packed
from mocokit.errors import MocokitError, UserError
from mocokit.files import keep_freed_memory

T = TypeVar("T")

log = logging.getLogger(__name__)

_PATIENCE = 5  # s for a batch that is about to arrive when no more are wanted
_IN_WORKER = "in DataLoader worker process"  # what torch writes before an error of such a process


class WorkerEnded(MocokitError):
    """A loading process is gone."""


def prepare_workers() -> None:
    """Begin to start what starts loading processes, while the caller does something else."""
    if _context().get_start_method() == "forkserver":
        with _signals_blocked():
            multiprocessing.forkserver.ensure_running()


def read_in_workers(
    read: Callable[[T], Batch],
    tasks_from: Callable[[int], Iterable[T]],
    workers: int,
    pin: bool = False,
    tell: Callable[[str], None] = log.warning,
) -> Generator[Batch, None, None]:
    """`read(task)` for each task in order, made ahead of time by `workers` processes.

    `tasks_from(n)` are the tasks from number n on. Processes of which one ends before its time are
    started again, and `tell` hears of it; if that happens twice at a task, WorkerEnded is raised.
    They end with the generator, after the batch that each is at.
    """
    packed = Packed(read)
    done, again = 0, None
    while True:
        try:
            with closing(_read_once(packed, tasks_from(done), workers, pin)) as batches:
                for batch in batches:
                    done += 1
                    yield batch
            return
        except WorkerEnded as error:
            if again == done:
                raise
            again = done
            tell(f"{error}; they are started again")


def _read_once(
    read: Packed[Callable[[T], Batch]], tasks: Iterable[T], workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """The same, but WorkerEnded is raised at once."""
    # Whoever waits for a loading process hears no signal meanwhile, and pinning takes time.
    beside = ThreadPoolExecutor(1, "mocokit-arrivals", *_on_device(pin))
    with _noticing_ends(workers), beside, _started(read, tasks, workers) as arrivals:
        coming = beside.submit(_receive, arrivals, pin)
        try:
            while (batch := coming.result()) is not None:
                coming = beside.submit(_receive, arrivals, pin)
                yield batch
        finally:
            wait([coming], _PATIENCE)


@contextmanager
def _noticing_ends(workers: int) -> Iterator[None]:
    """Raises WorkerEnded for what torch and multiprocessing raise where a process is gone."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # Of the latter two, those raised in a loading process are faults of reading.
        known, text = isinstance(error, RuntimeError), str(error)
        if not text.startswith("DataLoader worker (pid") if known else _IN_WORKER in text:
            raise
        why = text if known else "while it started or handed over a batch"
        end = f"a loading process ended ({why}), perhaps for lack of memory"
        remedy = f"lower data.workers, now {workers}, or train.batch_size"
        raise WorkerEnded(f"{end}: {remedy}") from error


@contextmanager
def _started(read: Packed[Callable[[T], Batch]], tasks: Iterable[T], workers: int) -> Iterator[Any]:
    """torch's iterator over what loading processes answer; they end with the context."""
    arrivals = _start(read, tasks, workers)
    end = partial(_let_go, arrivals)
    atexit.register(end)  # for a generator that nobody closes: SIGTERM is blocked in them
    watch = threading.Thread(target=_watch, args=(arrivals,), daemon=True)
    watch.start()
    try:
        yield arrivals
    finally:
        # Left to the garbage collector, they would live as long as a traceback does.
        arrivals._shutdown_workers()
        end()
        atexit.unregister(end)
        # Or it may be the last to hold them, and the interpreter end while it tidies up.
        watch.join(_PATIENCE)


def _watch(arrivals: Any) -> None:
    """Let go of loading processes when the first ends before its time.

    Killed in the middle of a message, it leaves half of it and a lock that nobody opens any more;
    torch would wait for the other half for ever, and the other processes for the lock.
    """
    multiprocessing.connection.wait([worker.sentinel for worker in arrivals._workers])
    if not arrivals._shutdown:
        _let_go(arrivals)


_letting_go = threading.Lock()  # two threads may at once, and would close what is not theirs


def _let_go(arrivals: Any) -> None:
    """Whoever waits for these loading processes finds the end of their messages instead."""
    with _letting_go:
        for worker in arrivals._workers:
            worker.kill()
        arrivals._worker_result_queue._writer.close()


def _on_device(pin: bool) -> tuple[Any, ...]:
    """A thread's preparation: pinned by one without a device of its own, memory is GPU 0's."""
    return (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin else (None, ())


def _start(read: Packed[Callable[[T], Batch]], tasks: Iterable[T], workers: int) -> Any:
    prepare_workers()  # again, if what starts them has ended
    hidden = nullcontext() if read.needs_main else _without_main()
    with warnings.catch_warnings(), hidden:
        # More workers than cores is what the user asked for.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            _Answers(read),
            batch_size=None,
            sampler=tasks,  # type: ignore[arg-type]
            num_workers=workers,
            # Batches are large: many workers are enough of a supply.
            prefetch_factor=2 if workers <= 4 else 1,
            collate_fn=_as_it_is,
            worker_init_fn=_begin,
            multiprocessing_context=_context(),
            # Its own, or it would draw from the generator of the whole process.
            generator=torch.Generator(),
        )
        return iter(loader)


def _context() -> BaseContext:
    """How processes start: copied from a small server that has nothing but the imports.

    A plain fork copies the training process in the middle of whatever its other threads (torch's,
    pinning, logging) are doing, locks included, and may hang; Python 3.12 warns of it. A fresh
    interpreter each (spawn) imports torch once per process; the server does so once.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mocokit.data.loader"])
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started in here never see what asks a run to stop: the mask is inherited.

    Schedulers send such signals to every process of a job, and Ctrl-C reaches every process of a
    terminal; the training process alone decides what follows, and needs its loading processes
    until it has saved.
    """
    stops = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        # Started first: it opens SIGTERM and SIGINT for all that follows.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes started in here do not run the user's script again.

    They would, to find classes that it defines; a script that trains without the guard
    `if __name__ == "__main__"` would then begin to train in every process.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(worker: int) -> None:
    """The first thing a loading process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not blocked (`_signals_blocked`)
    torch.set_num_threads(1)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """torch's own watch looks at the parent by number, which here is the server that started us.

    The server lives as long as we do: a killed training process would leave both for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Piped(NamedTuple):
    """A batch too large for shared memory: numpy arrays go through a pipe, slower but safely."""

    batch: Batch
    pixels: NDArray[np.uint8]


class _Answers(Dataset[Any]):
    """What a loading process holds: it answers a task with a batch, or with what went wrong."""

    def __init__(self, read: Packed[Callable[[Any], Batch]]) -> None:
        self.read = read

    def __getitem__(self, task: Any) -> Batch | _Piped | UserError:
        try:
            batch = self.read.content(task)
        except UserError as error:
            # Raised here, it would reach the user wrapped in the traceback of this process.
            return error
        if batch.pixels.is_shared():  # type: ignore[no-untyped-call]
            return batch
        return _Piped(batch._replace(pixels=torch.empty(0)), batch.pixels.numpy())


def _receive(arrivals: Iterator[Any], pin: bool) -> Batch | None:
    """The next batch, or None after the last; raises what a loading process found wrong."""
    arrival: Batch | _Piped | UserError | None = next(arrivals, None)
    if isinstance(arrival, UserError):
        raise arrival
    if isinstance(arrival, _Piped):
        arrival = arrival.batch._replace(pixels=torch.from_numpy(arrival.pixels))
    return arrival.pin_memory() if pin and arrival else arrival


def _as_it_is(item: Any) -> Any:
    return item
