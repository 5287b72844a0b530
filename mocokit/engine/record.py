"""The output of a run: metrics.jsonl, one JSON object a line, and progress on a terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mocokit.errors import UserError
from mocokit.files import (
    Unheard,
    json_lines,
    open_own,
    printable,
    reason_of,
    show,
    write_text,
    writing,
)

_RESUME = "make room, and resume with the same command"
PLAIN_SECONDS = 10.0  # between progress lines where there is no terminal to redraw


class Metrics:
    """metrics.jsonl of a run folder; opening it removes lines after `step` steps, and a result.

    `missing` are lines up to that step that may never have reached the file. `damaged` counts the
    lines that were left out because nobody can read them. Raises MocokitError.
    """

    def __init__(
        self, path: Path, step: int = 0, missing: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        found, self.damaged = read_steps(path)
        early = (line for line in found if step > 0 and line["step"] <= step)
        kept = [line for line in early if not line.get("finished")]
        kept += [dict(line) for line in missing if line not in kept]
        self._path, self._file = path, -1
        with writing(path, room=1, remedy=_RESUME):
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_text(path, text, sole_writer=True)
            self._open()
        self._cut = False  # whether the last line may lack its end

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line of `rounded` values. Raises MocokitError, for a full disk and the like."""
        start = "\n" if self._cut else ""
        left = memoryview(f"{start}{json.dumps(rounded(values))}\n".encode())
        self._cut = True
        with writing(self._path, room=1, remedy=_RESUME):
            if not os.fstat(self._file).st_nlink:  # this file alone was deleted
                self.close()
                self._open()
            while left:  # a disk that fills up takes a part
                left = left[os.write(self._file, left) :]
        self._cut = False

    def _open(self) -> None:
        self._file = open_own(self._path)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Floats with six significant digits; those that are not finite are None."""
    return {k: _rounded(v) if isinstance(v, float) else v for k, v in values.items()}


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON knows no infinity


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read; none of a missing file.

    Raises UserError for what is no file, or is larger than 1 GiB.
    """
    return read_lines(path)[0]


def read_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's metrics, each with its `step`, and how many others there are.

    Raises UserError as `read_metrics` does.
    """
    lines, damaged = read_lines(path)
    kept = [line for line in lines if type(line.get("step")) is int]
    return kept, damaged + len(lines) - len(kept)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of JSON lines, and how many of its lines are damaged.

    Raises UserError as `read_metrics` does.
    """
    try:
        return json_lines(path)
    except NotADirectoryError:  # as missing: it is told where something is to be written
        return [], 0
    except OSError as error:
        why = reason_of(error)
        raise UserError(f"cannot read {show(path)} ({why}): move it away, or restore it") from None


class Meter:
    """Images per second and the share of time spent waiting for data, since the last read."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._wait, self._images = time.perf_counter(), 0.0, 0

    def step(self, images: int, wait: float) -> None:
        self._images += images
        self._wait += wait

    def read(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rates = {"images_per_s": self._images / elapsed, "data_wait": self._wait / elapsed}
        self._reset()
        return rates


class StatusLine:
    """One line that redraws itself on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, terminal: Terminal) -> None:
        self._last = time.monotonic()
        self._terminal = terminal
        self._live: Live | None = None
        if self._terminal.is_terminal:
            self._live = Live(console=self._terminal, refresh_per_second=4, transient=True)
            self._live.start()

    def show(self, line: str, last: bool = False) -> None:
        """Redraw the line; `last` shows it even if the line before is recent."""
        if self._live:
            self._live.update(Text(printable(line)))
        elif last or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self._terminal.print(Text(printable(line)))

    def close(self) -> None:
        if self._live:
            self._live.stop()


class Progress:
    """The status line of pre-training."""

    def __init__(
        self, terminal: Terminal, total_steps: int, first_step: int, steps_per_epoch: int
    ) -> None:
        self._total, self._first, self._per_epoch = total_steps, first_step, steps_per_epoch
        self._start = time.monotonic()
        self._status = StatusLine(terminal)

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Redraw after `step` steps."""
        self._status.show(self._line(step, values), last=step >= self._total)

    def close(self) -> None:
        self._status.close()

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        done = step - self._first
        left = (time.monotonic() - self._start) / max(done, 1) * (self._total - step)
        width = len(str(self._total))
        chance, contrast = values.get("chance_loss"), values.get("contrast_top1")
        parts = [
            f"step {step:{width}d}/{self._total}",
            f"epoch {(step - 1) // self._per_epoch + 1}",
            f"loss {values['loss']:.3f}"
            + (f" (chance {chance:.2f})" if chance is not None else ""),
            *([f"contrast {contrast:4.0%}"] if contrast is not None else []),
            f"{values['images_per_s']:,.0f} images/s",
            f"data wait {values['data_wait']:.0%}",
            f"{clock(left)} left",
        ]
        if values.get("bad_images"):
            parts.insert(-1, f"{values['bad_images']} bad images")
        return " · ".join(parts)


class Console:
    """Prints sentences and small tables; silent on all processes but the first."""

    def __init__(self, on: bool = True) -> None:
        heard = cast(IO[str], Unheard(sys.stderr))
        self.terminal = Terminal(file=heard, soft_wrap=True, highlight=False, quiet=not on)

    def say(self, text: str, style: str | None = None) -> None:
        self.terminal.print(Text(printable(text), style=style or ""))

    def note(self, text: str) -> None:
        """Print what a user should know, though nothing stops for it."""
        self.say(f"note: {text}", "yellow")

    def table(self, title: str, columns: list[str], rows: Sequence[tuple[str, ...]]) -> None:
        """Print a small table; all columns but the first are aligned right."""
        table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
        for number, name in enumerate(columns):
            table.add_column(Text(printable(name)), justify="left" if number == 0 else "right")
        for row in rows:
            # As Text: class names come from strangers, and rich would read "[/a]" as markup.
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.terminal.print(table)

    @contextmanager
    def counting(self, done: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; yields a function of the number of items done since its last call.

        Without a terminal, a line every ten seconds.
        """
        if self.terminal.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), MofNCompleteColumn())
            with Bar(*columns, TimeRemainingColumn(), console=self.terminal) as bar:
                task = bar.add_task(printable(done), total=total)
                yield lambda count: bar.advance(task, count)
            return
        said, count = time.monotonic(), 0

        def advance(new: int) -> None:
            nonlocal said, count
            count += new
            if time.monotonic() - said >= PLAIN_SECONDS:
                said = time.monotonic()
                self.say(f"{done} {count:,} of {total:,}")

        yield advance


def clock(seconds: float) -> str:
    """1:05 or 2:03:04."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
