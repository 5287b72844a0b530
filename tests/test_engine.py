"""Records, run folders, what is due, health, and devices."""

import errno
import io
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mocokit import recipes
from mocokit.chance import Slot, library_seed
from mocokit.engine import record
from mocokit.engine.bad_images import BadImages
from mocokit.engine.due import Due
from mocokit.engine.finite import FiniteWatch, gradient_norm
from mocokit.engine.folder import RunFolder, claim_folder, locked, next_folder, unfinished
from mocokit.engine.record import Console, Metrics, Progress, clock, read_metrics
from mocokit.engine.runtime import choose_device, default_precision, seed_libraries
from mocokit.engine.stop import Stopped, StopSignals, raise_if_interrupted
from mocokit.errors import Interrupted, NonFiniteLoss, UserError
from mocokit.settings import replace


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


class TestMetrics:
    def test_opening_cuts_back_to_the_step(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        metrics = Metrics(path)
        for step in (1, 2, 3):
            metrics.write({"step": step, "loss": 1 / 3})
        metrics.close()
        with open(path, "a") as file:
            file.write('{"step": 4, "lo')  # cut short by a kill
        again = Metrics(path, 2)
        again.write({"step": 3, "loss": 0.5})
        again.close()
        assert lines(path) == [
            {"step": 1, "loss": 0.333333},
            {"step": 2, "loss": 0.333333},
            {"step": 3, "loss": 0.5},
        ]
        Metrics(path, 0).close()
        assert lines(path) == []

    def test_what_is_not_finite_is_null(self, tmp_path):
        metrics = Metrics(tmp_path / "m.jsonl")
        metrics.write({"step": 1, "a": math.inf, "b": math.nan, "c": 1})
        metrics.close()
        assert lines(tmp_path / "m.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1}]

    def test_absent_is_empty(self, tmp_path):
        assert read_metrics(tmp_path / "none") == []

    def test_a_result_is_written_once(self, tmp_path):
        """Opened at its step, for an end that is repeated, the file has the steps alone."""
        path = tmp_path / "metrics.jsonl"
        steps, end = [{"step": 1}, {"step": 2}], {"step": 2, "finished": True}
        for _ in range(2):
            path.write_text("".join(f"{json.dumps(line)}\n" for line in [*steps, end]))
            metrics = Metrics(path, 2)
            assert lines(path) == steps
            metrics.write(end)
            metrics.close()
            assert lines(path) == [*steps, end]

    @pytest.mark.parametrize("lines_lost", [1, 2, 3])
    def test_a_file_that_was_deleted_is_begun_again(self, tmp_path, lines_lost):
        """Every time: what was written before is gone, and nothing that comes after."""
        path = tmp_path / "metrics.jsonl"
        metrics = Metrics(path)
        for first in (1, 11):
            for step in range(first, first + lines_lost):
                metrics.write({"step": step})
            path.unlink()
        for step in (21, 22):
            metrics.write({"step": step})
        assert lines(path) == [{"step": 21}, {"step": 22}]
        os.rename(path, tmp_path / "elsewhere")  # a file that was moved is written on
        metrics.write({"step": 23})
        metrics.close()
        assert not path.exists() and len(lines(tmp_path / "elsewhere")) == 3


def test_progress_says_what_matters(capsys):
    progress = Progress(Console().terminal, 200, 0, 100)
    values = {
        "loss": 5.25,
        "chance_loss": 5.55,
        "contrast_top1": 0.5,
        "images_per_s": 1234.5,
        "data_wait": 0.02,
        "bad_images": 3,
    }
    progress.show(200, values)
    progress.close()
    text = capsys.readouterr().err
    for part in (
        "step 200/200", "epoch 2", "loss 5.250 (chance 5.55)", "contrast  50%", "1,234 images/s",
        "data wait 2%", "3 bad images", "0:00 left",
    ):  # fmt: skip
        assert part in text


@pytest.fixture
def now(monkeypatch):
    """The seconds of the clock that the lines of a run go by; it stands still."""
    seconds = [1000.0]
    monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


@pytest.mark.parametrize(
    ("first", "step", "after", "said"),
    [
        (0, 50, 50, "step  50/200 · epoch 1 .* 2:30 left"),
        (100, 150, 50, "step 150/200 · epoch 2 .* 0:50 left"),  # of its own steps, not of all
        (198, 199, 7200, "step 199/200 · epoch 2 .* 2:00:00 left"),
        (99, 100, 30, "step 100/200 · epoch 1 .* 50:00 left"),
        (99, 101, 30, "step 101/200 · epoch 2 .* 24:45 left"),
        (100, 100, 20, "step 100/200 · epoch 1 .* 33:20 left"),
        (150, 200, 50, "step 200/200 · epoch 2 .* 0:00 left"),
    ],
)
def test_the_time_left_is_at_the_pace_since_the_run_went_on(now, capsys, first, step, after, said):
    progress = Progress(Console().terminal, 200, first, 100)
    now[0] += after
    progress.show(step, {"loss": 5.25, "images_per_s": 9.0, "data_wait": 0.0})
    assert re.fullmatch(f"{said}\n", capsys.readouterr().err)


def test_without_a_terminal_progress_is_a_line_every_ten_seconds_and_the_last(now, capsys):
    progress = Progress(Console().terminal, 9, 0, 9)
    for step, after in enumerate((9.9, 0.1, 9.9, 0.0, 0.2, 5.0, 4.0, 0.0, 0.0), 1):
        now[0] += after
        progress.show(step, {"loss": 5.25, "images_per_s": 9.0, "data_wait": 0.0})
    assert re.findall(r"step (\d)", capsys.readouterr().err) == ["2", "5", "9"]


def test_without_a_terminal_a_count_is_of_all_that_is_done(now, capsys):
    with Console().counting("read", 4000) as advance:
        for new, after in ((300, 9.9), (700, 0.1), (1, 9.9), (1999, 0.1), (1000, 9.0)):
            now[0] += after
            advance(new)
    assert capsys.readouterr().err.splitlines() == ["read 1,000 of 4,000", "read 3,000 of 4,000"]


def test_on_a_terminal_a_count_is_of_all_that_is_done(monkeypatch):
    console, shown = Console(), io.StringIO()
    monkeypatch.setattr(console.terminal, "_file", shown)
    monkeypatch.setattr(console.terminal, "_force_terminal", True)
    with console.counting("read", 40) as advance:
        for new in (3, 7, 20):
            advance(new)
    assert "read" in shown.getvalue() and re.findall(r"(\d+)/40", shown.getvalue())[-1] == "30"


def test_clock():
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


class TestBadImages:
    def test_each_is_named_once_also_after_a_resume(self, tmp_path):
        path = tmp_path / "bad_images.txt"
        bad = BadImages(path, 1000, 0.01, 4)
        bad.note(((3, "a\nb.jpg", "truncated"), (3, "a\nb.jpg", "truncated")), 0)
        bad.note(((5, "c.jpg", "empty"),), 6)
        again = BadImages(path, 1000, 0.01, 4)
        again.note(((5, "c.jpg", "empty"), (9, "d.jpg", "empty")), 7)
        assert again.count == 3
        assert path.read_text().splitlines() == [
            "3\t'a\\nb.jpg'\ttruncated\tstep 1",
            "5\t'c.jpg'\tempty\tstep 7",
            "9\t'd.jpg'\tempty\tstep 8",
        ]

    @pytest.mark.parametrize(
        ("images", "share", "limit"),
        [(100, 0.01, 10), (999, 0.01, 10), (2000, 0.01, 20), (100, 0.0, 10), (100, 1.0, 100)],
    )
    def test_the_limit_is_a_share_and_ten_at_least(self, tmp_path, images, share, limit):
        assert BadImages(tmp_path / "bad_images.txt", images, share, 4).limit == limit

    @pytest.mark.parametrize(("noted", "stored"), [(4, 2), (2, 4), (3, 3)])
    def test_the_earliest_failure_counts(self, tmp_path, noted, stored):
        """Of the file, which a killed run left, and of the checkpoint, whichever is earlier."""
        bad = BadImages(tmp_path / "bad_images.txt", 1000, 0.01, 4)
        bad.note(((3, "a.jpg", "empty"),), noted)
        again = BadImages(tmp_path / "bad_images.txt", 1000, 0.01, 4)
        again.load(torch.tensor([[3, stored], [8, 1]]))
        assert again.first == {3: min(noted, stored), 8: 1}

    @pytest.mark.parametrize(
        ("step", "known"), [(1, False), (8, False), (9, True), (10, False), (12, True), (17, True)]
    )
    def test_a_failure_counts_at_its_step_and_from_the_next_epoch_on(self, tmp_path, step, known):
        """What a killed run left is repeated as it was: read before, and replaced after it."""
        BadImages(tmp_path / "bad_images.txt", 1000, 0.01, 4).note(((3, "a.jpg", "empty"),), 9)
        bad = BadImages(tmp_path / "bad_images.txt", 1000, 0.01, 4)
        assert bad.known(step).tolist() == ([3] if known else [])

    def test_too_many_end_the_run(self, tmp_path):
        bad = BadImages(tmp_path / "bad_images.txt", 2000, 0.01, 4)
        bad.note(tuple((n, "x", "y") for n in range(20)), 0)
        bad.check()
        assert not bad.too_many
        bad.note(((21, "x", "y"),), 1)
        assert bad.too_many
        with pytest.raises(UserError, match=r"21 images .* limit of 20; .*--set data.bad_share"):
            bad.check()


class TestFolders:
    def make(self, path, **changes):
        folder = RunFolder(path)
        settings = replace(recipes.demo(), changes)
        folder.create(settings, {"lr": 0.1})
        return folder, settings

    def test_numbers_rise(self, tmp_path):
        assert next_folder("mocov2", "my photos", tmp_path).path.name == "mocov2-my_photos-001"
        self.make(tmp_path / "mocov2-my_photos-007")
        assert next_folder("mocov2", "my photos", tmp_path).path.name == "mocov2-my_photos-008"
        assert next_folder("demo", "demo", tmp_path).path.name == "demo-001"
        assert next_folder("mocov2", "../..", tmp_path).path == tmp_path / "mocov2-data-001"
        assert next_folder("mocov2", ".a/b.", tmp_path).path == tmp_path / "mocov2-a_b-001"
        self.make(tmp_path / "demo-1000")
        assert next_folder("demo", "demo", tmp_path).path.name == "demo-1001"

    def test_a_folder_that_another_run_makes_first_is_not_taken(self, tmp_path, monkeypatch):
        assert claim_folder("demo", "demo", tmp_path).path.name == "demo-001"
        seen = iter([1, 1, 2])  # what a slow disk shows
        monkeypatch.setattr(
            "mocokit.engine.folder.next_folder",
            lambda *rest: RunFolder(tmp_path / f"demo-00{next(seen)}"),
        )
        assert claim_folder("demo", "demo", tmp_path).path.name == "demo-002"

    @pytest.mark.parametrize(
        ("names", "begun"),
        [
            ("", False),
            (".lock", True),
            (".lock checkpoints/", True),
            (".lock checkpoints/ config.yaml.partial", True),
            (".lock checkpoints/ config.yaml.partial photo.jpg", False),
            (".lock checkpoints/step-00000001.pt", False),
        ],
    )
    def test_a_folder_in_which_a_run_was_killed_before_it_began(self, tmp_path, names, begun):
        for name in names.split():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
        assert RunFolder(tmp_path).is_begun is begun

    def test_the_last_line_says_whether_a_run_is_finished_or_scored(self, tmp_path):
        folder, _ = self.make(tmp_path / "demo-001")
        step, scores, end = {"step": 1, "loss": 2.0}, {"step": 1, "rankme": 3.0}, {"step": 2}
        end |= {"finished": True}
        for lines, unscored, result in (
            ([], False, None),
            ([step], True, None),
            ([step, scores], False, None),
            ([step, scores, end], False, end),
            ([end, step], True, None),
        ):
            folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            assert (folder.unscored(), folder.result()) == (unscored, result)
        folder.metrics.unlink()
        folder.metrics.mkdir()  # nobody can tell: it is not gone on with unasked
        assert unfinished("demo", "demo", tmp_path) == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
    def test_a_full_or_failing_disk_is_no_mistake_of_the_user(self, tmp_path, number):
        error = RunFolder(tmp_path).unwritable(OSError(number, os.strerror(number)))
        assert error.exit_code == (2 if number == errno.EACCES else 1)

    def test_unfinished_come_newest_first(self, tmp_path):
        for number in (1, 2, 3):
            self.make(tmp_path / f"demo-00{number}")
        (tmp_path / "demo-002" / "metrics.jsonl").write_text('{"step": 5, "finished": true}\n')
        found = unfinished("demo", "demo", tmp_path)
        assert [f.path.name for f in found] == ["demo-003", "demo-001"]
        assert RunFolder(tmp_path / "demo-002").result() == {"step": 5, "finished": True}

    def test_settings_come_back_and_conflicts_are_named(self, tmp_path):
        folder, settings = self.make(tmp_path / "run")
        assert folder.settings() == settings
        elsewhere = replace(settings, {"engine.device": "cuda", "save.keep": 9})
        assert folder.conflicts(elsewhere) == []
        other = replace(settings, {"seed": 5, "optim.lr": 0.5})
        assert folder.conflicts(other) == [
            "seed (0 there, 5 asked)",
            "optim.lr (0.002 there, 0.5 asked)",
        ]

    def test_settings_are_written_whole_or_not_at_all(self, tmp_path, monkeypatch):
        """A kill before the file takes its place leaves a folder in which a run may begin."""

        class Killed(BaseException):
            pass

        def kill(*rest, **named):
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            for name in ("replace", "rename", "link"):
                patch.setattr(os, name, kill)
            self.make(tmp_path / "run")
        folder = RunFolder(tmp_path / "run")
        assert not folder.config.exists() and not folder.is_run and folder.is_begun
        self.make(tmp_path / "run")
        assert folder.is_run and not folder.is_begun

    def test_an_unwritable_folder_is_the_users_mistake(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write the run folder .* --out"):
            self.make(tmp_path / "file" / "run")

    def test_a_name_that_no_folder_can_have_is_the_users_mistake(self, tmp_path, monkeypatch):
        def refuse(*rest):
            raise OSError(errno.ENAMETOOLONG, "File name too long")

        monkeypatch.setattr("pathlib.Path.is_file", refuse)
        with pytest.raises(UserError, match=r"cannot write .* \(File name too long\); choose"):
            assert RunFolder(tmp_path / "run").is_run

    def test_two_runs_exclude_each_other(self, tmp_path):
        folder, _ = self.make(tmp_path / "run")
        with (
            locked(folder),
            pytest.raises(UserError, match="another process is running in"),
            locked(RunFolder(folder.path)),
        ):
            pass
        with locked(folder):  # free again
            pass


class Meeting:
    """The clock of a process, and another one that it agrees with, by what it wishes and waits."""

    def __init__(self, monkeypatch, others_wait):
        self.now, self.at, self.met = 1000.0, 0, []
        self.theirs, self.others_wait, self.wishing = [False, False], others_wait, False
        monkeypatch.setattr("mocokit.engine.due.time.monotonic", lambda: self.now)
        monkeypatch.setattr("mocokit.engine.due.dist.get_backend", lambda: "gloo")
        monkeypatch.setattr("mocokit.engine.due.dist.all_reduce", self._all_reduce)

    def step(self, number, seconds):
        self.at, self.now = number, self.now + seconds

    def _all_reduce(self, tensor, op):
        assert op == dist.ReduceOp.MAX
        self.met.append(self.at)
        theirs = torch.tensor([*self.theirs, -self.others_wait], dtype=tensor.dtype)
        tensor.copy_(torch.maximum(tensor, theirs))


class TestDue:
    def due(self, **options):
        defaults = {
            "log_steps": 10, "monitor_epochs": 2, "save_minutes": 1e9, "save_epochs": 1,
            "save_steps": None,
        }  # fmt: skip
        return Due(100, 25, **(defaults | options))

    def test_log(self):
        assert [s for s in range(1, 101) if self.due(log_steps=40).log(s)] == [1, 40, 80, 100]

    def test_monitor_leaves_the_last_epoch_to_the_end(self):
        assert [s for s in range(1, 101) if self.due(monitor_epochs=1).monitor(s)] == [25, 50, 75]
        assert [s for s in range(1, 101) if self.due(monitor_epochs=0).monitor(s)] == []

    def test_save(self):
        due = self.due()
        assert [s for s in range(1, 101) if due.save_or_stop(s, False)[0]] == [25, 50, 75, 100]
        due = self.due(save_epochs=0, save_steps=30)
        assert [s for s in range(1, 101) if due.save_or_stop(s, False)[0]] == [30, 60, 90, 100]
        due = self.due(save_minutes=1e-9)
        assert due.save_or_stop(3, False) == (True, False)

    def test_the_clock_counts_from_the_last_save_of_any_kind(self, monkeypatch):
        """A minute between saves: a planned one, or one that a signal asked for, is one too."""
        now = [1000.0]
        monkeypatch.setattr("mocokit.engine.due.time.monotonic", lambda: now[0])
        due = self.due(save_minutes=1)  # one is planned at step 25
        at = [(3, 59, False), (4, 60, True), (5, 110, False), (25, 115, True), (26, 125, False)]
        at += [(27, 174, False), (28, 175, True), (29, 176, False)]
        for step, seconds, save in at:
            now[0] = 1000.0 + seconds
            assert due.save_or_stop(step, False) == (save, False), (step, seconds)
        now[0] = 1190.0
        assert due.save_or_stop(30, True) == (True, True)
        now[0] = 1249.0
        assert due.save_or_stop(31, False) == (False, False)

    def test_processes_compare_their_copies_every_few_steps(self):
        due = self.due(compare_steps=30, world=2)
        assert [s for s in range(1, 101) if due.compare(s)] == [30, 60, 90]
        assert not any(self.due(compare_steps=30).compare(s) for s in range(1, 101))

    def test_health_is_measured_after_the_first_epoch_with_scores_and_at_the_end(self):
        due = self.due(monitor_epochs=3)
        assert [s for s in range(1, 101) if due.health(s)] == [25, 75, 100]
        due = self.due(monitor_epochs=0)
        assert [s for s in range(1, 101) if due.health(s)] == [100]

    def test_milestones_are_saved_on_their_own(self):
        due = self.due(save_epochs=3, milestone_epochs=2)
        assert [s for s in range(1, 101) if due.save_or_stop(s, False)[0]] == [50, 75, 100]

    @pytest.mark.parametrize(
        ("pace", "others_wait", "epochs", "at"),
        [
            (7.0, 1000, 2, [*range(1, 101)]),  # seconds a step, beyond those between agreements
            (0.5, 1000, 2, [1, 11, 21, 25, 35, 45, 50, 60, 70, 80, 90, 100]),
            (0.5, 1000, 1, [1, 11, 21, 25, 35, 45, 50, 60, 70, 75, 85, 95, 100]),
            (2**-10, 1000, 2, [1, 25, 50, 100]),
            (2**-10, 1000, 0, [1, 100]),
            (2**-10, 20, 2, [1, 21, 25, 45, 50, 70, 90, 100]),  # a slower process sets the wait
        ],
    )
    def test_processes_agree_every_five_seconds_and_after_each_score(
        self, monkeypatch, pace, others_wait, epochs, at
    ):
        """What either wishes in between is granted to both when they meet next, not before."""
        for theirs in (False, True):
            process = Meeting(monkeypatch, others_wait)
            due = self.due(monitor_epochs=epochs, save_epochs=0, world=2)
            asked, stops = (2, 26, 51, 99), []
            for step in range(1, 101):
                process.step(step, pace)
                wish = step in asked or process.wishing
                process.wishing = wish
                process.theirs = [False, wish and theirs]
                save, stop = due.save_or_stop(step, wish and not theirs)
                assert save == (stop or step == 100)
                if step in process.met:
                    process.wishing = False
                if stop:
                    stops.append(step)
            assert process.met == at
            heard = {min(one for one in at if one >= step) for step in asked}
            assert stops == sorted(heard - {100})

    def test_processes_agree_after_a_thousand_steps_however_fast_they_are(self, monkeypatch):
        process = Meeting(monkeypatch, 10**6)
        due = Due(
            3500, 3500, log_steps=1, monitor_epochs=0, save_minutes=1, save_epochs=0,
            save_steps=None, world=2,
        )  # fmt: skip
        saves = []
        for step in range(1, 3501):
            process.step(step, 2**-5 if step > 2000 else 2**-10)
            saves += [step] if due.save_or_stop(step, False)[0] else []
        # The pace is that since the last agreement: 5 s are 160 steps of 1/32 s.
        assert process.met[:5] == [1, 1001, 2001, 3001, 3161]
        assert saves == [3500]  # 49 s of steps: no minute has passed for either

    def test_a_save_that_is_due_for_one_process_is_made_by_all(self, monkeypatch):
        process = Meeting(monkeypatch, 1000)
        due = self.due(save_epochs=0, world=2)
        for step in (1, 2, 25, 26, 50):
            process.step(step, 2**-10)
            process.theirs = [step > 1, False]  # the other's clock
            assert due.save_or_stop(step, False) == (step in (25, 50), False)

    def test_stop_saves_first_and_is_moot_at_the_end(self):
        assert self.due().save_or_stop(3, True) == (True, True)
        assert self.due().save_or_stop(100, True) == (True, False)


class TestStop:
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
    )
    def test_signals_set_a_flag(self, number, code):
        before = signal.getsignal(number)
        with StopSignals() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            assert stop.asked and stop.error(5, "runs/x").exit_code == code
        assert signal.getsignal(number) == before

    def test_only_work_that_gives_way_is_broken_off(self):
        with StopSignals() as stop:
            with stop.interruptible():
                raise_if_interrupted()
            os.kill(os.getpid(), signal.SIGTERM)
            raise_if_interrupted()  # not here
            with pytest.raises(Stopped), stop.interruptible():
                raise AssertionError("it was asked before")
            raise_if_interrupted()

    def test_before_the_first_step_there_is_nothing_to_save(self):
        with (
            StopSignals() as stop,
            pytest.raises(Interrupted, match="before the first step") as caught,
            stop.before_the_first_step(),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("goes on")
        assert caught.value.exit_code == 75 and not caught.value.agreed

    def test_a_second_ctrl_c_is_obeyed(self):
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


class TestHealth:
    def test_the_first_bad_step_is_named(self):
        watch = FiniteWatch(torch.device("cpu"))
        for step, loss in enumerate([1.0, 2.0, math.inf, math.nan, 1.0], 1):
            watch.note(step, torch.tensor(loss))
        with pytest.raises(NonFiniteLoss, match="step 3 "):
            watch.check()

    def test_finite_losses_pass(self):
        watch = FiniteWatch(torch.device("cpu"))
        watch.note(1, torch.tensor(3.0))
        watch.check()

    def test_gradient_norm(self):
        net = torch.nn.Linear(2, 2)
        assert float(gradient_norm(net.parameters())) == 0
        net.weight.grad, net.bias.grad = torch.full((2, 2), 2.0), torch.tensor([3.0, 0.0])
        assert float(gradient_norm(net.parameters())) == pytest.approx(5.0)


class TestDevices:
    @pytest.mark.parametrize("name", ["cuda:99", "tpu", "xpu"])
    def test_a_device_that_is_not_there_is_named(self, name):
        with pytest.raises(UserError, match=name):
            choose_device(name)

    def test_cpu(self):
        assert choose_device("cpu") == torch.device("cpu")
        assert default_precision(torch.device("cpu")) in ("bfloat16", "float32")

    def test_library_seeds_depend_on_seed_and_step(self):
        def number(seed, step):
            seed_libraries(seed, step)
            return float(torch.rand(()))

        assert number(0, 1) == number(0, 1)
        assert len({number(s, t) for s in (0, 1) for t in (0, 1)}) == 4

    @pytest.mark.parametrize("slot", [None, *Slot])
    def test_torch_is_seeded_from_the_stream_that_is_named(self, slot):
        seed_libraries(3, 7, *([] if slot is None else [slot]))
        assert torch.initial_seed() == library_seed(3, 7, Slot.LIBRARY if slot is None else slot)
