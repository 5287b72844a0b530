"""Evaluations end on a signal: at once before the work begins, later where their work is kept."""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from mocokit.engine.stop import PREEMPTED, Stopped, StopSignals
from mocokit.errors import Interrupted

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

_current: ContextVar[StopSignals | None] = ContextVar("_current", default=None)


def stoppable(evaluate: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """An evaluation that SIGTERM, SIGUSR1 and Ctrl-C end at the points that its parts declare.

    It raises Interrupted then, which says what was kept.
    """

    @functools.wraps(evaluate)
    def call(*args: Arguments.args, **named: Arguments.kwargs) -> Returned:
        with StopSignals() as stop:
            token = _current.set(stop)
            try:
                with stop.interruptible():
                    return evaluate(*args, **named)
            except Stopped as stopped:
                kept = str(stopped) or "finished features and probes are kept"
                raise Interrupted(
                    f"stopped ({kept}); resume with the same command", stop.exit_code or PREEMPTED
                ) from None
            finally:
                _current.reset(token)

    return call


def at_once(prepare: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """What leads to the work of an evaluation: a signal ends it at once."""

    @functools.wraps(prepare)
    def call(*args: Arguments.args, **named: Arguments.kwargs) -> Returned:
        stop = _current.get()
        if stop is None:
            return prepare(*args, **named)
        with stop.before_the_first_step():
            return prepare(*args, **named)

    return call
