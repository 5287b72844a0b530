"""Annotations in PASCAL VOC's XML, which are untrusted files.

A document that declares entities is refused, so entities are never expanded. Size, depth and the
number of objects are bounded.
"""

from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from mocokit.data.decode import BadImage, read_file

MAX_BYTES = 2**20  # the largest of VOC has 20 KB
MAX_DEPTH = 16
MAX_OBJECTS = 10_000
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FIELDS = {("name",), ("difficult",), *(("bndbox", corner) for corner in _CORNERS)}


class BadAnnotation(Exception):
    """An annotation or an object in it cannot be used. The text is a short reason."""


class Annotated(NamedTuple):
    """An object as VOC's file describes it: pixels count from 1, and both ends are inside.

    dataset.py makes them count from 0.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


class _Reader:
    """Collects the text of the fields in _FIELDS of each annotation/object."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.objects: list[dict[tuple[str, ...], str]] = []
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
        field = tuple(self.path[2:])
        if self.path[1:2] == ["object"] and field in _FIELDS:
            self.objects[-1].setdefault(field, "".join(self.text).strip())
        self.path.pop()
        self.text = []


def _refuse(*arguments: object) -> None:
    raise BadAnnotation("declares a document type or entities, refused")


def read_xml(path: Path) -> tuple[list[Annotated], list[str]]:
    """The usable objects of a file, and a reason for each other object. Raises BadAnnotation."""
    reader, parser = _Reader(), expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.data
    parser.StartDoctypeDeclHandler = _refuse
    parser.EntityDeclHandler = _refuse
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadAnnotation(f"larger than {MAX_BYTES // 2**20} MiB, refused")
        parser.Parse(read_file(path), True)
    except FileNotFoundError:
        raise BadAnnotation("there is no such annotation") from None
    except (OSError, BadImage, ValueError, LookupError, expat.ExpatError) as error:
        raise BadAnnotation(" ".join(str(error).split())[:120]) from None
    objects, reasons = [], []
    for number, fields in enumerate(reader.objects, start=1):
        try:
            objects.append(_object(fields))
        except BadAnnotation as error:
            reasons.append(f"object {number}: {error}")
    return objects, reasons


def _object(fields: dict[tuple[str, ...], str]) -> Annotated:
    name = fields.get(("name",), "")
    if not name or not name.isprintable() or len(name) > 100:
        raise BadAnnotation("has no name")
    try:
        left, top, right, bottom = (float(fields[("bndbox", corner)]) for corner in _CORNERS)
    except (KeyError, ValueError):
        raise BadAnnotation(f"{name} has no box of four numbers") from None
    if not (right > left and bottom > top):
        raise BadAnnotation(f"{name} has a box without area")
    return Annotated(name, (left, top, right, bottom), fields.get(("difficult",), "0") == "1")
