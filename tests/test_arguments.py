"""Whatever is given to a public function is taken, or refused in one sentence before any work."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import mocokit
from mocokit.data.source import Source, Splits, as_splits
from mocokit.data.sources.arrays import ArraySource
from mocokit.errors import UserError
from mocokit.protocols.limits import LIMITS, check_numbers, several
from mocokit.settings.arguments import check, checked

FUNCTIONS = (
    "pretrain",
    "load",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_finetune",
    "evaluate_voc",
)
# What must be named beside the one argument that is tried; nothing of it exists.
NEEDED = {"run": "random", "data": "no such images", "path": "no such file"}
ODD = (object(), 5, 1.5, [], [object()], {5: 6}, b"photos", "\0", "x" * 5000, None, True)


def allowed(value: Any, hint: Any) -> bool:
    """Whether an annotation allows a value; of texts, only a possible path."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if hint is Source:  # a contract, which no odd value fulfils
        return False
    if origin in (Union, UnionType):
        return any(allowed(value, one) for one in get_args(hint))
    if origin is Literal:
        return any(value is one for one in get_args(hint))
    if origin in (None, type):
        if hint is float and type(value) is int:
            return True
        kind = origin or hint
        if isinstance(value, str):
            return hint is str and "\0" not in value and len(value) < 4096
        return isinstance(value, kind) and (kind is not int or type(value) is int)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        members = list(value) if isinstance(value, list | tuple) else [object()]
        return all(allowed(one, get_args(hint)[0]) for one in members)
    return isinstance(value, list | dict | tuple) and all(isinstance(n, str) for n in value)


CASES = [
    pytest.param(function, name, hint, id=f"{function}-{name}")
    for function in FUNCTIONS
    for name, hint in get_type_hints(getattr(mocokit, function)).items()
    if name != "return"
]


@pytest.mark.parametrize(("function", "name", "hint"), CASES)
def test_what_an_annotation_does_not_allow_is_a_sentence(
    function, name, hint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    call, tried = getattr(mocokit, function), [one for one in ODD if not allowed(one, hint)]
    assert len(tried) > 2, name
    needed = {one: NEEDED[one] for one in inspect.signature(call).parameters if one in NEEDED}
    if function == "pretrain":
        needed = {"recipe": "mocov2", "settings": {"train.epochs": 1}}
    for value in tried:
        with pytest.raises(UserError) as caught:
            call(**{**needed, name: value})
        text = str(caught.value)
        assert name in text and len(text) < 400 and "\0" not in text, (value, text)
    assert not list(tmp_path.iterdir())  # before any work


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "pretrain"])
@pytest.mark.parametrize("length", [300, 4000])
def test_a_name_too_long_for_the_disk_is_a_sentence(name, length, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = getattr(mocokit, name)
    first = next(iter(inspect.signature(call).parameters))
    needed = {
        key: value for key, value in NEEDED.items() if key in inspect.signature(call).parameters
    }
    for which in {first, "data"} & set(needed):
        with pytest.raises(UserError, match="name too long|is too long|no run, checkpoint"):
            call(**{**needed, which: "x" * length})


def test_a_source_has_all_that_is_asked_of_one():
    whole = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), None, "whole")
    assert as_splits(whole) == (whole, None) and as_splits(Splits(whole, whole)) == (whole, whole)
    asked = {*Source.__annotations__, "__len__", "read", "content", "describe", "stamp", "index"}
    for name in asked:
        partial = type("Partial", (), {other: 1 for other in asked - {name}})()
        for given in (partial, Splits(whole, partial), Splits(partial, None), Splits(None, whole)):
            with pytest.raises(UserError, match=r"^data = .*source\.md asks of one$"):
                as_splits(given)


def test_numbers_may_come_alone_and_from_numpy():
    assert several(5) == [5] and several((1, 2)) == [1, 2] and several("5") == ["5"]
    assert several(np.array([3, 4])) == [3, 4]
    check_numbers(k=5, temperature=np.array([0.1, 0.2]), percent=[np.float32(1)], seed=np.int64(3))
    with pytest.raises(UserError, match="k = 0: must be a whole number of at least 1"):
        check_numbers(k=np.array([3, 0]))


def test_the_largest_number_that_a_sentence_names_is_taken():
    """A seed of 2^63 was named as the largest, and refused: as a float it is a number more."""
    for name, limit in LIMITS.items():
        high = limit.high
        check_numbers(**{name: high})
        beyond = high + 1 if isinstance(high, int) else high * 2
        with pytest.raises(UserError) as caught:
            check_numbers(**{name: beyond})
        named = str(caught.value).rpartition(" ")[2].replace(",", "")
        assert (
            float(named) == high
            if limit.high != int(high) or not limit.whole
            else int(named) == high
        )


def test_a_lone_k_is_the_list_of_it(toy_npz):
    found = [
        mocokit.evaluate_knn(
            "random:resnet_tiny", toy_npz, k=k, size=16, device="cpu", baseline=False
        )
        for k in (3, np.array([3]))
    ]
    scores = [[one.scores.confusion.tolist() for one in each.results] for each in found]
    assert scores[0] == scores[1] and scores[0]


def test_checked_leaves_a_function_as_it_is():
    @checked
    def named(place: str | Path, *, deep: bool = False) -> tuple[Any, bool]:
        """What it does."""
        return place, deep

    assert named(Path("a"), deep=True) == (Path("a"), True) and named("a") == ("a", False)
    assert named.__doc__ == "What it does." and named.__name__ == "named"
    with pytest.raises(TypeError, match="missing"):
        named()
    with pytest.raises(UserError, match=r"^place = 5: must be text or a path$"):
        named(5)
    with pytest.raises(UserError, match=r"^deep = 'yes': must be True or False$"):
        named("a", deep="yes")


def test_paths_and_lists_of_names():
    check("out", None, str | Path | None)
    check("names", ["a"], Sequence[str])
    with pytest.raises(UserError, match=r"^out = 'a\\x00b': holds a zero byte, which no path"):
        check("out", "a\0b", str | Path | None)
    with pytest.raises(UserError, match=r"is 4,096 bytes long, which no path may"):
        check("out", "ä" * 2048, str)
    check("out", "ä" * 2047, str)
