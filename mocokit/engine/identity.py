"""Which run a folder holds: run.json, written once, before the first step.

Its settings are in config.yaml and its images in images.idx. What is here tells two runs apart that
agree in both, and says what the image files were like when the run began.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mocokit.files import read_regular, write_text

_LARGEST = 2**24  # bytes of a run.json
# What reading anything but our own file may raise; 1e999 is no whole number, and overflows.
_DAMAGED = (
    OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """`run` is drawn when a run is created. Empty texts and no files mean: not known.

    start: hash of the weights before the first step; fingerprint: of the images, by name;
    places: where they lay; files: size in bytes and time of change in ns of image files, by name,
    of all or of some.
    """

    run: str
    start: str = ""
    fingerprint: str = ""
    places: tuple[str, ...] = ()
    files: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def label(self) -> dict[str, Any]:
        """What each of the run's checkpoints carries."""
        return {"run": self.run, "start": self.start}

    def differences(self, label: Mapping[str, Any]) -> list[str]:
        """In what a checkpoint's label says that it is another run's. What is unknown agrees."""
        names = {"start": "the weights that it began with", "run": "the run's own number"}
        own = self.label
        return [
            text
            for key, text in names.items()
            if own[key] and label.get(key) and label[key] != own[key]
        ]


def new_number() -> str:
    """A number that no other run has."""
    return secrets.token_hex(8)


def read(path: Path) -> Identity | None:
    """What `write` wrote; None where it is missing or damaged."""
    try:
        found = json.loads(read_regular(path, _LARGEST))
        run, start, fingerprint = (found[name] for name in ("run", "start", "fingerprint"))
        places = tuple(found["places"])
        files = {name: (int(size), int(time)) for name, (size, time) in found["files"].items()}
    except _DAMAGED:
        return None
    if not all(isinstance(text, str) for text in (run, start, fingerprint, *places)):
        return None
    return Identity(run, start, fingerprint, places, files)


def write(identity: Identity, path: Path) -> None:
    """All of it or nothing. Raises OSError."""
    write_text(path, json.dumps({"format": 1, **asdict(identity)}) + "\n", sole_writer=True)
