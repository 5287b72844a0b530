"""Texts of strangers: no control character of theirs reaches a terminal, README or log."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from safetensors.torch import save as save_safe

from mocokit.engine.record import Console
from mocokit.errors import LONGEST, Interrupted, MocokitError, NonFiniteLoss, UserError
from mocokit.files import brief, printable, reason_of, show

EVIL = "x\x1b]0;owned\a\x1b[2J\u202e\u2066\x85\r"
LINES = "y\nmocokit: forged \x9b31m\u2028z"
SMALL = [
    "--set", "net.backbone=resnet_tiny", "--set", "views.size=16", "--set", "engine.threads=1",
    "--device", "cpu", "--set", "data.workers=0", "--set", "views.blur_sigma=[0.1,1]",
]  # fmt: skip


def clean(text):
    """Whether a text has nothing but printable lines."""
    return all(line.isprintable() for line in text.split("\n"))


@given(st.text())
def test_what_is_shown_is_printable(text):
    for shown in (printable(text), show(text), brief(text), reason_of(ValueError(text))):
        assert shown.isprintable()
    assert len(brief(text)) <= 100 and len(brief(text, 10)) <= 10
    for kind in (MocokitError, UserError, NonFiniteLoss):
        assert str(kind(text)).isprintable()
    assert str(Interrupted(text, 75)).isprintable()


def test_what_is_printable_is_left_alone():
    text = "é 漢 🙂 'a' \\x1b"
    assert printable(text) == brief(text) == str(UserError(text)) == text
    assert str(UserError("a" * LONGEST)) == "a" * LONGEST


def test_an_endless_message_keeps_its_beginning_and_its_remedy():
    text = str(UserError(f"what it is: {'x' * 10**6}; do this"))
    assert len(text) < LONGEST + 9 and text.startswith("what it is: x")
    assert text.endswith("x; do this") and " … " in text


@pytest.mark.parametrize("terminal", [False, True])
def test_the_console_escapes_what_it_prints(terminal, capsys, monkeypatch):
    console = Console()
    output = io.StringIO()
    monkeypatch.setattr(console.terminal, "_file", output)
    monkeypatch.setattr(console.terminal, "_force_terminal", terminal)
    monkeypatch.setattr(console.terminal, "no_color", True)
    evil = f"{EVIL}{LINES}[/a][bold]"
    console.say(evil)
    console.note(evil)
    console.table(evil, [evil, "b"], [(evil, evil)])
    with console.counting(evil, 3) as advance:
        advance(3)
    found = output.getvalue()
    assert "owned" in found and "[/a]" in found
    for sign in ("\a", "\x1b]0", "\x1b[2J", "\u202e", "\u2066", "\x85", "\x9b", "\u2028", "\nmoco"):
        assert sign not in found


def write_inputs(folder):
    """Inputs whose every name is evil, by the words that name them."""
    image = io.BytesIO()
    Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3)).save(image, "png")
    (folder / "images").mkdir()
    for number in range(3):
        (folder / "images" / f"{number}{EVIL}.png").write_bytes(image.getvalue())
    array = io.BytesIO()
    np.save(array, np.zeros((3, 4, 4, 3), np.uint8))
    with zipfile.ZipFile(folder / f"keys{EVIL}.npz", "w") as file:
        file.writestr(f"{EVIL}{LINES}.npy", array.getvalue())
    (folder / f"{EVIL}.npz").write_bytes(b"nonsense")
    (folder / f"{EVIL}.tar").write_bytes(b"nonsense")
    (folder / f"{EVIL}.parquet").write_bytes(b"nonsense")
    (folder / "list.csv").write_text(f"{EVIL.strip()}.png,{EVIL.strip()}\n", newline="")
    for name, text in {
        "key": f"{json.dumps(EVIL + LINES)}: 1",
        "inner key": f"optim: {{{json.dumps(EVIL)}: 1}}",
        "value": f"optim: {{lr: {json.dumps(EVIL + LINES)}}}",
        "path": f"data: {{path: {json.dumps('/nope/' + EVIL + LINES)}}}",
        "backbone": f"net: {{backbone: {json.dumps(EVIL)}}}",
        "method": f"method: {{name: {json.dumps(EVIL)}}}",
        "outside": f"method: {{name: {json.dumps(EVIL + ':' + EVIL)}}}",
        "recipe": f"recipe: {json.dumps(EVIL)}",
        "device": f"engine: {{device: {json.dumps(EVIL)}}}",
        "alias": f"a: *{EVIL}",
        "tag": f"a: !{EVIL} 1",
        "long": f"optim: {{lr: {json.dumps(EVIL + 'x' * 10**5)}}}",
    }.items():
        (folder / f"{name}{EVIL}.yaml").write_text(text, encoding="utf-8", newline="")
        yield ["pretrain", f"{name}{EVIL}.yaml", "images"]
        yield ["pretrain", f"{name}{EVIL}.yaml", "--show"]
    torch.save({f"{EVIL}{LINES}": torch.zeros(2)}, folder / f"{EVIL}.pt")
    yield ["evaluate", "knn", f"{EVIL}.pt", "images"]
    meta = {"mocokit": json.dumps({EVIL: 1})}
    (folder / f"{EVIL}.safetensors").write_bytes(save_safe({"a": torch.zeros(2)}, meta))
    yield ["evaluate", "knn", f"{EVIL}.safetensors", "images"]
    (folder / f"{EVIL}2.safetensors").write_bytes(save_safe({EVIL: torch.zeros(2)}))
    yield ["evaluate", "linear", f"{EVIL}2.safetensors", "images"]
    for words in (
        [EVIL], [f"{EVIL}.npz"], [f"keys{EVIL}.npz"], [f"{EVIL}.tar"], [f"{EVIL}.parquet"],
        ["list.csv"], [f"images::{EVIL}"], ["mocov2", EVIL], [f"{EVIL}/{EVIL}"], ["x" * 10**5],
        ["demo", "--set", EVIL], ["demo", "--set", f"{EVIL}=1"], ["demo", "--set", f"seed={EVIL}"],
        ["demo", "--set", f"seed=[{EVIL}"], ["demo", "--device", EVIL],
        ["demo", "--set", "x" * 10**5],
        ["demo", "--set", f"net.backbone={EVIL}"], ["demo", "--set", f"data.labels={EVIL}"],
        ["demo", "--set", f"method.name={EVIL}:{EVIL}"], ["demo", "--resume", "--out", EVIL],
    ):  # fmt: skip
        yield ["pretrain", *words]
    yield ["recipes", EVIL]
    yield ["check", f"{EVIL}.npz"]
    yield ["evaluate", "knn", EVIL, "images"]
    yield ["evaluate", "knn", f"random:{EVIL}", "images"]
    yield ["evaluate", "knn", "random:resnet_tiny", EVIL]
    yield ["evaluate", "finetune", "random:resnet_tiny", "images", "--device", EVIL]
    yield ["evaluate", "voc", "random:resnet50", EVIL]
    yield ["evaluate", "voc", "random:resnet50", "images", "--set", f"{EVIL}=1"]
    yield ["evaluate", "voc", "random:resnet50", "images", "--set", f"lr={EVIL}"]
    for words in (  # of which typer itself says what is wrong
        [EVIL], ["evaluate", EVIL], ["pretrain", f"--{EVIL}"], ["pretrain", "a", "b", EVIL],
        ["pretrain", "--epochs", EVIL], ["evaluate", "knn", "x", "--layer", EVIL],
        [f"--{LINES}"], ["pretrain", f"--resume={EVIL}"], ["pretrain", "x" * 10**5, "b", EVIL],
        ["slurm", "--gpus", f"{EVIL}{LINES}"], [f"--{'x' * 10**5}"],
    ):  # fmt: skip
        yield words
    yield ["slurm", "demo", "--out", "o", "--time", EVIL]
    yield ["slurm", "demo", "--out", "o", "--sbatch", EVIL]


def test_no_mistake_shows_what_strangers_wrote_raw(mocokit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = named = 0
    for words in write_inputs(tmp_path):
        code, out, err = mocokit(*words)
        assert clean(out) and clean(err), (words, out, err)
        assert "Traceback" not in err and len(out + err) < 6000, words
        assert "\nmocokit: forged" not in out + err, words
        if "--show" not in words:
            assert code in (1, 2), (words, out, err)
        tried, named = tried + 1, named + ("owned" in out + err)
    assert tried > 65 and named > 50, (tried, named)


def test_a_run_among_evil_names_leaves_clean_files(mocokit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(66):
            kind = tmp_path / f"d{EVIL}" / part / f"{number % 2}{EVIL}{LINES.replace('/', '')}"
            kind.mkdir(parents=True, exist_ok=True)
            path = kind / f"{number}{EVIL}.png"
            pixels = generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            if number == 65:
                path.write_bytes(path.read_bytes()[:60])
    seen = ""
    for words in (
        ["check", f"d{EVIL}", *SMALL[:4]],
        ["pretrain", f"d{EVIL}", "--show", *SMALL],
        ["pretrain", f"d{EVIL}", "--show-all", *SMALL],
        ["pretrain", f"d{EVIL}", *SMALL, "--epochs", 1, "--out", f"run{EVIL}"],
        ["pretrain", f"d{EVIL}", *SMALL, "--epochs", 1, "--out", f"run{EVIL}"],
        [
            "evaluate",
            "knn",
            f"run{EVIL}",
            "--k",
            3,
            "--per-class",
            "--confusion",
            "--json",
            "r.json",
        ],
    ):
        code, out, err = mocokit(*words)
        assert clean(out) and clean(err), (words, out, err)
        assert code == 0 or "is finished" in err, (words, err)
        seen += out + err
    assert "owned" in seen
    run = tmp_path / f"run{EVIL}"
    written = [tmp_path / "r.json", *run.glob("*.md"), *run.glob("*.jsonl"), *run.glob("*.yaml")]
    written += run.glob("*.txt")
    assert len(written) >= 5
    for path in written:
        text = path.read_bytes().decode("utf-8")
        assert clean(text.replace("\t", " ")), path
