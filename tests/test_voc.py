"""`mocokit evaluate voc`, from the command to the report; stopped, killed and resumed."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from shapes import SMALL, tiny_network, write_shapes

import mocokit
from mocokit import evaluate_voc, published
from mocokit.detection import trial
from mocokit.detection.protocol import OLD_NAMES, plan_for
from mocokit.detection.trial import COLUMNS
from mocokit.engine import checkpoint
from mocokit.engine.folder import RunFolder
from mocokit.engine.record import Console, Metrics
from mocokit.errors import Interrupted, UserError
from mocokit.evaluate import voc
from mocokit.evaluate.voc_results import DetectionReport

RUN = f"random:{tiny_network()}"
FEW = SMALL | {"precise_bn": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("detecting"), 16, 6)


def evaluate(root, out, **more):
    options = {"trials": 1, "steps": 4, "batch_size": 4, "settings": FEW, "pictures": 2}
    options |= {"out": out, "device": "cpu", "precision": "float32", "every": 2, "run": RUN}
    return evaluate_voc(data=root, **options | more)


def weights(folder):
    return checkpoint.load(folder / "last.pt")


def same(a, b):
    """Whether two trees of a checkpoint hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "out"
    return evaluate(root, out), out


def test_a_result_with_all_that_belongs_to_it(straight):
    found, out = straight
    result = json.loads((out / "trial-0/result.json").read_text())
    assert found.trials == (result,) and result["metric"] == "voc07"
    assert found.mean["AP50"] == result["AP50"] and found.std == {}
    assert set(result["metrics"]) == {"voc07", "area"} and set(result["classes"]) == {"bar", "disc"}
    assert [point["step"] for point in result["curve"]] == [0, 2]
    for words in ("another protocol than the paper's", "AP of the voc07 metric", "area metric"):
        assert words in found.protocol
    for name in ("predictions.png", "classes.png"):
        with Image.open(out / "trial-0" / name) as picture:
            assert min(picture.size) > 50
    last = json.loads((out / "trial-0/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and {"rpn_object", "rpn_box", "class", "box"} <= set(last)


def test_a_stopped_trial_resumes_bit_for_bit(straight, root, tmp_path, monkeypatch):
    """SIGTERM in the third step saves, with exit code 75. The same call ends as if unstopped."""
    steps = trial.DetectionTrial._show
    at = iter(range(100))

    def interrupted(self, losses, step, total):
        steps(self, losses, step, total)
        if next(at) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trial.DetectionTrial, "_show", interrupted)
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="stopped after step 3 and saved") as stop:
        evaluate(root, out)
    assert stop.value.exit_code == 75 and weights(out / "trial-0")["step"] == 3
    found = evaluate(root, out)
    first, whole = found.trials[0], straight[0].trials[0]
    changing = {"test_seconds", "peak_memory_gib"}
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in whole.items() if k not in changing
    }
    assert same(weights(out / "trial-0"), weights(straight[1] / "trial-0"))


def test_a_killed_trial_resumes_bit_for_bit(straight, root, tmp_path, monkeypatch):
    """The steps after the last checkpoint are repeated with the same result."""
    steps = trial.DetectionTrial._show
    at = iter(range(100))

    def killed(self, losses, step, total):
        steps(self, losses, step, total)
        if next(at) == 2:
            raise KeyboardInterrupt  # between a checkpoint and the next, nothing is saved

    monkeypatch.setattr(trial.DetectionTrial, "_show", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(root, out)
    assert weights(out / "trial-0")["step"] == 2
    evaluate(root, out)
    assert same(weights(out / "trial-0"), weights(straight[1] / "trial-0"))


def test_a_stop_during_the_test_loses_nothing(straight, root, tmp_path, monkeypatch):
    out, real = tmp_path / "out", trial.detect_in

    def interrupted(trainer, data, progress):
        if trainer.step == 4 and not (out / "seen").exists():
            (out / "seen").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, data, progress)

    monkeypatch.setattr(trial, "detect_in", interrupted)
    with pytest.raises(Interrupted):
        evaluate(root, out)
    found = evaluate(root, out)
    assert found.mean == straight[0].mean


def test_trials_have_seeds_and_are_not_made_twice(straight, root, monkeypatch):
    both = evaluate(root, straight[1], trials=2)
    seeds = [one["seed"] for one in both.trials]
    assert seeds == [0, 1] and set(both.std) == {"AP50", "AP", "AP75"}
    mean = sum(one["AP50"] for one in both.trials) / 2
    assert both.mean["AP50"] == pytest.approx(mean)
    first, second = (weights(straight[1] / f"trial-{seed}")["detector"] for seed in (0, 1))
    assert not torch.equal(first["body.0.weight"], second["body.0.weight"])
    monkeypatch.setattr(trial.DetectionTrial, "_train", None)  # would fail if called
    again = evaluate(root, straight[1], trials=2)
    assert again.trials == both.trials


def with_old_names(path):
    """The file as mocokit 0.1 wrote it."""
    old = {name: was for was, name in OLD_NAMES.items()}
    content = json.loads(path.read_text())
    path.write_text(json.dumps({old.get(name, name): value for name, value in content.items()}))


def test_files_of_0_1_are_read(straight, root, tmp_path, monkeypatch):
    """A finished evaluation keeps its result, an unfinished one its checkpoint."""
    shutil.copytree(straight[1], tmp_path / "out")
    for name in ("identity.json", "trial-0/result.json"):
        with_old_names(tmp_path / "out" / name)
    there = json.loads((tmp_path / "out/identity.json").read_text())
    assert {"iterations", "ims_per_step", "drops", "gamma"} <= set(there)
    result = json.loads((tmp_path / "out/trial-0/result.json").read_text())
    assert result["iterations"] == 4 and "steps" not in result
    monkeypatch.setattr(trial.DetectionTrial, "_train", None)  # would fail if called
    assert evaluate(root, tmp_path / "out").trials == straight[0].trials
    changed = {"steps": None, "iterations": 5}
    with pytest.raises(UserError, match=r"another evaluation: steps \(4 there\)"):
        evaluate(root, tmp_path / "out", **changed)


def test_what_is_resumed_has_the_threads_that_it_began_with(root, tmp_path, monkeypatch):
    """Of which sums on a CPU are rounded; whatever this process has by now."""
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    evaluate(root, tmp_path / "out", steps=0, every=0, pictures=0)
    assert json.loads((tmp_path / "out/identity.json").read_text())["threads"] == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    evaluate(root, tmp_path / "out", steps=0, every=0, pictures=0)
    assert asked == [3, 3]
    evaluate(root, tmp_path / "other", steps=0, every=0, pictures=0)
    assert asked == [3, 3, 1]


def test_the_default_folder_has_the_name_that_0_1_gave_it():
    old = {"weights": "x", "iterations": 9, "ims_per_step": 4, "drops": [6, 8], "gamma": 0.1}
    new = {"weights": "x", "steps": 9, "batch_size": 4, "drop_steps": [6, 8], "drop_factor": 0.1}
    digest = hashlib.blake2b(json.dumps(old, sort_keys=True).encode(), digest_size=4)
    assert voc._name(new) == f"voc-{digest.hexdigest()}"


def test_another_evaluation_in_the_same_folder_is_refused(straight, root):
    with pytest.raises(UserError, match=r"another evaluation: .*lr \(0.1 there\)"):
        evaluate(root, straight[1], settings=FEW | {"lr": 0.2})


def with_spec(**changes):
    """The model of before with views of another kind."""

    def change(opened):
        subject = opened.subject
        return replace(opened, subject=replace(subject, spec=replace(subject.spec, **changes)))

    return change


OTHERWISE = {  # what makes another evaluation: an image's boxes, arguments, the model
    "train": "a000",
    "test": "b000",
    "precision": {"precision": "bfloat16"},
    "steps": {"steps": 6},
    "batch_size": {"batch_size": 2},
    "architecture": {"run": "random:resnet18"},
    "weights": lambda opened: replace(opened, untrained=lambda: opened.subject),
    "mean": with_spec(mean=(0.5, 0.4, 0.3)),
    "std": with_spec(std=(0.5, 0.4, 0.3)),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_makes_another_evaluation_is_named_and_nothing_is_written(
    straight, root, tmp_path, monkeypatch, name
):
    changed, open_model = OTHERWISE[name], voc.open_model
    data = shutil.copytree(root, tmp_path / "data")
    if callable(changed):
        monkeypatch.setattr(
            voc, "open_model", lambda *rest, **more: changed(open_model(*rest, **more))
        )
    elif isinstance(changed, str):
        file = data / f"Annotations/{changed}.xml"
        before = file.read_text()
        file.write_text(before.replace("<difficult>0</difficult>", "<difficult>1</difficult>"))
        assert file.read_text() != before
    there = {path: path.stat().st_mtime_ns for path in straight[1].rglob("*")}
    with pytest.raises(UserError, match=rf"holds another evaluation: (.*, )?{name} \("):
        evaluate(data, straight[1], **changed if isinstance(changed, dict) else {})
    assert {path: path.stat().st_mtime_ns for path in straight[1].rglob("*")} == there


def test_the_command(root, tmp_path, mocokit):
    """Its table, its exit codes, its JSON; broken annotations are named."""
    (root / "Annotations/a003.xml").write_text("<!DOCTYPE a><annotation/>")
    values = [f"--set={name}={json.dumps(value)}" for name, value in FEW.items()]
    command = [
        "evaluate",
        "voc",
        RUN,
        root,
        "--trials",
        "2",
        "--steps",
        "0",
        "--device",
        "cpu",
    ]
    command += ["--ims-per-step", "4", "--out", tmp_path / "out", "--json", tmp_path / "r.json"]
    code, _, err = mocokit(*command, *values)
    assert code == 0, err
    for words in ("mean of 2 ± std", "1 left out", "a003: declares a document type", "AP75"):
        assert words in err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["kind"] == "voc" and record["plan"]["lr"] == 0.1 and len(record["results"]) == 2
    code, _, err = mocokit(*command, "--set", "roi_bach=3")
    assert code == 2 and "did you mean roi_batch" in err
    code, _, err = mocokit("evaluate", "voc", "random:vit_tiny_patch16_224", root)
    assert code == 2 and "detection takes a ResNet" in err


@pytest.fixture(scope="module")
def run(toy_npz, tmp_path_factory):
    """A finished run whose backbone can be a detector's."""
    changes = {"net.backbone": tiny_network(), "monitor.every_epochs": 0, "engine.threads": 1}
    out = tmp_path_factory.mktemp("trained") / "run"
    return mocokit.pretrain("demo", toy_npz, out, epochs=1, batch_size=32, settings=changes)


def test_trials_draw_new_layers_each_and_share_the_backbone(root, run, tmp_path, monkeypatch):
    """A trial of a seed is the same whichever trials come before it."""
    monkeypatch.setattr(trial.DetectionTrial, "run", lambda self, make: make())
    monkeypatch.setattr(DetectionReport, "finish", lambda self, trainers, *rest: trainers)
    plain = dict(trials=2, batch_size=4, settings=FEW, device="cpu", precision="float32")
    trainers = []
    for seed, trials in ((3, 2), (4, 1)):
        options = plain | {"seed": seed, "trials": trials, "out": tmp_path / str(seed)}
        trainers += evaluate_voc(run.folder, root, **options)
    assert [one.seed for one in trainers] == [3, 4, 4]
    first, second, again = (one.detector.state_dict() for one in trainers)
    new = {"rpn_conv", "rpn_object", "rpn_change", "score", "change"}  # whose biases start at zero
    other = {name for name in first if not torch.equal(first[name], second[name])}
    assert other == {f"{name}.weight" for name in new}
    assert same(dict(second), dict(again))


def test_means_and_deviations_over_trials(tmp_path, capsys):
    """By hand: of 80, 81 and 85 the mean is 82, and the sample's deviation the root of 14 / 2."""
    made = replace(report(tmp_path, plan_for("07+12")), device=torch.device("cpu"))
    opened, data = made.opened, made.data
    opened.unfinished, opened.folder, opened.subject.weights = "", None, "w"
    data.train.fingerprint = "f"

    def result(seed, *scores):
        columns = dict(zip(trial.COLUMNS, scores, strict=True))
        return {
            **columns, "seed": seed, "metric": "voc07", "metrics": {"voc07": columns},
            "classes": {}, "unreadable_train": {}, "unreadable_test": {},
        }  # fmt: skip

    results = [
        result(0, 80.0, 50.0, 60.0),
        result(1, 81.0, 54.0, 60.0),
        result(2, 85.0, 52.0, 60.0),
    ]
    found = made.finish(results, 1.0, Console(), tmp_path / "x.json")
    assert found.mean == pytest.approx({"AP50": 82.0, "AP": 52.0, "AP75": 60.0})
    assert found.std == pytest.approx({"AP50": 7**0.5, "AP": 2.0, "AP75": 0.0})
    record = json.loads((tmp_path / "x.json").read_text())
    assert (record["mean"], record["std"]) == (found.mean, found.std)
    told = ["mean of 3 ± std", "82.0 ± 2.6", "52.0 ± 2.0", "60.0 ± 0.0"]
    assert told in record["table"] and ["seed 1", "81.0", "54.0", "60.0"] in record["table"]
    assert made.finish(results[:1], 1.0, Console(), None).std == {}


def test_the_time_left_is_at_the_pace_since_a_trial_went_on(tmp_path, monkeypatch):
    """Of ten steps five are done; each takes seven seconds more."""
    seconds, shown = [1000.0], []

    class Slow:
        step, views = 5, SimpleNamespace(bad=())
        plan = SimpleNamespace(steps=10, batch_size=4, rate=lambda step: 0.1)

        def steps(self):
            while self.step < 10:
                self.step += 1
                seconds[0] += 7
                yield {"loss": torch.tensor(0.5)}

        def check(self):
            pass

    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    here = trial.DetectionTrial(
        RunFolder(tmp_path), None, 0, 0, Console(), SimpleNamespace(asked=False)
    )
    monkeypatch.setattr(here, "_show_text", lambda text, last=False: shown.append((text, last)))
    monkeypatch.setattr(here, "_save", lambda trainer: shown.append("saved"))
    metrics = Metrics(tmp_path / "metrics.jsonl")
    here._train(Slow(), metrics)
    metrics.close()
    left = ("0:28", "0:21", "0:14", "0:07", "0:00")
    assert shown == [
        *((f"step {n}/10 · loss 0.500 · {time} left", n == 10) for n, time in enumerate(left, 6)),
        "saved",
    ]


def test_a_run_keeps_its_result(root, run):
    """Of a run the folder lies in the run, and the report shows table and pictures."""
    found = evaluate_voc(
        run.folder, root, trials=1, steps=0, batch_size=4, settings=FEW, device="cpu"
    )
    assert found.folder.parent == run.folder
    assert [point["step"] for point in found.trials[0]["curve"]] == []  # --every 0: at the end
    text = (run.folder / "README.md").read_text()
    assert "### voc on" in text and "| trial | AP50 | AP | AP75 |" in text
    assert f"![predictions]({found.folder.name}/trial-0/predictions.png)" in text


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_the_precision_is_that_of_the_network(root, tmp_path, monkeypatch, precision):
    """Of what is no run, in a folder of `runs/`, under the seed that was asked for."""
    monkeypatch.chdir(tmp_path)
    seen, plain = set(), torch.nn.Conv2d.forward

    def watched(self, images):
        seen.add((found := plain(self, images)).dtype)
        return found

    monkeypatch.setattr(torch.nn.Conv2d, "forward", watched)
    monkeypatch.setattr(voc, "default_precision", lambda device: "float16")  # auto avoids it
    options = {"steps": 1, "every": 0, "pictures": 0, "precision": precision, "seed": 3}
    found = evaluate(root, None, **options)
    assert (torch.bfloat16 in seen) == (precision == "bfloat16") and torch.float16 not in seen
    assert str(found.folder.parent) == "runs"
    names = {path.name for path in (found.folder / "trial-3").iterdir()}
    assert "result.json" in names and "predictions.png" not in names


def report(tmp_path, plan, name="resnet50", images=(16_551, 4_952), split="07+12"):
    class Side:
        def __init__(self, count):
            self.samples, self.problems, self.notes = range(count), (), ()

    class DetectionData:
        train, test = Side(images[0]), Side(images[1])
        devkit, split = True, "trainval07+12 -> test2007"

    class Opened:
        class subject:
            architecture = name

    return DetectionReport("r", "d", split, plan, DetectionData, Opened, None, "float32", tmp_path)


def test_the_step_of_an_unfinished_backbone_is_named(tmp_path):
    """Before the trials and in the protocol, which the report and the JSON keep."""
    made = replace(report(tmp_path, plan_for("07+12")), device=torch.device("cpu"))
    made.data.train.classes = ("cat",)
    result = [{"metric": "voc07", "metrics": {"voc07": {}}, "seed": 0}]
    for stage in ("", "checkpoint of step 4 of 160"):
        made.opened.unfinished, said = stage, []
        made.start(SimpleNamespace(say=lambda text, *style, said=said: said.append(text)))
        for words in (said[0].removeprefix("r: "), made._protocol(result)):
            assert words.startswith(f"{stage}, Faster R-CNN" if stage else "Faster R-CNN")


def test_published_numbers_stand_beside_the_papers_protocol_alone(tmp_path):
    """MoCo v2, Table 1."""
    same = report(tmp_path, plan_for("07+12"))
    assert same.differences() == []
    rows = {row[0]: row[1:] for row in same._published()}
    assert rows["paper: supervised ImageNet"] == ("81.3", "53.5", "58.8")
    assert rows["paper: MoCo v1, 200 epochs"] == ("81.5", "55.9", "62.6")
    assert rows["paper: MoCo v2, 200 epochs"] == ("82.4", "57.0", "63.6")
    assert rows["paper: MoCo v2, 800 epochs"] == ("82.5", "57.4", "64.0")
    other = report(tmp_path, plan_for("07+12", 12_000))
    assert all("another protocol" in row[0] for row in other._published())
    assert "steps 12,000, not 24,000" in other.differences()
    assert report(tmp_path, plan_for("07+12"), "resnet18").differences() == [
        "resnet18, not resnet50"
    ]
    few = report(tmp_path, plan_for("07+12"), images=(220, 110)).differences()
    assert few == ["220 -> 110 images, not VOC's own"]
    assert len(published.VOC["07"]) == 2


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        (
            "07+12",
            {
                "random initialisation": ("60.2", "33.8", "33.1"),
                "supervised ImageNet": ("81.3", "53.5", "58.8"),
                "MoCo v1, 200 epochs": ("81.5", "55.9", "62.6"),
                "MoCo v2, 200 epochs": ("82.4", "57.0", "63.6"),
                "MoCo v2, 800 epochs": ("82.5", "57.4", "64.0"),
            },
        ),
        (
            "07",
            {
                "supervised ImageNet": ("74.4", "42.4", "42.7"),
                "MoCo v1, 200 epochs": ("74.9", "46.6", "50.1"),
            },
        ),
    ],
)
def test_the_papers_numbers_have_the_order_of_the_columns(tmp_path, split, rows):
    """AP50, AP, AP75, the mean of five trials; their README: "0.2, 0.2, 0.4 in most cases"."""
    assert COLUMNS == ("AP50", "AP", "AP75")
    images = {"07+12": (16_551, 4_952), "07": (5_011, 4_952)}[split]
    made = report(tmp_path, plan_for(split), split=split, images=images)
    assert made.differences() == []
    assert made._published() == [(f"paper: {name}", *cells) for name, cells in rows.items()]
    made.data.train.fingerprint = made.opened.subject.weights = made.opened.unfinished = ""
    made.opened.folder = None
    result = {"seed": 0, "metric": "voc07", "metrics": {}, "classes": {}}
    result |= {"unreadable_train": {}, "unreadable_test": {}, "AP50": 7.0, "AP": 5.0, "AP75": 6.0}
    console, tables = SimpleNamespace(say=lambda *words: None), []
    console.table = lambda title, header, rows: tables.append([header, *rows])
    done = replace(made, device=torch.device("cpu")).finish([result], 1.0, console, None)
    header, ours, *theirs = tables[0]
    assert header == ["trial", "AP50", "AP", "AP75"] and ours == ("seed 0", "7.0", "5.0", "6.0")
    assert theirs == made._published()
    assert [note for note in done.notes if note.endswith("expect deviations of 0.2 / 0.2 / 0.4")]


def test_broken_images_are_named_and_left_out_of_training_and_test(root, tmp_path):
    """Heads that can be read, pixels that cannot."""
    good = write_shapes(tmp_path / "good", 6, 3, seed=4)
    for name in ("a001", "b001"):
        path = good / "JPEGImages" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:700])
    found = evaluate(good, tmp_path / "out", every=0)
    result = found.trials[0]
    assert list(result["unreadable_test"]) == ["good/b001"]
    assert list(result["unreadable_train"]) == ["good/a001"]
    assert any("1 test images cannot be read: good/b001" in note for note in found.notes)


def test_boxes_of_coco_are_judged_by_coco(tmp_path):
    from test_detection_data import box, coco

    coco(tmp_path, "train", [box(1, 7, [5, 6, 30, 22]), box(2, 7, [1, 2, 30, 24])])
    coco(tmp_path, "val", [box(1, 7, [5, 6, 30, 22])])
    found = evaluate(tmp_path, tmp_path / "out", steps=1, every=0)
    assert found.trials[0]["metric"] == "coco" and "voc07" not in found.protocol
