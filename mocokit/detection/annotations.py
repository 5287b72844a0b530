"""Annotations in PASCAL VOC's XML, which are untrusted files.

A document that declares entities is refused, so entities are never expanded. Size, depth and the
number of objects are bounded.
"""

import re
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from mocokit.files import printable, read_regular, reason_of

MAX_BYTES = 2**20  # the largest of VOC has 20 KB
MAX_DEPTH = 16
MAX_OBJECTS = 10_000
MAX_NAME = 100  # characters
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FIELDS = {("name",), ("difficult",), *(("bndbox", corner) for corner in _CORNERS)}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)  # float() takes more
_DIFFICULT = {"0": False, "": False, "false": False, "1": True, "true": True}


class BadAnnotation(Exception):
    """An annotation or an object in it cannot be used. The text is a short reason."""


class Annotated(NamedTuple):
    """An object as VOC's file describes it: pixels count from 1, and both ends are inside.

    dataset.py makes them count from 0.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


class Annotation(NamedTuple):
    """The usable objects of an image, a reason for each other one, and the stated size (w, h)."""

    objects: list[Annotated]
    reasons: list[str]
    size: tuple[float, float] | None = None


_Fields = dict[tuple[str, ...], str]


class _Reader:
    """Collects the text of the fields in _FIELDS of each annotation/object, and of the size."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.objects: list[_Fields] = []
        self.twice: set[int] = set()  # objects that state a field twice, and not alike
        self.size: _Fields = {}
        self.text: list[str] = []

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.path.append(name)
        self.text = []
        if len(self.path) > MAX_DEPTH:
            raise BadAnnotation(f"nested deeper than {MAX_DEPTH}")
        if self.path[1:] == ["object"]:
            self.objects.append({})
            if len(self.objects) > MAX_OBJECTS:
                raise BadAnnotation(f"more than {MAX_OBJECTS:,} objects")

    def data(self, text: str) -> None:
        self.text.append(text)

    def end(self, name: str) -> None:
        field, text = tuple(self.path[2:]), "".join(self.text).strip()
        if self.path[1:2] == ["object"] and field in _FIELDS:
            if self.objects[-1].setdefault(field, text) != text:
                self.twice.add(len(self.objects))
        elif self.path[1:2] == ["size"] and self.size.setdefault(field, text) != text:
            raise BadAnnotation("states its size twice, and not alike")
        self.path.pop()
        self.text = []


def _refuse(*arguments: object) -> None:
    raise BadAnnotation("declares a document type or entities, refused")


def read_xml(path: Path) -> Annotation:
    """What a file of VOC says. Raises BadAnnotation."""
    reader, parser = _Reader(), expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.data
    parser.StartDoctypeDeclHandler = _refuse
    parser.EntityDeclHandler = _refuse
    try:
        parser.Parse(read_regular(path, MAX_BYTES), True)
    except FileNotFoundError:
        raise BadAnnotation("there is no such annotation") from None
    except (OSError, ValueError, LookupError, expat.ExpatError) as error:
        raise BadAnnotation(printable(reason_of(error))) from None
    objects, reasons = [], []
    for number, fields in enumerate(reader.objects, start=1):
        try:
            if number in reader.twice:
                raise BadAnnotation("states the same twice, and not alike")
            objects.append(_object(fields))
        except BadAnnotation as error:
            reasons.append(f"object {number}: {error}")
    sides = [_number(reader.size.get((side,), "")) for side in ("width", "height")]
    return Annotation(objects, reasons, stated_size(*sides))


def stated_size(width: float | None, height: float | None) -> tuple[float, float] | None:
    """Width and height of an image as its annotation has them; many write 0 for not knowing."""
    return (width, height) if width and height and width > 0 < height else None


def _number(text: str) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else None


def _object(fields: _Fields) -> Annotated:
    name = fields.get(("name",), "")
    if not is_name(name):
        raise BadAnnotation("has no name")
    corners = [_number(fields.get(("bndbox", corner), "")) for corner in _CORNERS]
    left, top, right, bottom = corners
    if left is None or top is None or right is None or bottom is None:
        raise BadAnnotation(f"{name} has no box of four numbers")
    if not (right > left and bottom > top):
        raise BadAnnotation(f"{name} has a box without area")
    difficult = fields.get(("difficult",), "0")
    if difficult.lower() not in _DIFFICULT:
        raise BadAnnotation(f"{name} is neither difficult nor not: it says {difficult[:20]!r}")
    return Annotated(name, (left, top, right, bottom), _DIFFICULT[difficult.lower()])


def is_name(name: str) -> bool:
    """Whether a class can be called this."""
    return bool(name.strip()) and name.isprintable() and len(name) <= MAX_NAME
