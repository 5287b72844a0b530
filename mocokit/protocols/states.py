"""What an unfinished probe needs to resume, kept in the user's cache until its result is kept.

A probe is named by a hash of everything that its numbers depend on, so a state of other weights,
images or options is never found. The state is a checkpoint with a checksum. A damaged one costs the
probe its progress and nothing else.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mocokit.data.source import Source
from mocokit.engine import checkpoint
from mocokit.engine.runtime import instruction_set
from mocokit.engine.stop import Stopped, raise_if_interrupted
from mocokit.errors import MocokitError, UserError
from mocokit.files import cache_folder, locked, reason_of, show
from mocokit.protocols.features import probe_spec
from mocokit.protocols.labelled import LabelledSplit
from mocokit.weights.subject import FrozenModel

FORMAT = 1
LIMIT_GIB = 20.0  # size of all states; beyond it, the least recently saved are deleted
SAVING_SHARE = 1 / 20  # of the time at most, where epochs are short
STEP_SECONDS = 300.0  # between saves within an epoch
LAST = 10**8 - 1  # the number of a result, which no step has
Say = Callable[[str], None]
EndOf = Literal["step", "epoch", "end"]  # of all epochs
Content = Callable[[], Mapping[str, Any]]


@dataclass
class State:
    """The state of one probe. `found` is what an earlier attempt saved, if it did.

    Without a folder nothing is kept.
    """

    name: str  # shown to the user
    folder: Path | None
    identity: str
    machine: str
    say: Say
    found: dict[str, Any] | None = None
    kept: str = "before the first step"
    _saved_at: float = field(default_factory=time.monotonic)
    _cost: float = 0.0  # seconds that the last save took

    def load(self) -> None:
        """Look for what an earlier attempt saved. What cannot be used is deleted, with a note."""
        if self.folder is None:
            return
        try:
            found = checkpoint.load_newest(self.folder / "checkpoints", log=self.say)
        except UserError as error:
            self.say(f"note: {self.name} begins anew: {error}")
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            return
        if found is None or found.get("identity") != self.identity:
            return
        self.found, self.kept = found, str(found["kept"])
        self.say(f"{self.name}: resumes {self.kept}")
        if found["machine"] != self.machine:
            self.say(
                f"note: it began with {found['machine']}, now it is {self.machine}: sums may round "
                "differently"
            )

    def reached(self, step: int, words: str, content: Content, end_of: EndOf) -> None:
        """Called after each step. Save where it is due, and before a signal ends the work.

        `words` say where the probe is; `content` makes what it needs to resume from there. Raises
        Stopped once that is saved, and MocokitError where it cannot be saved then.
        """
        try:
            raise_if_interrupted()
        except Stopped:
            self._save(step, words, content())
            raise
        least = STEP_SECONDS if end_of == "step" else 0.0
        due = time.monotonic() - self._saved_at >= max(least, self._cost / SAVING_SHARE)
        if due or end_of == "end":
            self._save_if_possible(step, words, content())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Keep the result in place of what led to it."""
        self._save_if_possible(LAST, "after its test", result)

    def _save_if_possible(self, step: int, words: str, content: Mapping[str, Any]) -> None:
        """A full disk ends no probe: it goes on without a state."""
        try:
            self._save(step, words, content)
        except MocokitError as error:
            self.say(f"note: {error}; the probe goes on, but a stop would lose it")
            self.folder = None

    def _save(self, step: int, words: str, content: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        began = time.monotonic()
        state: dict[str, Any] = {"identity": self.identity, "machine": self.machine, "kept": words}
        state["threads"] = torch.get_num_threads()
        try:
            checkpoint.save(self.folder / "checkpoints", step, {**state, **content})
            checkpoint.prune(self.folder / "checkpoints", 1)
        except OSError as error:
            raise MocokitError(f"cannot write {show(self.folder)} ({reason_of(error)})") from None
        self.kept, self._saved_at = words, time.monotonic()
        self._cost = self._saved_at - began


class States:
    """The states of the probes of one evaluation, in a folder. Without one, nothing is kept."""

    def __init__(self, folder: Path | None = None, say: Say = lambda text: None) -> None:
        self._folder, self._say = folder, say
        self._used: list[Path] = []
        self._stamps: dict[int, str] = {}

    @classmethod
    def at_home(cls, say: Say) -> "States":
        """Those in the user's cache; of a user without a home none are kept."""
        try:
            return cls(cache_folder() / "probes", say)
        except UserError:
            return cls(None, say)

    @contextmanager
    def of(
        self, name: str, subject: FrozenModel, split: LabelledSplit, values: Mapping[str, Any]
    ) -> Iterator[State]:
        """The state of one probe, which no other process can have meanwhile.

        `values` are the probe's own options. While entered, torch has the number of threads with
        which the probe began, because sums on a CPU depend on it. Raises UserError if another
        process does the same.
        """
        identity = self._identity(subject, split, values)
        digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        path = None if self._folder is None else self._folder / digest
        state = State(name, path, identity, instruction_set(subject.device), self._say)
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            if path is not None:
                try:
                    path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(path / ".lock", wait=False))
                    self._used.append(path)
                    self._prune(path)
                except BlockingIOError:
                    raise UserError(
                        f"another process does the same ({show(path)} is locked): wait for it, or "
                        "set MOCOKIT_CACHE to another folder"
                    ) from None
                except OSError as error:
                    self._say(
                        f"note: cannot keep a state in {show(path)} ({reason_of(error)}); a stop "
                        "would lose what is done: set MOCOKIT_CACHE to a folder with free space"
                    )
                    state.folder = None
            state.load()
            try:
                if state.found is not None:
                    torch.set_num_threads(int(state.found["threads"]))
                yield state
            except Stopped:
                raise Stopped(f"{name}: {_saved(state)}") from None
            finally:
                torch.set_num_threads(threads)

    def forget(self) -> None:
        """Delete the states, once the result is kept."""
        for path in self._used:
            _delete(path)
        self._used.clear()

    def _identity(
        self, subject: FrozenModel, split: LabelledSplit, values: Mapping[str, Any]
    ) -> str:
        """Everything that decides the numbers of a probe, beside threads and hardware."""
        digest = hashlib.blake2b(digest_size=16)
        for numbers in (split.train_numbers, split.train_labels):
            digest.update(numbers.tobytes())
        for numbers in (split.test_numbers, split.test_labels):
            digest.update(numbers.tobytes())
        known = {
            "format": FORMAT,
            "weights": subject.weights,
            "network": [subject.architecture, subject.layer, subject.width],
            "device": [subject.precision, subject.device.type],
            "views": repr(probe_spec(subject.spec)),
            "images": [self._stamp(split.train), self._stamp(split.test), digest.hexdigest()],
            "classes": list(split.classes),
        }
        return json.dumps(known | dict(values), sort_keys=True)

    def _stamp(self, source: Source) -> str:
        """Asked once: it looks at every file."""
        if id(source) not in self._stamps:
            self._stamps[id(source)] = source.stamp()
        return self._stamps[id(source)]

    def _prune(self, kept: Path) -> None:
        """Delete the least recently saved states, until the rest fit the limit."""
        others = [path for path in kept.parent.iterdir() if path not in self._used]
        others.sort(key=_last_saved, reverse=True)
        size = 0
        for path in others:
            size += sum(file.lstat().st_size for file in path.rglob("*.pt"))
            if size > LIMIT_GIB * 2**30:
                _delete(path)


def _saved(state: State) -> str:
    return "nothing of it was kept" if state.folder is None else f"saved {state.kept}"


def _last_saved(path: Path) -> float:
    try:
        return (path / "last.pt").lstat().st_mtime
    except OSError:
        return 0.0


def _delete(path: Path) -> None:
    """Delete a state that no process is using. What cannot be deleted stays."""
    try:
        with locked(path / ".lock", wait=False):
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass
