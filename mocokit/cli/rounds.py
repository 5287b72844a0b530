"""torch's rendezvous on a store of ours: machines meet for each attempt of a run.

It ends within a bound, and not at all where no further attempt can help.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from mocokit.cli import meeting
from mocokit.cli.meeting import spoken
from mocokit.engine.record import Console
from mocokit.engine.world import ATTEMPT
from mocokit.errors import MocokitError

BACKEND = "mocokit"  # the name of our rendezvous among torch's


def gather(rdzv: str | None, nodes: int, command: Mapping[str, str]) -> meeting.Meeting:
    """Meet the other machines' starters at HOST:PORT, or nobody without one."""
    if rdzv is None:
        return meeting.alone()
    where = meeting.place(rdzv)
    wait = spoken(meeting.WAIT)
    Console().note(f"{nodes} machines meet at {where}; this one waits for {wait} at most")
    met = meeting.meet(where, command)
    if found := meeting.interface(met.address):  # gloo may take the name's 127.0.1.1 otherwise
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
    return met


def failure(error: RendezvousError, rdzv: str | None, nodes: int) -> MocokitError:
    """Why the machines could not meet, or lost one another, in one sentence."""
    if isinstance(error, RendezvousTimeoutError):
        return MocokitError(
            f"not all of {nodes} machines had met at {rdzv} after {spoken(meeting.WAIT)}; give the "
            f"same command on exactly {nodes} machines, with a HOST that all of them reach"
        )
    if rdzv is None:
        return MocokitError(f"the processes could not be started ({type(error).__name__})")
    return MocokitError(
        f"lost the machine of {rdzv}, where the run's machines meet; its own last line says why; "
        "resume from the last checkpoint with the same command and --out RUN_FOLDER on each"
    )


class _Rounds(DynamicRendezvousHandler):
    """A rendezvous for each attempt, which the end of a run before it forbids."""

    parameters: RendezvousParameters

    def get_backend(self) -> str:
        return BACKEND

    def next_rendezvous(self) -> Any:
        if (error := self.parameters.get("ended")()) is not None:
            raise error
        try:
            with _at_most(meeting.WAIT + 10):  # torch lets a machine too many wait without end
                found = super().next_rendezvous()
        except RendezvousGracefulExitError:
            raise RendezvousTimeoutError from None  # a machine too many, as the run ends
        # A machine whose processes are restarted for another's failure does not count that itself.
        everywhere = self.parameters.get("meeting").store
        mine = str(everywhere.add("mocokit/rounds", 1))
        number = found.store.compare_set("mocokit/round", "", mine)
        is_first = everywhere.compare_set("mocokit/first", "", number) == number
        os.environ[ATTEMPT] = "0" if is_first else number.decode()
        return found


def _handler(parameters: RendezvousParameters) -> _Rounds:
    met: meeting.Meeting = parameters.get("meeting")
    handler: _Rounds = _Rounds.from_backend(  # type: ignore[no-untyped-call]
        parameters.run_id,
        met.store,
        C10dRendezvousBackend(met.store, parameters.run_id),
        parameters.min_nodes,
        parameters.max_nodes,
        met.address,
        RendezvousTimeout(join=timedelta(seconds=meeting.WAIT)),
    )
    handler.parameters = parameters
    return handler


rendezvous_handler_registry.register(BACKEND, _handler)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise RendezvousTimeoutError after this time. Does nothing where there is no SIGALRM."""

    def late(number: int, frame: FrameType | None) -> None:
        raise RendezvousTimeoutError

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
