"""The run folder: what is in it, whether its run can be resumed, and its lock."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mocokit import files, settings as settings_
from mocokit.engine.record import read_metrics
from mocokit.errors import UserError
from mocokit.settings.schema import Settings

ROOT = Path("runs")


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
        return ".lock" in found and found <= own and not any(self.checkpoints.glob("*"))

    def settings(self) -> Settings:
        return settings_.load(self.config)

    def result(self) -> dict[str, Any] | None:
        """The last line of the metrics if the run is finished, else None."""
        lines = read_metrics(self.metrics)
        return lines[-1] if lines and lines[-1].get("finished") else None

    def unscored(self) -> bool:
        """Whether the last line of the metrics is a training step, not a line of scores."""
        lines = read_metrics(self.metrics)
        return bool(lines) and "loss" in lines[-1]

    def create(self, settings: Settings, resolved: Mapping[str, Any]) -> None:
        """Write config.yaml."""
        self.make()
        # The folder is locked. `is_begun` knows the partial file that a kill may leave.
        files.write_text(self.config, settings_.to_yaml(settings, resolved), sole_writer=True)

    def make(self) -> None:
        """Make the folder; raises UserError where nothing can be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / ".lock").touch()
        except OSError as error:
            raise self.unwritable(error) from None

    def unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the run folder {self.path} ({error.strerror}); choose another with --out"
        )

    def conflicts(self, settings: Settings) -> list[str]:
        """Identity settings in which this folder's run differs from `settings`, and both values."""
        ours, asked = settings_.identity(self.settings()), settings_.identity(settings)
        return [f"{k} ({ours[k]} there, {asked[k]} asked)" for k in ours if ours[k] != asked[k]]


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
    return [folder for folder in folders if folder.is_run and folder.result() is None]


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


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Make the folder and lock it. The lock ends with the process.

    Raises UserError if the folder cannot be made or locked, or if another process holds the lock.
    """
    folder.make()
    with ExitStack() as stack:  # so that an error of the block is not taken for one of the lock
        try:
            stack.enter_context(files.locked(folder.path / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(
                f"another process is running in {folder.path}; wait for it, or choose another --out"
            ) from None
        except OSError as error:  # a network disk without locks, for one
            raise folder.unwritable(error) from None
        yield
