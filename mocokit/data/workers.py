"""Workers, the processes that load images: how they start, answer and end."""

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

logger = logging.getLogger(__name__)

_PATIENCE = 5  # s for a batch that is about to arrive when no more are wanted
_IN_WORKER = "in DataLoader worker process"  # torch writes this before an error of a worker


class WorkerEnded(MocokitError):
    """A worker is gone."""


def prepare_workers() -> None:
    """Begin to start the server that workers are copied from; the caller need not wait."""
    if _context().get_start_method() == "forkserver":
        with _signals_blocked():
            multiprocessing.forkserver.ensure_running()


def read_in_workers(
    read: Callable[[T], Batch],
    tasks_from: Callable[[int], Iterable[T]],
    workers: int,
    pin: bool = False,
    log: Callable[[str], None] = logger.warning,
) -> Generator[Batch, None, None]:
    """`read(task)` for each task in order, made ahead of time by `workers` processes.

    `tasks_from(n)` are the tasks from number n on. If a worker ends early, all are started again
    and `log` gets a sentence. If that happens twice at one task, WorkerEnded is raised. Workers end
    with the generator, each after its current batch.
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
            log(f"{error}; all workers are started again")


def _read_once(
    read: Packed[Callable[[T], Batch]], tasks: Iterable[T], workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """The same, but the first worker that ends early raises WorkerEnded."""
    # A thread waits for workers and pins, because Python runs no signal handler while it waits.
    beside = ThreadPoolExecutor(1, "mocokit-arrivals", *_on_device(pin))
    with _noticing_ends(workers), beside, _started(read, tasks, workers) as arrivals:
        coming = beside.submit(_receive, arrivals, pin)
        try:
            while (batch := coming.result()) is not None:
                coming = beside.submit(_receive, arrivals, pin)
                yield batch
        finally:
            # Lets a batch that is about to arrive be received before the workers are shut down.
            wait([coming], _PATIENCE)


@contextmanager
def _noticing_ends(workers: int) -> Iterator[None]:
    """Raise WorkerEnded for the errors by which torch and Python report a lost process."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # ConnectionError and EOFError may also come from the reading itself, inside a worker.
        known, text = isinstance(error, RuntimeError), str(error)
        if not text.startswith("DataLoader worker (pid") if known else _IN_WORKER in text:
            raise
        why = text if known else "while it started or handed over a batch"
        end = f"a worker ended ({why}), perhaps for lack of memory"
        remedy = f"lower data.workers, now {workers}, or train.batch_size"
        raise WorkerEnded(f"{end}: {remedy}") from error


@contextmanager
def _started(read: Packed[Callable[[T], Batch]], tasks: Iterable[T], workers: int) -> Iterator[Any]:
    """torch's iterator over the answers of workers; the workers end with the context."""
    arrivals = _start(read, tasks, workers)
    end = partial(_let_go, arrivals)
    # For a generator that nobody closes: workers block SIGTERM, so torch could not end them.
    atexit.register(end)
    watch = threading.Thread(target=_watch, args=(arrivals,), daemon=True)
    watch.start()
    try:
        yield arrivals
    finally:
        # torch has no public way. The garbage collector would wait as long as a traceback lives.
        arrivals._shutdown_workers()
        end()
        atexit.unregister(end)
        # Otherwise that thread may hold the last reference, and clean up as the interpreter ends.
        watch.join(_PATIENCE)


def _watch(arrivals: Any) -> None:
    """End all workers when the first one ends early.

    A worker killed in the middle of a message leaves half a message and a lock that stays closed.
    torch would wait for the other half for ever, and the other workers for the lock.
    """
    multiprocessing.connection.wait([worker.sentinel for worker in arrivals._workers])
    if not arrivals._shutdown:
        _let_go(arrivals)


# Two threads may end the workers at the same time; the second close could hit a reused file number.
_letting_go = threading.Lock()


def _let_go(arrivals: Any) -> None:
    """End the workers; a thread that waits for their messages gets EOFError."""
    with _letting_go:
        for worker in arrivals._workers:
            worker.kill()  # not terminate: SIGTERM is blocked in workers
        # A pipe ends for its reader when the last writer closes it, and this process has one too.
        arrivals._worker_result_queue._writer.close()


def _on_device(pin: bool) -> tuple[Any, ...]:
    """A thread's preparation: its current device is GPU 0 at first, and it would pin there."""
    return (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin else (None, ())


def _start(read: Packed[Callable[[T], Batch]], tasks: Iterable[T], workers: int) -> Any:
    prepare_workers()  # again, in case the server has ended
    hidden = nullcontext() if read.needs_main else _without_main()
    with warnings.catch_warnings(), hidden:
        # More workers than cores is what the user asked for.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            _Answers(read),
            batch_size=None,  # a task is a whole batch: torch collects nothing
            sampler=tasks,  # type: ignore[arg-type]
            num_workers=workers,
            # Batches are large, and many workers already hold many of them.
            prefetch_factor=2 if workers <= 4 else 1,
            collate_fn=_as_it_is,  # torch's own would turn numpy arrays into tensors
            worker_init_fn=_begin,
            multiprocessing_context=_context(),
            # Its own: torch draws a seed for workers, by default from the global generator.
            generator=torch.Generator(),
        )
        return iter(loader)


def _context() -> BaseContext:
    """How workers start: as copies of a small server that has made the imports and no more.

    A plain fork also copies locks that other threads of the training process hold at that moment
    (torch's, pinning, logging), and may hang; Python 3.12 warns of it. A fresh interpreter (spawn)
    imports torch in every worker; the server imports it once.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mocokit.data.loader"])
    return context


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started inside inherit a mask that blocks the signals for a stop.

    Schedulers send them to every process of a job, and Ctrl-C reaches every process of a terminal.
    Only the training process decides what follows, and it needs its workers until it has saved.
    """
    stops = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        # Started first, because starting the tracker unblocks SIGTERM and SIGINT.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started inside do not import the user's script.

    Python imports it for the classes that it defines. A script without the guard
    `if __name__ == "__main__"` would then begin to train in every worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(worker: int) -> None:
    """Prepare a new worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not blocked (`_signals_blocked`)
    torch.set_num_threads(1)  # workers are the parallelism; more threads would fight for cores
    keep_freed_memory()  # a batch is megabytes that are freed and taken again
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the training process ends.

    torch compares the parent's process number, but the parent of a worker is the server. The server
    lives as long as its workers, so a killed training process would leave all of them for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Piped(NamedTuple):
    """A batch that does not fit into shared memory: its pixels go through a pipe, more slowly."""

    batch: Batch
    pixels: NDArray[np.uint8]


class _Answers(Dataset[Any]):
    """The data set inside a worker: it answers a task with a batch, or with the user's mistake."""

    def __init__(self, read: Packed[Callable[[Any], Batch]]) -> None:
        self.read = read

    def __getitem__(self, task: Any) -> Batch | _Piped | UserError:
        try:
            batch = self.read.content(task)
        except UserError as error:
            # Returned, because torch wraps what is raised here in the text of a traceback.
            return error
        if batch.pixels.is_shared():  # type: ignore[no-untyped-call]
            return batch
        return _Piped(batch._replace(pixels=torch.empty(0)), batch.pixels.numpy())


def _receive(arrivals: Iterator[Any], pin: bool) -> Batch | None:
    """The next batch, or None after the last; raises the UserError that a worker returned."""
    arrival: Batch | _Piped | UserError | None = next(arrivals, None)
    if isinstance(arrival, UserError):
        raise arrival
    if isinstance(arrival, _Piped):
        arrival = arrival.batch._replace(pixels=torch.from_numpy(arrival.pixels))
    return arrival.pin_memory() if pin and arrival else arrival


def _as_it_is(item: Any) -> Any:
    return item
