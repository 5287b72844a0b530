"""Scores that mean nothing are refused, or what they lack is said beside the number."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import mocokit
from mocokit import cli
from mocokit.errors import UserError
from mocokit.weights.resolve import open_model

TINY = {
    "net.backbone": "resnet_tiny", "views.size": 16, "engine.threads": 1, "data.workers": 0,
    "method.queue_size": 32, "log.every_steps": 1, "engine.precision": "float32",
}  # fmt: skip
QUIET = {"size": 8, "baseline": False, "cache": False}
WAYS = {
    "knn": (mocokit.evaluate_knn, {}),
    "quick": (mocokit.evaluate_linear, {"protocol": "quick"}),
    "paper": (mocokit.evaluate_linear, {"protocol": "paper", "epochs": 1}),
    "finetune": (mocokit.evaluate_finetune, {"percent": [100], "epochs": 1}),
}


def evaluate(way, *what, **more):
    function, options = WAYS[way]
    options = {**options, **QUIET, **more}
    if way == "finetune":
        del options["cache"]
    return function(*what, **options)


def arrays(path, train, test=None, size=16):
    draw = np.random.default_rng(0)
    found = {}
    for name, labels in (("train", train), ("test", test)):
        if labels is not None:
            images = draw.integers(0, 255, (len(labels), size, size, 3), dtype=np.uint8)
            found |= {f"{name}_images": images, f"{name}_labels": np.array(labels)}
    np.savez(path, **found)
    return path


def photos(root, **classes):
    """A folder with a subfolder per class; "" is the folder itself."""
    draw = np.random.default_rng(0)
    for name, count in classes.items():
        place = root / name.removeprefix("_").replace("__", "/")
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            levels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(levels).save(place / f"{number}.png")
    return root


def one_class(kind, tmp_path):
    """Images whose score would mean nothing, in one of the forms that people have."""
    if kind == "arrays":
        return arrays(tmp_path / "one.npz", [0] * 70)
    if kind == "arrays, tested on another":
        return arrays(tmp_path / "two.npz", [1] * 70, [0, 1] * 5)
    if kind == "only folder":
        return photos(tmp_path / "plain", day=70)
    if kind == "no folder":
        return photos(tmp_path / "bare", _=70)
    if kind == "train and val":
        return photos(tmp_path / "split", train__cat=70, val__cat=9)
    if kind == "named in train":
        return photos(tmp_path / "named", train__cat=70)
    path = photos(tmp_path / "unreadable", train__cat=70, train__dog=4)
    for file in (path / "train/dog").iterdir():
        file.write_bytes(b"not an image")
    return path


KINDS = [
    "arrays", "arrays, tested on another", "only folder", "no folder", "train and val",
    "named in train", "unreadable",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_among_the_training_images_is_refused(kind, tmp_path):
    data = one_class(kind, tmp_path)
    ways = ["knn", "quick"] if kind == "unreadable" else WAYS  # the others read while they train
    for way in ways:
        with pytest.raises(UserError) as refused:
            evaluate(way, "random:resnet_tiny", data)
        said = str(refused.value)
        assert "class" in said and "\n" not in said, said


@pytest.mark.parametrize("verb", ["knn", "linear", "finetune"])
def test_the_command_ends_with_2(verb, tmp_path, monkeypatch, capsys):
    data = one_class("only folder", tmp_path)
    words = ["mocokit", "evaluate", verb, "random:resnet_tiny", str(data), "--size", "8"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "of one class, so a score would mean nothing" in err
    assert "%" not in err


@pytest.mark.parametrize("way", WAYS)
def test_one_class_among_the_test_images_is_said_beside_the_number(way, tmp_path, monkeypatch):
    monkeypatch.setattr("mocokit.protocols.finetune.LEAST_STEPS", 1)
    data = arrays(tmp_path / "a.npz", [0, 1] * 6, [1] * 5)
    found = evaluate(way, "random:resnet_tiny", data, json=tmp_path / "out.json")
    assert found.notes[0] == "all 5 test images are of one class, 1"
    assert found.notes[0] in json.loads((tmp_path / "out.json").read_text())["notes"]
    both = arrays(tmp_path / "b.npz", [0, 1] * 6, [1, 1, 0])
    assert not any("one class" in note for note in evaluate(way, "random:resnet_tiny", both).notes)


def test_images_that_are_alone_in_their_class_have_nobody_to_vote_for_them(tmp_path):
    """Each image is left out of its own vote, so 0 % would say nothing of the weights."""
    with pytest.raises(UserError, match="no image has another one of its class"):
        evaluate("knn", "random:resnet_tiny", arrays(tmp_path / "a.npz", [0, 1, 2, 3]))
    some = arrays(tmp_path / "b.npz", [0, 0, 0, 1, 1, 1, 2])
    found = evaluate("knn", "random:resnet_tiny", some)
    assert found.notes[0].startswith("1 of 7 images are the only one of their class")
    pairs = arrays(tmp_path / "c.npz", [0, 0, 1, 1])
    assert not any(
        "only one" in note for note in evaluate("knn", "random:resnet_tiny", pairs).notes
    )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("arrays", "the 70 labelled images of one are of one class"),
        ("no folder", "bare has no labels"),
        ("", None),
    ],
)
def test_the_monitor_says_once_why_it_does_not_score(kind, reason, tmp_path, capsys):
    data = one_class(kind, tmp_path) if kind else arrays(tmp_path / "two.npz", [0, 1] * 35)
    out = tmp_path / "run"
    settings = TINY | {"monitor.every_epochs": 1}
    run = mocokit.pretrain("mocov2", data, out, epochs=2, batch_size=32, settings=settings)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("no kNN scores are taken") == (reason is not None)
    assert ("knn_backbone" in run.result) == (reason is None)
    assert ("scored_images" in run.result) == (reason is None)
    if reason:
        assert f"no kNN scores are taken: {reason}" in said
    else:
        assert run.result["scored_images"] == 7
        lines = (out / "metrics.jsonl").read_text().splitlines()
        scored = [line for line in map(json.loads, lines) if "knn_backbone" in line]
        assert len(scored) == 2 and all(line["scored_images"] == 7 for line in scored)


def test_the_monitor_says_that_all_queries_are_of_one_class(tmp_path):
    data = arrays(tmp_path / "two.npz", [0, 1] * 35, [1] * 6)
    run = mocokit.pretrain("mocov2", data, tmp_path / "run", epochs=1, settings=TINY)
    assert run.result["protocol"].endswith("; all queries are of one class")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run of 6 steps with all its checkpoints, finished, and the same without its end."""
    import shutil

    root = tmp_path_factory.mktemp("unfinished")
    data = arrays(root / "two.npz", [0, 1] * 40, [0, 1] * 5)
    settings = TINY | {"save.every_steps": 1, "save.keep": 9, "monitor.every_epochs": 0}
    mocokit.pretrain("mocov2", data, root / "done", epochs=3, batch_size=32, settings=settings)
    shutil.copytree(root / "done", root / "going", symlinks=True)
    (root / "going/backbone.safetensors").unlink()
    for step in (5, 6):
        (root / f"going/checkpoints/step-{step:08d}.pt").unlink()
    (root / "going/last.pt").unlink()
    (root / "going/last.pt").symlink_to("checkpoints/step-00000004.pt")
    lines = (root / "going/metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "going/metrics.jsonl").write_text("".join(lines[:4]))
    shutil.copy(root / "done/checkpoints/step-00000003.pt", root / "alone.pt")
    return root


STAGES = [
    ("going", "checkpoint of step 4 of 6"),
    ("going/last.pt", "checkpoint of step 4 of 6"),
    ("going/checkpoints/step-00000002.pt", "checkpoint of step 2 of 6"),
    ("done/checkpoints/step-00000001.pt", "checkpoint of step 1 of 6"),
    ("alone.pt", "checkpoint of step 3"),
    ("done", ""),
    ("done/last.pt", ""),
    ("done/checkpoints/step-00000006.pt", ""),
    ("done/backbone.safetensors", ""),
]


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_what_is_scored_of_an_unfinished_run_is_named(name, stage, unfinished):
    import torch

    for layer in ("backbone", "head") if not name.endswith("safetensors") else ("backbone",):
        opened = open_model(unfinished / name, torch.device("cpu"), layer=layer)
        assert opened.unfinished == stage
        assert opened.subject.name.endswith(f", {stage}" if stage else opened.subject.name)
        assert "checkpoint" not in opened.untrained().name


@pytest.mark.parametrize("way", WAYS)
def test_it_is_named_on_screen_in_the_readme_and_in_json(
    way, unfinished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("mocokit.protocols.finetune.LEAST_STEPS", 1)
    monkeypatch.setenv("COLUMNS", "200")
    path, kept = unfinished / "going", tmp_path / "out.json"
    for name in ("README.md", "evaluations.jsonl"):
        (path / name).unlink(missing_ok=True)
    evaluate(way, path, unfinished / "two.npz", json=kept)
    stage = "checkpoint of step 4 of 6"
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(stage) >= 2  # beside the number, and in its protocol
    assert (path / "README.md").read_text().count(stage) >= 2
    line = json.loads((path / "evaluations.jsonl").read_text())
    for record in (line, json.loads(kept.read_text())):
        assert stage in record["results"][0]["features"]
        assert record["protocol"].startswith(f"{stage}; ")
    evaluate(way, unfinished / "done", unfinished / "two.npz")
    assert stage not in capsys.readouterr().err
