"""The run folder: what is in it, whether its run can be resumed, and its lock."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mocokit import files, settings as settings_
from mocokit.engine import identity as identity_
from mocokit.engine.record import read_steps
from mocokit.errors import MocokitError, UserError
from mocokit.settings.schema import Settings

ROOT = Path("runs")
_NO_MISTAKE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of a full or failing disk, not of the user


class RunFolder:
    """Paths of a run folder, and the state of the run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.last = path / "last.pt"
        self.index = path / "images.idx"
        self.bad_images = path / "bad_images.txt"
        self.backbone = path / "backbone.safetensors"
        self.sheet = path / "views.png"
        self.readme = path / "README.md"
        self.evaluations = path / "evaluations.jsonl"
        self.identity = path / "run.json"
        self.lock = path / ".lock"

    @property
    def is_run(self) -> bool:
        try:
            return self.config.is_file()
        except OSError as error:
            raise self.unwritable(error) from None

    @property
    def is_begun(self) -> bool:
        """Whether a run was killed here before it wrote its settings, and nothing else is here."""
        own = {".lock", self.checkpoints.name, files.partial_of(self.config).name}
        found = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        return bool(found) and found <= own and not any(self.checkpoints.glob("*"))

    def settings(self) -> Settings:
        return settings_.load(self.config)

    def result(self) -> dict[str, Any] | None:
        """The last line of the metrics if the run is finished, else None."""
        lines, _ = read_steps(self.metrics)
        return lines[-1] if lines and lines[-1].get("finished") else None

    def unscored(self) -> bool:
        """Whether the last line of the metrics is a training step, not a line of scores."""
        lines, _ = read_steps(self.metrics)
        return bool(lines) and "loss" in lines[-1]

    def create(self, settings: Settings, resolved: Mapping[str, Any]) -> None:
        """Make the folder and write config.yaml."""
        self.make()
        self.write_config(settings, resolved)

    def write_config(self, settings: Settings, resolved: Mapping[str, Any]) -> None:
        """Write config.yaml into the folder, which is never made here. Raises MocokitError."""
        # The folder is locked. `is_begun` knows the partial file that a kill may leave.
        with files.writing(self.config, room=1):
            files.write_text(self.config, settings_.to_yaml(settings, resolved), sole_writer=True)

    def make(self) -> None:
        """Make the folder; raises MocokitError where nothing can be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock.touch()
        except OSError as error:
            raise self.unwritable(error) from None

    def unwritable(self, error: OSError) -> MocokitError:
        kind = MocokitError if error.errno in _NO_MISTAKE else UserError
        return kind(
            f"cannot write the run folder {files.show(self.path)} ({files.reason_of(error)}); "
            "choose another with --out"
        )

    def conflicts(self, settings: Settings) -> list[str]:
        """Identity settings in which this folder's run differs from `settings`, and both values."""
        pairs = differing(self.settings(), settings)
        return [f"{name} ({ours} there, {asked} asked)" for name, ours, asked in pairs]


def differing(one: Settings, other: Settings) -> list[tuple[str, Any, Any]]:
    """(path, value in one, value in the other) of the identity settings in which two differ."""
    a, b = settings_.identity(one), settings_.identity(other)
    return [(name, a[name], b.get(name)) for name in a if a[name] != b.get(name)]


def next_folder(recipe: str, data: str, root: Path = ROOT) -> RunFolder:
    """runs/<recipe>-<data>-NNN with the first free number after the highest."""
    stem = _stem(recipe, data)
    numbers = [number for number, _ in _numbered(root, stem)]
    return RunFolder(root / f"{stem}-{max(numbers, default=0) + 1:03d}")


def claim_folder(recipe: str, data: str, root: Path = ROOT) -> RunFolder:
    """Make the next folder; if another run makes it first, the one after."""
    while True:
        folder = next_folder(recipe, data, root)
        try:
            folder.path.mkdir(
                parents=True
            )  # of several processes, one makes it and the others fail
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise folder.unwritable(error) from None


def unfinished(recipe: str, data: str, root: Path = ROOT) -> list[RunFolder]:
    """Runs of this recipe and data that are not finished, newest first."""
    numbered = sorted(_numbered(root, _stem(recipe, data)), reverse=True)
    folders = [RunFolder(path) for _, path in numbered]
    return [folder for folder in folders if folder.is_run and _is_unfinished(folder)]


def _is_unfinished(folder: RunFolder) -> bool:
    try:
        return folder.result() is None
    except UserError:  # its metrics cannot be read
        return False


def _stem(recipe: str, data: str) -> str:
    if recipe == data:  # the demo
        return recipe
    return f"{recipe}-{re.sub(r'[^A-Za-z0-9._]+', '_', data).strip('._') or 'data'}"


def _numbered(root: Path, stem: str) -> list[tuple[int, Path]]:
    pattern = re.compile(re.escape(stem) + r"-(\d{3,})")
    if not root.is_dir():
        return []
    matches = ((pattern.fullmatch(path.name), path) for path in root.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


class Hold:
    """The lock on a run folder. `number` is the run's own, of run.json, once it is known."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._file = folder, _take(folder.lock)
        self.number = ""

    def check(self) -> None:
        """Raises MocokitError if the folder is not there any more, or holds another run."""
        if _is_at(self._file, self._folder.lock):
            return
        # The lock file alone may be gone, and some network disks number their files anew.
        found = identity_.read(self._folder.identity)
        if not self.number or found is None or found.run != self.number:
            raise MocokitError(
                f"the run folder {files.show(self._folder.path)} was deleted, moved or replaced "
                "while this run was going, so it stops: put the folder back and repeat the command "
                "to resume, or begin a new run"
            )
        self._file.close()  # or it would refuse the new one where it is the same file after all
        try:
            self._file = _take(self._folder.lock)
        except OSError as error:
            raise _refused(self._folder, error) from None

    def release(self) -> None:
        self._file.close()


def _take(path: Path) -> IO[str]:
    """The locked file; raises BlockingIOError if another process holds it, or another OSError."""
    for last in (False, False, True):
        file = os.fdopen(files.open_own(path), "a")
        try:
            files.lock(file, wait=False)
        except BaseException:
            file.close()
            raise
        if last or _is_at(file, path):
            break
        file.close()  # it was deleted in between
    return file


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether a file is open, and the one under this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (OSError, ValueError):  # ValueError: it is closed, since another could not be taken
        return False


def _refused(folder: RunFolder, error: OSError) -> MocokitError:
    if isinstance(error, BlockingIOError):
        return UserError(
            f"another process is running in {files.show(folder.path)}; wait for it, or choose "
            "another --out"
        )
    return folder.unwritable(error)  # a network disk without locks, for one


@contextmanager
def locked(folder: RunFolder) -> Iterator[Hold]:
    """Make the folder and lock it. The lock ends with the process.

    Raises MocokitError if the folder cannot be made or locked, as when another process has it.
    """
    folder.make()
    try:
        hold = Hold(folder)
    except OSError as error:
        raise _refused(folder, error) from None
    try:
        yield hold
    finally:
        hold.release()
