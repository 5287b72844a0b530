"""Text in columns, wrapped to a width."""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby, zip_longest
from typing import NamedTuple

GAP = 2  # columns between two cells


class Row(NamedTuple):
    """A line of a table of settings; `path` is `section.name`, or a name without a section."""

    path: str
    value: str
    meaning: str


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_line(row, widths) for row in rows]


def three_columns(rows: Sequence[Sequence[str]], width: int, indent: int) -> list[str]:
    """Rows of three cells: the last one takes the room that is left, and all of them wrap."""
    widths = _widths(rows, width - indent)
    return [" " * indent + line for row in rows for line in _cells(row, widths)]


def settings(blocks: Iterable[tuple[str, list[Row] | str]], width: int) -> list[str]:
    """Tables with one alignment, each under its title, by section; a text stands for no rows."""
    blocks = list(blocks)
    every = [
        (_name(row), row.value, row.meaning)
        for _, rows in blocks
        if not isinstance(rows, str)
        for row in rows
    ]
    widths = _widths(every, width - 4)
    lines = []
    for title, rows in blocks:
        if isinstance(rows, str):
            lines += ["", *wrapped([f"{title}: {rows}"], width)]
            continue
        lines += ["", title]
        for section, members in groupby(rows, key=_section):
            lines.append(f"  {section}")
            for row in members:
                cells = (_name(row), row.value, row.meaning)
                lines += [f"    {line}" for line in _cells(cells, widths)]
    return lines


def facts(pairs: Iterable[tuple[str, str]], width: int) -> list[str]:
    """`label  text` with all texts aligned."""
    pairs = list(pairs)
    indent = max(len(label) for label, _ in pairs) + GAP
    return [
        line
        for label, text in pairs
        for line in _cells((label, text), (indent - GAP, width - indent))
    ]


def wrapped(paragraphs: Iterable[str], width: int) -> list[str]:
    """The lines of some paragraphs."""
    return [
        line for text in paragraphs for line in textwrap.wrap(text, width, break_on_hyphens=False)
    ]


def _section(row: Row) -> str:
    section, dot, _ = row.path.partition(".")
    return section if dot else "run"


def _name(row: Row) -> str:
    return row.path.partition(".")[2] or row.path


def _widths(rows: Sequence[Sequence[str]], width: int) -> tuple[int, int, int]:
    """Of three columns: as needed, as needed up to half of the rest, and the rest."""
    first, second = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    room = width - first - 2 * GAP
    second = min(second, room * 45 // 100)
    return first, second, room - second


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The lines of one row."""
    cells = [
        textwrap.wrap(cell, width, break_on_hyphens=False)
        for cell, width in zip(row, widths, strict=True)
    ]
    return [_line(part, widths) for part in zip_longest(*cells, fillvalue="")]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return (
        (" " * GAP)
        .join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        .rstrip()
    )
