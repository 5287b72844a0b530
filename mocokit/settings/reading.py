"""Plain values from text that anybody may have written: YAML within bounds, one rule for scalars.

What stands without quotes is `null`, `true` or `false`, a decimal number, or else text:

    null ~ None (or nothing)   null
    true false                 a truth value; yes, on and 1 are none
    10 -3 0.5 .5 1e-3          a number; 010, 0x10, 1_000 and 1:30 are none
    anything else              text: a name, a path, a date

So nothing is octal, sexagesimal or a date unseen. A setting takes only the kind that it is declared
with (section.py): what is text here never becomes a number there.
"""

import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mocokit.errors import UserError
from mocokit.files import brief, printable, read_regular, reason_of, show

# Settings are some hundred values of a few kB, two sections deep.
LARGEST = 2**18  # characters
MOST = 20_000  # values, each counted as often as aliases repeat it
DEEPEST = 16

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict, _SHORT.maxstring = 2, 5, 5, 3, 40
_NULL = frozenset({"", "~", "null", "Null", "NULL", "None"})
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,399})")
_DECIMAL = re.compile(
    r"[-+]?(((0|[1-9][0-9]{0,399})(\.[0-9]{0,399})?|\.[0-9]{1,399})([eE][-+]?[0-9]{1,9})?"
    r"|\.(inf|nan))"
)


def scalar(text: str) -> Any:
    """The value of a text without quotes: None, a bool, an int, a float, or the text itself."""
    if text in _NULL:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def assigned(text: str, origin: str) -> Any:
    """The value in `--set path=value`: a YAML list, mapping or quoted text, or else a scalar.

    Raises UserError.
    """
    text = text.strip()
    return from_text(text, origin) if text[:1] in {"[", "{", '"', "'"} else scalar(text)


def from_file(path: Path) -> Any:
    """What a YAML file says. Raises UserError."""
    try:
        content = read_regular(path, LARGEST)
        return from_text(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"cannot read {show(path)}: it is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read {show(path)}: {reason_of(error)}") from None


def from_text(text: str, origin: str) -> Any:
    """What a YAML text says: dicts with keys of text, lists, and scalars by the rule above.

    Raises UserError, which names `origin`, for what is not YAML or exceeds the bounds, for a key
    that stands twice, and for tags: a text makes no object.
    """
    origin = printable(origin)
    if len(text) > LARGEST:
        raise UserError(f"{origin} is no settings: it has {len(text):,} characters")
    try:
        return _Document(text).value()
    except _Refused as refused:
        raise UserError(f"{origin} {refused}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{origin} is not YAML: {brief(error.problem or '')}{where}") from None
    except Exception as error:  # PyYAML's scanner lets what Python raises through
        raise UserError(f"{origin} is not YAML: {reason_of(error)}") from None


def shown(value: Any) -> str:
    """A value for a message, in about a hundred characters at most."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return printable(_SHORT.repr(value))


class _Refused(Exception):
    """What is YAML, and is not taken."""


class _Document:
    """Builds plain values from PyYAML's events, of which it takes no more than the bounds allow."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self._count = 0
        self._anchors: dict[str, tuple[Any, int]] = {}

    def value(self) -> Any:
        """The only document's; None if there is none."""
        found = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Refused("holds several YAML documents; keep one")
                found = self._node(next(self._events), 0)
        return found

    def _node(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._repeated(event)
        if event.tag is not None:
            raise _Refused(f"has a tag, {brief(event.tag)}; write plain values, without tags")
        start = self._count
        self._take(1)
        if depth > DEEPEST:
            raise _Refused(f"is nested over {DEEPEST} deep; settings are at most {DEEPEST}")
        if isinstance(event, yaml.ScalarEvent):
            found: Any = event.value if event.style else scalar(event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            found = [self._node(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        else:
            found = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = found, self._count - start
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in self._until(yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise _Refused("has a key that is no text")
            if key.value in found:
                raise _Refused(f"states {brief(key.value)} twice; keep one")
            self._take(1)
            found[key.value] = self._node(next(self._events), depth + 1)
        return found

    def _repeated(self, event: Any) -> Any:
        if event.anchor not in self._anchors:
            raise _Refused(f"repeats {brief(event.anchor)}, which is not stated before")
        value, size = self._anchors[event.anchor]
        self._take(size)
        return value

    def _until(self, end: type) -> Iterator[Any]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _take(self, number: int) -> None:
        self._count += number
        if self._count > MOST:
            raise _Refused(f"holds over {MOST:,} values; settings are some hundred")


class _Dumper(yaml.SafeDumper):
    """Puts a text in quotes where `scalar` would read another value."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if scalar(text) == text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def to_text(tree: Any, **options: Any) -> str:
    """A tree of plain values as YAML, which `from_text` reads back; other readers do too."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, **options)
    return text
