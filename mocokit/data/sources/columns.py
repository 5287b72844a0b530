"""What the columns of a parquet file mean: which holds images, which classes, and what they are."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocokit.data.npz import memory
from mocokit.data.source import extended
from mocokit.data.sources.arrays import numbered
from mocokit.errors import UserError
from mocokit.files import printable, show

_CLASSES = ("label", "labels", "fine_label", "class")  # usual names
_REMEDY = "download it again"
_MOST_ROWS, _MOST_COLUMNS = 10**9, 10**5
_NO_CLASS = -1  # Hugging Face writes it where a class is kept secret

Labels = tuple[NDArray[np.int64] | None, tuple[str, ...], str]


class Columns(NamedTuple):
    """The columns of images and of classes, and the names of the classes, where they are given."""

    image: str
    label: str | None
    names: tuple[str, ...]

    @classmethod
    def common(cls, files: Sequence[Any], paths: Sequence[Path]) -> "Columns":
        """Those of all files of a set; raises UserError where one has others."""
        first, *others = (cls.of(file, path) for file, path in zip(files, paths, strict=True))
        for other, path in zip(others, paths[1:], strict=True):
            if other[:2] != first[:2]:
                text = f"{show(path)} has other columns of images and classes than {show(paths[0])}"
                raise UserError(f"{text}: give the files of one set")
        return first

    @classmethod
    def of(cls, file: Any, path: Path) -> "Columns":
        """What Hugging Face wrote about them comes first; else types and usual names decide."""
        schema = file.schema_arrow
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            described = {name: one for name, one in features.items() if isinstance(one, dict)}
        except (KeyError, ValueError, TypeError, AttributeError):
            described = {}
        kinds = {name: one.get("_type") for name, one in described.items()}
        images = [name for name in schema.names if kinds.get(name) == "Image"]
        bare = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
        images += sorted(bare, key=_CLASSES.__contains__)  # a label may be bytes too
        if not images:
            found = ", ".join(map(printable, schema.names))
            raise UserError(f"{show(path)} has no column of images (it has: {found}): give another")
        labels = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
        labels += [name for name in _CLASSES if name in schema.names]
        names = described.get(labels[0], {}).get("names") if labels else None
        named = enumerate(names) if isinstance(names, list) else ()
        texts = tuple(printable(str(one or "")).strip() or str(n) for n, one in named)
        return cls(images[0], labels[0] if labels else None, texts)

    def labels(self, parts: Sequence[Any], known: tuple[str, ...]) -> Labels:
        """The class of each row as a number, the classes, and why there are none after all.

        `known` are those that training has, if these rows are for validation; texts that are not
        among them are numbered after them.
        """
        kinds = {_kind(part.type) for part in parts}
        if kinds == {"texts"}:
            return _by_text([text for part in parts for text in part.to_pylist()], known)
        if kinds != {"numbers"}:
            held = " and ".join(sorted(kinds))
            return None, (), f"holds {held}, which names no class: labels are left out"
        # Where a row has none, numbers arrive as floats with NaN.
        values = np.concatenate([part.to_numpy().astype(np.float64) for part in parts])
        without = np.isnan(values) | (values == _NO_CLASS)
        if without.any():
            return None, (), _without(int(without.sum()), len(values))
        if not np.isfinite(values).all() or (values < 0).any() or (values % 1).any():
            return None, (), "holds numbers below 0 or with a fraction: labels are left out"
        found = values.astype(np.int64)
        least = numbered(found)
        return found, self.names if len(self.names) >= len(least) else least, ""


def _kind(of: Any) -> str:
    """texts, numbers, or the type's own name."""
    types = load_pyarrow().types
    if types.is_dictionary(of):
        of = of.value_type
    if types.is_string(of) or types.is_large_string(of):
        return "texts"
    numeric = types.is_integer(of) or types.is_boolean(of) or types.is_floating(of)
    return "numbers" if numeric else str(of)


def _by_text(texts: Sequence[str | None], known: tuple[str, ...]) -> Labels:
    given = [text for text in texts if text is not None and text.strip()]
    if len(given) < len(texts):
        return None, (), _without(len(texts) - len(given), len(texts))
    raw = sorted(set(given))
    named = tuple(map(printable, raw))
    classes = extended(known, named)
    places = {name: number for number, name in enumerate(classes)}
    numbers = {one: places[name] for one, name in zip(raw, named, strict=True)}
    return np.fromiter((numbers[one] for one in given), np.int64, len(given)), classes, ""


def _without(count: int, rows: int) -> str:
    return f"gives no class for {count:,} of {rows:,} rows: labels are left out"


def opened(path: Path) -> Any:
    """A parquet file, of which the end alone was read. Raises UserError."""
    pyarrow = load_pyarrow()
    if not path.is_file():
        raise UserError(f"{show(path)} is no file: give parquet files")
    try:
        file = pyarrow.parquet.ParquetFile(
            os.fspath(path), thrift_string_size_limit=2**27, thrift_container_size_limit=2**24
        )
        _check(file.metadata)
        return file
    except _damage() as error:
        raise UserError(f"{show(path)} is no parquet file ({_why(error)}): {_REMEDY}") from error


def _check(described: Any) -> None:
    """Raises ValueError for numbers of rows and columns that would take all memory, or hours."""
    groups = described.num_row_groups
    rows = [described.row_group(number).num_rows for number in range(groups)]
    if min(rows, default=0) < 0 or sum(rows) != described.num_rows or sum(rows) > _MOST_ROWS:
        raise ValueError(f"its numbers of rows are damaged, or above {_MOST_ROWS:,}")
    if described.num_columns > _MOST_COLUMNS:
        raise ValueError(f"it has more than {_MOST_COLUMNS:,} columns")


def check_group(file: Any, group: int, column: str) -> None:
    """Raises UserError where a group of rows says that its images take more than all memory."""
    described, total = file.metadata.row_group(group), 0
    for number in range(described.num_columns):
        chunk = described.column(number)
        if chunk.path_in_schema.split(".")[0] == column:
            total += max(0, chunk.total_uncompressed_size)
    if total > memory():
        needed = f"{total / 2**30:,.1f} GiB for {described.num_rows:,} rows"
        raise UserError(f"a parquet file takes {needed} at once: write it in smaller row groups")


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged parquet file may raise."""
    own: type[Exception] = load_pyarrow().ArrowException
    return own, OSError, ValueError, KeyError, IndexError, MemoryError, RuntimeError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UserError for damage that shows while a parquet file is read, and disks that fail."""
    try:
        yield
    except UserError:
        raise
    except _damage() as error:
        raise UserError(f"{show(path)} cannot be read ({_why(error)}): {_REMEDY}") from error


def _why(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:120])


def load_pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing("pyarrow") from None
    return pyarrow


def missing(package: str) -> UserError:
    return UserError(f"parquet files need {package}: pip install 'mocokit[hub]'")


def _holds_bytes(kind: Any) -> bool:
    types = load_pyarrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
