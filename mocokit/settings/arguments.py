"""The arguments of the public functions: a value of another kind is one sentence, before any work.

Numbers have ranges of their own (protocols/limits.py, the settings).
"""

import functools
import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from mocokit.errors import UserError
from mocokit.files import brief

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

LONGEST_PATH = 4095  # bytes; the most that Linux takes
# Checked elsewhere, with their ranges; words are checked by their list.
CHECKED = {int, float, Literal}
KINDS: dict[Any, str] = {
    str: "text",
    Path: "a path",
    bool: "True or False",
    NoneType: "None",
    type: "a class",
    Mapping: "a dictionary with names as keys",
    Collection: "a list of names",
}


def checked(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """A function that raises UserError for an argument that its annotations do not allow."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **named: Arguments.kwargs) -> Returned:
        hints = get_type_hints(function)
        try:
            given = inspect.signature(function).bind(*args, **named).arguments
        except TypeError:  # the call itself says best which name is unknown or missing
            given = {}
        for name, value in given.items():
            check(name, value, hints[name])
        return function(*args, **named)

    return call


def check(name: str, value: Any, hint: Any) -> None:
    """Raise UserError if a value is not what an annotation of KINDS allows, or no possible path."""
    allowed = [_kind(one) for one in _parts(hint)]
    if value is None and NoneType not in allowed:
        raise UserError(f"{name} = None: give a value, or leave {name} out")
    if allowed == [Literal] and not any(value == word for word in get_args(hint)):
        words = ", ".join(get_args(hint))
        raise UserError(f"unknown {name} {brief(repr(value))}; use {words}")
    if not CHECKED.isdisjoint(allowed):
        return
    # Other classes of an annotation, as of a data source, are contracts that are checked there.
    if all(kind in KINDS for kind in allowed) and not any(_is(value, kind) for kind in allowed):
        kinds = " or ".join(KINDS[kind] for kind in allowed)
        raise UserError(f"{name} = {brief(repr(value))}: must be {kinds}")
    if isinstance(value, str | Path):
        length = len(os.fsencode(text := str(value)))
        if "\0" in text or length > LONGEST_PATH:
            why = "holds a zero byte" if "\0" in text else f"is {length:,} bytes long"
            raise UserError(f"{name} = {brief(repr(text))}: {why}, which no path may")


def _kind(hint: Any) -> Any:
    kind = get_origin(hint) or hint
    return Collection if kind is Sequence and get_args(hint) == (str,) else kind


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is(value: Any, kind: Any) -> bool:
    if kind is Collection:
        return isinstance(value, kind) and _names(value)
    if kind is Mapping:
        return isinstance(value, Mapping) and _names(value)
    return isinstance(value, kind)


def _names(values: Collection[Any]) -> bool:
    return not isinstance(values, str | bytes) and all(isinstance(one, str) for one in values)
