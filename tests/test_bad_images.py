"""An image that failed once stays replaced, whatever stops or resumes the run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mocokit.data.batch import Batch
from mocokit.data.decode import BadImage
from mocokit.data.loader import Loader
from mocokit.data.open import open_data
from mocokit.data.sources.folder import FolderSource
from mocokit.engine.bad_images import BadImages
from mocokit.engine.world import World
from mocokit.run.state import RunState

SIZE, BATCH, EPOCHS = 24, 4, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in")
    for number in range(SIZE):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / f"{number:02}.png")
    return root


class Flaky(FolderSource):
    """Images of which some cannot be read the first `times` times they are asked for.

    What was asked is counted on disk, so that workers count together.
    """

    def __init__(self, root: Path, counts: Path, times: dict[int, int]) -> None:
        source = open_data(root).train
        assert isinstance(source, FolderSource)
        super().__init__(root, source.names, None, (), "flaky")
        self.counts, self.times = counts, times
        counts.mkdir(exist_ok=True)

    def read(self, index: int, bound: int | None = None) -> Any:
        if index in self.times:
            with open(self.counts / str(index), "a") as file:
                file.write("x")
                file.flush()
                if file.tell() <= self.times[index]:
                    raise BadImage("a moment of bad weather")
        return super().read(index, bound)


def run(
    source: FolderSource,
    file: Path,
    workers: int,
    state: Any = None,
    start: int = 0,
    stop: int = 99,
) -> tuple[list[Batch], BadImages]:
    """What a training process does with batches and failures, from a step to another."""
    bad = BadImages(file, SIZE, 1.0, SIZE // BATCH)
    if state is not None:
        bad.load(state)
    options: Any = {"seed": 1, "batch_size": BATCH, "epochs": EPOCHS, "last": "drop", "bound": None}
    loader = Loader(source, workers=workers, start_step=start, known_bad=bad.known, **options)
    batches = []
    for step, batch in loader:
        bad.note(batch.bad, step)
        batches.append(batch)
        if step == stop - 1:  # what is read ahead of it never becomes a part of the run
            break
    loader.close()
    return batches, bad


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert [b.index.tolist() for b in one] == [b.index.tolist() for b in two]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_passes_leaves_the_image_replaced(
    root: Path, tmp_path: Path, workers: int
) -> None:
    """Bit for bit the run in which the image never could be read, with any number of workers."""
    passing = Flaky(root, tmp_path / "a", {5: 1, 17: 1})
    lasting = Flaky(root, tmp_path / "b", {5: 10**6, 17: 10**6})
    one, bad = run(passing, tmp_path / "bad_a", workers)
    two, _ = run(lasting, tmp_path / "bad_b", 0)
    assert set(bad.first) == {5, 17}
    per_epoch = SIZE // BATCH
    assert_same(one[per_epoch:], two[per_epoch:])
    later = np.concatenate([batch.index for batch in one[per_epoch:]])
    assert not {5, 17} & set(later.tolist())
    assert len((tmp_path / "bad_a").read_text().splitlines()) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 6, 13])
def test_a_resumed_run_is_the_straight_one(
    root: Path, tmp_path: Path, workers: int, stop: int
) -> None:
    """The error has passed by the time of the resume; the checkpoint alone remembers it."""
    straight, whole = run(Flaky(root, tmp_path / "a", {5: 1, 17: 1}), tmp_path / "bad_a", 0)
    flaky = Flaky(root, tmp_path / "b", {5: 1, 17: 1})
    begun, bad = run(flaky, tmp_path / "bad_b", 0, stop=stop)
    state = bad.state()
    (tmp_path / "bad_b").unlink(missing_ok=True)
    rest, bad = run(flaky, tmp_path / "bad_b", workers, state, start=stop)
    assert_same(straight, begun + rest)
    assert bad.first == whole.first


def test_steps_after_the_last_checkpoint_are_repeated_as_they_were(
    root: Path, tmp_path: Path
) -> None:
    """Killed after step 9, resumed from step 0: the file knows what failed in between."""
    flaky = Flaky(root, tmp_path / "a", {5: 1, 17: 1})
    begun, bad = run(flaky, tmp_path / "bad", 0, stop=9)
    assert bad.count == 2
    again, _ = run(flaky, tmp_path / "bad", 2, torch.empty(0, 2, dtype=torch.int64))
    assert_same(begun, again[:9])


def test_a_substitute_that_failed_before_is_passed_over(root: Path, tmp_path: Path) -> None:
    source = Flaky(root, tmp_path / "a", {5: 10**6})
    bad = BadImages(tmp_path / "bad", SIZE, 1.0, SIZE // BATCH)
    options: Any = {"seed": 1, "batch_size": BATCH, "epochs": 1, "last": "drop", "bound": None}
    loader = Loader(source, workers=0, known_bad=bad.known, **options)
    step = next(s for s, batch in loader if batch.bad)
    stand_in = next(i for i in loader.batch_at(step).index if i not in _asked(loader, step))
    bad.first[int(stand_in)] = -1  # before this epoch
    other = loader.batch_at(step)
    assert stand_in not in other.index and len(other.index) == BATCH
    assert [number for number, _, _ in other.bad] == [5]  # what is known is not named again


def _asked(loader: Loader, step: int) -> list[int]:
    from mocokit import chance

    window = loader.window(step)
    order = chance.Order(1, window.epoch, SIZE)
    found: list[int] = order[np.arange(window.first, window.last)].tolist()
    return found


def test_lines_cut_short_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bad_images.txt"
    path.write_text("3\t'a'\tempty\tstep 8\n4\t'b'\tem")
    assert BadImages(path, 100, 0.01, 4).first == {3: 7}
    assert BadImages(path, 100, 0.01, 4).state().tolist() == [[3, 7]]


def test_processes_tell_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both know the same afterwards, in the same order; the first one writes."""
    pair = [BadImages(tmp_path / "bad", 100, 0.01, 4, World(rank, 2)) for rank in (0, 1)]
    pair[0].note(((9, "c", "empty"),), 2)
    pair[1].note(((9, "c", "empty"), (4, "d", "empty")), 1)
    told = [list(one._unshared) for one in pair]
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_object",
        lambda parts, mine: parts.__setitem__(slice(2), told),
    )
    assert pair[0].first == {} and not (tmp_path / "bad").exists()
    for one in pair:
        one.share()
    assert pair[0].first == pair[1].first == {4: 1, 9: 1}
    assert [line[0] for line in (tmp_path / "bad").read_text().splitlines()] == ["4", "9"]
    assert pair[1].known(3).tolist() == [] and pair[1].known(4).tolist() == [4, 9]


def test_substitutes_are_drawn_anew_in_each_epoch(root: Path, tmp_path: Path) -> None:
    """By seed, epoch, image and attempt; the loader here is not told of earlier failures."""
    from mocokit import chance

    source = Flaky(root, tmp_path / "a", {5: 10**6})
    found = []
    for seed in (1, 2):
        options: Any = {"batch_size": BATCH, "epochs": EPOCHS, "last": "drop", "bound": None}
        loader = Loader(source, seed=seed, workers=0, **options)
        for epoch in range(EPOCHS):
            order = chance.Order(seed, epoch, SIZE)[np.arange(SIZE)]
            assert sorted(order) == list(range(SIZE))
            step, place = divmod(int(np.flatnonzero(order == 5)[0]), BATCH)
            batch = loader.batch_at(epoch * (SIZE // BATCH) + step)
            number = chance.uniform(seed, epoch, 5, 0, chance.Slot.SUBSTITUTE)
            assert batch.index[place] == (5 + 1 + int(number * (SIZE - 1))) % SIZE != 5
            found.append(int(batch.index[place]))
    assert len({*found}) > 3


def test_processes_tell_each_other_at_every_record_and_at_an_epochs_end():
    """Not at every step, which would wait; not at saves alone, which may be few.

    An image that fails once is to be replaced from the next epoch on, whoever then has it.
    """
    shared: list[int] = []
    noted: list[int] = []
    state = SimpleNamespace(
        step=0,
        effect=SimpleNamespace(steps_per_epoch=5),
        bad=SimpleNamespace(
            note=lambda bad, step: noted.append(step), share=lambda: shared.append(state.step)
        ),
    )
    for state.step in range(1, 13):
        RunState.note_bad(state, (), state.step % 4 == 0)  # type: ignore[arg-type]
    assert shared == [4, 5, 8, 10, 12]
    assert noted == [*range(12)]  # steps are counted from 0 there
