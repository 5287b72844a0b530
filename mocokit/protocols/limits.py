"""The range of every number that an evaluation takes, for the command line and for Python.

A number outside of it, NaN, infinity, or a value of another kind is one sentence, before any work.
"""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mocokit.errors import UserError
from mocokit.files import brief


class Limit(NamedTuple):
    """From `low` on, or above it where `open` is set, up to `high`; `whole` numbers or any."""

    low: float
    high: float
    whole: bool = True
    open: bool = False


LIMITS = {
    "k": Limit(1, 10**7),
    "temperature": Limit(0, 1e6, whole=False, open=True),
    "size": Limit(8, 4096),
    "resize": Limit(8, 2**14),
    "seed": Limit(0, 2**63 - 1),
    "epochs": Limit(1, 10**6),
    "lr": Limit(0, 1e38, whole=False, open=True),
    "percent": Limit(0, 100, whole=False, open=True),
    "layer_decay": Limit(0, 1, whole=False, open=True),
    "trials": Limit(1, 10**4),
    "every": Limit(0, 10**9),
    "pictures": Limit(0, 10**4),
    "steps": Limit(0, 10**9),
    "batch_size": Limit(1, 10**5),
    "extend": Limit(1, 10**6),
    "iterations": Limit(0, 10**9),  # the names that 0.1 had for the last two
    "ims_per_step": Limit(1, 10**5),
}


def check_numbers(**given: Any) -> None:
    """Raise UserError for the first value, or member of a list of values, outside its LIMITS.

    None stands for a value that is not given.
    """
    for name, value in given.items():
        values = several(value)
        if not values:
            raise UserError(f"{name} = []: name at least one value")
        for one in values:
            if one is not None and not _within(one, LIMITS[name]):
                raise UserError(f"{name} = {brief(repr(one))}: must be {_words(LIMITS[name])}")


def several(value: Any) -> list[Any]:
    """The members of a list of values, or a value alone as the only one."""
    alone = isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
    return [value] if alone else value.tolist() if isinstance(value, np.ndarray) else list(value)


def _within(value: Any, limit: Limit) -> bool:
    kind = numbers.Integral if limit.whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        return False
    number: Any = value
    # Of NaN no comparison is true.
    above = number > limit.low if limit.open else number >= limit.low
    return bool(above and number <= limit.high)


def _words(limit: Limit) -> str:
    kind = "a whole number" if limit.whole else "a number"
    low = f"above {limit.low:g}" if limit.open else f"of at least {limit.low:g}"
    high = f"{limit.high:,}" if isinstance(limit.high, int) else f"{limit.high:,g}"
    return f"{kind} {low} and at most {high}"
