"""The command line: its flags, its sentences, its exit codes."""

import importlib
import inspect
import json
import platform
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
from PIL import Image
from typer.testing import CliRunner

from mocokit import cli

FLAGS = {
    "--processes", "--nodes", "--rdzv", "--restarts", "--deterministic",
    "--out", "--epochs", "--batch-size", "--device", "--seed", "--set", "--resume", "--show",
    "--show-all", "--help", "--allow-import", "--extend",
}  # fmt: skip


def test_the_flags_are_pinned(mocokit):
    code, out, _ = mocokit("pretrain", "--help")
    words = {word.strip(",") for word in out.split() if word.startswith("--")}
    assert code == 0 and words == FLAGS


@pytest.mark.parametrize(
    "words",
    [
        *(
            [*verb, "--help"]
            for verb in ([], ["pretrain"], ["evaluate", "knn"], ["evaluate", "voc"])
        ),
        ["recipes"],
        ["recipes", "mocov2_cifar10"],
    ],
)
def test_help_and_recipes_load_no_torch(words):
    script = (
        f"import sys; sys.argv = ['mocokit', *{words}]\n"
        "from mocokit import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'timm'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_says_what_a_bug_report_needs(mocokit):
    code, out, err = mocokit("--version")
    first, python, packages, device, cpu, *gpus = out.splitlines()
    assert (code, err) == (0, "") and first == f"mocokit {version('mocokit')}"
    assert platform.python_version() in python
    for name in ("torch", "torchvision", "timm"):
        assert f"{name} {version(name)}" in packages
    assert re.fullmatch(
        r"device: (cpu|cuda(:0)?|mps), precision (float32|bfloat16|float16)", device
    )
    assert re.fullmatch(r"CPU: .+, [1-9]\d* usable cores, \d+\.\d GiB memory", cpu)
    assert gpus and all(re.fullmatch(r"GPU: (none|\d+ x .+, .+ GiB)", line) for line in gpus)


@pytest.mark.parametrize("words", [[], ["evaluate"]])
def test_without_a_verb_the_help_is_shown(mocokit, words):
    code, out, err = mocokit(*words)
    assert code == 2 and "Commands:\n" in out + err and "\\n" not in out + err


def test_python_dash_m_is_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "mocokit", "recipes"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "mocov2_cifar10_symmetric" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mocov2"], "mocov2 needs images"),
        (["mocov2", "NONE"], "there is no file or folder NONE"),
        (["mocv2"], "did you mean mocov2"),
        (["demo", "--set", "method.temprature=1"], "did you mean method.temperature"),
        (["demo", "--set", "method.temperature"], "--set takes path=value"),
        (["demo", "--set", "method.temperature=cold"], "method.temperature = 'cold'"),
        (["demo", "--epochs", "0"], "train.epochs = 0"),
        (["demo", "--epochs", "x"], "valid integer"),
        (["demo", "--nonsense"], "nonsense"),
        (["none.yaml"], "cannot read none.yaml"),
        (["x" * 300], "there is neither a recipe nor"),
        (["mocov2", "x" * 300], "there is no file or folder"),
        (["demo", "--set", "seed=2024-13-45"], "seed = '2024-13-45'"),
        (["demo", "--set", "train=5"], "train is a section"),
        (["demo", "--set", "recipe=../../x"], "recipe is a name, not a setting"),
        (["demo", "--seed", "1", "--set", "seed=2"], "seed is stated twice"),
        (["demo", "--resume", "--out", "none"], "--resume: there is no run in none"),
        (["demo", "--device", "cuda:9"], "device cuda:9"),
        (
            ["demo", "--device", "cpu", "--processes", "600"],
            "600 processes for 2 batch",
        ),
        (["demo", "--nodes", "99", "--rdzv", "h:1"], "99 processes for 2 batch"),
    ],
)
def test_mistakes_exit_2_with_a_sentence(mocokit, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, _, err = mocokit("pretrain", *arguments)
    assert code == 2
    assert sentence in err and "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_exits_2(mocokit, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = mocokit("pretrain", "mocov2", tmp_path / "empty", "--out", tmp_path / "run")
    assert code == 2 and "jpg" in err and len(err.strip().splitlines()) == 1


def test_an_unwritable_run_folder_exits_2(mocokit, toy_npz, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = mocokit("pretrain", "demo", toy_npz, "--out", tmp_path / "file" / "run")
    assert code == 2 and "cannot write the run folder" in err


def test_a_run_from_the_command_line(mocokit, toy_npz, tmp_path):
    out = tmp_path / "run"
    arguments = ["pretrain", "demo", toy_npz, "--out", out, "--epochs", 1, "--batch-size", 32]
    arguments += ["--seed", 3, "--device", "cpu", "--set", "engine.threads=1"]
    code, _, err = mocokit(*arguments)
    assert code == 0
    for text in (
        "What to expect",
        "queue 256 -> 32",
        "raw pixels, centred",
        "random weights, calibrated",
        "trained backbone",
        str(out),
    ):
        assert text in err
    result = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["finished"]
    assert "seed: 3" in (out / "config.yaml").read_text()
    code, _, err = mocokit(*arguments)  # finished: prints its result
    assert code == 0 and "trained backbone" in err


def test_check_reports_and_draws(mocokit, photos, toy_npz, tmp_path):
    (tmp_path / "photos").mkdir()
    for path in sorted(photos.rglob("*.jpg"))[:70]:
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"nothing")
    code, _, err = mocokit("check", tmp_path / "photos", "--out", tmp_path / "sheet.png")
    assert code == 0 and "train: 71 images" in err and "pixels high" in err
    assert "cannot be read: broken.jpg" in err and "batch size 256 -> 64" in err
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 300
    code, _, err = mocokit("check", "demo", toy_npz, "--out", tmp_path / "two.png")
    assert code == 0 and "4 classes of 40 to 40" in err and "validation: 40 images" in err
    assert mocokit("check", "demo", toy_npz, "--out", tmp_path / "none" / "x.png")[0] == 2
    assert mocokit("check", "mocov2")[0] == 2


def test_a_run_folder_is_not_taken_for_images(mocokit, tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1")
    code, _, err = mocokit("pretrain", tmp_path)
    assert code == 2 and "is a run folder, not images; repeat its run with" in err


SHARED = "--size 40 --resize 50 --device cpu --precision bfloat16 --seed 7 --no-baseline"
SHARED += " --per-class --confusion --json x.json"
SHARED_AS = {
    "size": 40, "resize": 50, "device": "cpu", "precision": "bfloat16", "seed": 7,
    "baseline": False, "per_class": True, "confusion": True, "json": "x.json",
}  # fmt: skip
HANDED_ON = {
    "evaluate knn": (
        f"RUN DATA -k 3 --k 5 --temperature 0.2 --layer head --no-cache {SHARED}",
        "mocokit.evaluate.api.evaluate_knn",
        {"run": "RUN", "data": "DATA", "k": [3, 5], "temperature": [0.2], "layer": "head",
         "cache": False, **SHARED_AS},
    ),
    "evaluate linear": (
        "RUN DATA --protocol quick --train-views centre --epochs 3 --lr 2 --layer head --no-cache "
        + SHARED,
        "mocokit.evaluate.api.evaluate_linear",
        {"run": "RUN", "data": "DATA", "protocol": "quick", "train_views": "centre", "epochs": 3,
         "lr": 2.0, "layer": "head", "cache": False, **SHARED_AS},
    ),
    "evaluate finetune": (
        f"RUN DATA --percent 3 --percent 5 --epochs 3 --lr 2 --layer-decay 0.5 {SHARED}",
        "mocokit.evaluate.api.evaluate_finetune",
        {"run": "RUN", "data": "DATA", "percent": [3.0, 5.0], "epochs": 3, "lr": 2.0,
         "layer_decay": 0.5, **SHARED_AS},
    ),
    "evaluate voc": (
        "RUN DATA --split 07 --trials 2 --seed 7 --steps 8 --batch-size 4 --set lr=0.2 "
        "--classes ' cat,big dog ' --every 3 --out o --device cpu --precision bfloat16 "
        "--pictures 9 --json x.json --iterations 6 --ims-per-step 5",
        "mocokit.evaluate.voc.evaluate_voc",
        {"run": "RUN", "data": "DATA", "split": "07", "trials": 2, "seed": 7, "steps": 8,
         "batch_size": 4, "settings": {"lr": 0.2}, "classes": ["cat", "big dog"], "every": 3,
         "out": "o", "device": "cpu", "precision": "bfloat16", "pictures": 9, "json": "x.json",
         "iterations": 6, "ims_per_step": 5},
    ),
    "check": (
        "mocov2 DATA --out o.png --quick --set seed=7 --allow-import math",
        "mocokit.check.check",
        {"recipe": "mocov2", "data": "DATA", "out": "o.png", "settings": {"seed": 7},
         "quick": True, "allow_import": ["math"]},
    ),
    "pack": (
        "DATA FILE --recipe demo --raw --set seed=7",
        "mocokit.pack.pack",
        {"data": "DATA", "file": "FILE", "recipe": "demo", "raw": True, "settings": {"seed": 7}},
    ),
    "pretrain": (
        "mocov2 DATA --out o --resume --epochs 3 --batch-size 64 --device cpu --seed 7 "
        "--deterministic --set optim.lr=0.1 --allow-import math",
        "mocokit.train.pretrain",
        {"recipe": "mocov2", "data": "DATA", "out": "o", "resume": True, "allow_import": ["math"],
         "settings": {"train.epochs": 3, "train.batch_size": 64, "engine.device": "cpu", "seed": 7,
                      "engine.deterministic": True, "optim.lr": 0.1}},
    ),
}  # fmt: skip
# Of Python alone, handed on as settings, or taken care of before.
NOT_OPTIONS = {"images", "epochs", "batch_size", "device", "seed", "extend", "method"}


@pytest.mark.parametrize("verb", HANDED_ON)
def test_every_option_is_handed_on(verb, tmp_path, monkeypatch):
    """None of them at its default, and none left out."""
    words, name, expected = HANDED_ON[verb]
    home, _, function = name.rpartition(".")
    module, seen = importlib.import_module(home), []
    signature = inspect.signature(getattr(module, function))
    monkeypatch.setattr(module, function, lambda *a, **b: seen.append(signature.bind(*a, **b)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "DATA/a.png")
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        done = CliRunner().invoke(cli.app.app, [*verb.split(), *shlex.split(words)])
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert done.exit_code == 0, (done.output, done.exception)
    ((given),) = seen
    found = dict(given.arguments)
    assert found == expected
    for name, parameter in signature.parameters.items():
        if name not in NOT_OPTIONS or name in expected:
            assert name in found and found[name] != parameter.default, name
