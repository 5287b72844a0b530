"""The examples of docs/adding: each is written to a file as a reader would do, and used."""

import importlib
import io
import re
import shlex
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_contract import QUICK, SMALL, interrupted_at
from test_pretrain import assert_same, state_of

import mocokit
from mocokit.data.decode import BadImage
from mocokit.data.source import Splits
from mocokit.errors import Interrupted, UserError
from mocokit.methods.losses import LOSSES
from mocokit.settings import methods

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "adding"
NAMES = {"method": "my_method", "loss": "my_loss", "source": "my_source", "probe": "my_probe"}


@pytest.fixture
def example(request, tmp_path, monkeypatch):
    """The module of a page's example, in the current folder."""

    def written(page):
        (code,) = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.S)
        assert code.count("\n") < 80
        name = NAMES[page]
        assert f"`{name}.py`" in (PAGES / f"{page}.md").read_text()
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        request.addfinalizer(lambda: sys.modules.pop(name, None))
        return importlib.import_module(name)

    monkeypatch.setattr(methods, "_outside", {})
    monkeypatch.setattr(methods, "_allowed", set())
    return written


@pytest.mark.parametrize(
    ("page", "name", "setting"),
    [
        ("method", "my_method:SimSiam", {"method.hidden": 8}),
        ("loss", "my_loss:MarginMoCo", {"method.margin": 0.3}),
    ],
)
def test_a_method_trains_is_scored_checked_and_resumed(
    page, name, setting, example, toy_npz, tmp_path, monkeypatch
):
    module = example(page)
    cls = getattr(module, name.partition(":")[2])
    settings = {**QUICK, **SMALL, **setting, "method.name": name, "train.batch_size": 32}

    def run(out):
        return mocokit.pretrain("demo", toy_npz, out, epochs=1, settings=settings)

    straight = run("straight")
    assert straight.result["knn_backbone"] > 0
    checked = "contrasted_images" in straight.result
    assert checked == (page == "loss")
    assert checked or "statistics leak not checked" in straight.result["verdict"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, cls, 2)
        run("stopped")
    run("stopped")
    assert_same(state_of(straight.folder), state_of(tmp_path / "stopped"))
    methods._outside.clear()  # as in another process, which does not know the class
    del sys.modules[NAMES[page]]
    assert mocokit.load(straight.folder).num_features == 64
    assert mocokit.evaluate_knn(straight.folder, baseline=False, cache=False).accuracy > 0
    assert NAMES[page] not in sys.modules


@pytest.mark.parametrize(("page", "row"), [("method", "hidden 64 "), ("loss", "margin 0.2 ")])
def test_the_command_of_a_page_finds_the_file_beside_it(
    page, row, example, toy_npz, mocokit, monkeypatch
):
    example(page)
    del sys.modules[NAMES[page]]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(Path.cwd())])
    (line,) = re.findall(r"^    mocokit (pretrain .*)$", (PAGES / f"{page}.md").read_text(), re.M)
    words = [toy_npz if word == "PHOTOS/" else word for word in shlex.split(line)]
    code, out, err = mocokit(*words, "--show")
    assert code == 0 and row in " ".join(out.split()), err


def test_the_loss_is_info_nce_with_a_margin_on_the_positive(example):
    margin, plain = example("loss").Margin, LOSSES["info_nce"](0.2)
    positive, sums = torch.rand(9), [torch.rand(9) * 5]
    with_none, with_some = (margin(0.2, size)(positive, sums, 30) for size in (0.0, 0.3))
    torch.testing.assert_close(with_none, plain(positive, sums, 30))
    torch.testing.assert_close(with_some, plain(positive - 0.3, sums, 30))


@pytest.mark.parametrize("page", NAMES)
def test_what_a_page_names_is_there(page):
    text = (PAGES / f"{page}.md").read_text()
    places = set(re.findall(r"\b(?:mocokit|tests)/[\w/]+\.py", text))
    assert places and all((ROOT / path).is_file() for path in places if "NAME" not in path)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (PAGES / link).is_file(), link
    for name, path in (
        ("LOSSES", "methods/losses.py"), ("LossName", "settings/methods.py"),
        ("BUILT_IN", "settings/methods.py"), ("_open_file", "data/open.py"),
    ):  # fmt: skip
        if f"`{name}`" in text:
            assert f"mocokit/{path}" in text.replace("\n", " ")
            assert re.search(rf"\b{name}\b", (ROOT / "mocokit" / path).read_text())
    if page == "method":
        contract, moco = (ROOT / f"mocokit/methods/{name}.py" for name in ("method", "moco"))
        assert 180 < len(contract.read_text().splitlines()) < 220
        assert len(re.findall(r"^    \S", moco.read_text().split("`forward`")[0], re.M)) == 7


def database(path, images, labels):
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE photos (id INTEGER PRIMARY KEY, jpeg BLOB, label TEXT)")
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG")
            row = (10 * number, file.getvalue(), f"class {label}")
            made.execute("INSERT INTO photos VALUES (?, ?, ?)", row)
    made.close()


def test_a_source_trains_with_workers_is_scored_and_resumed(
    example, toy_npz, tmp_path, monkeypatch
):
    module = example("source")
    with np.load(toy_npz) as toy:
        for split in ("train", "test"):
            images, labels = toy[f"{split}_images"], toy[f"{split}_labels"]
            database(tmp_path / f"{split}.db", images, labels)
    sources = [module.DatabaseSource(tmp_path / f"{split}.db") for split in ("train", "test")]
    assert len(sources[0]) == 160 and sources[0].read(3).shape == (32, 32, 3)
    settings = {**QUICK, **SMALL, "train.batch_size": 32}

    def run(out, workers):
        given = settings | {"data.workers": workers}
        return mocokit.pretrain("demo", Splits(*sources), out, epochs=1, settings=given)

    straight = run("straight", 0)
    assert straight.result["knn_backbone"] > 0
    assert "Source object photos" in (straight.folder / "config.yaml").read_text()
    from mocokit.methods.moco import MoCo

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(patch, MoCo, 2)
        run("stopped", 0)
    run("stopped", 2)
    assert_same(state_of(straight.folder)["method"], state_of(tmp_path / "stopped")["method"])
    config = str(straight.folder / "config.yaml")
    again = mocokit.pretrain(config, Splits(*sources), "again")
    assert_same(state_of(straight.folder)["method"], state_of(again.folder)["method"])
    with pytest.raises(UserError, match="Source object photos"):
        mocokit.pretrain(config, out="again, without it")
    with pytest.raises(UserError, match="or other images, as the second argument"):
        mocokit.evaluate_knn(straight.folder)
    with sqlite3.connect(tmp_path / "train.db") as changed:
        changed.execute("DELETE FROM photos WHERE id = 30")
    changed.close()
    with pytest.raises(BadImage, match="no longer in the table"):
        sources[0].read(3)
    alone = mocokit.pretrain("demo", sources[0], "alone", epochs=1, settings=settings)
    assert "photo 30" in (alone.folder / "bad_images.txt").read_text()
    monkeypatch.setattr(sources[0], "labels", None)
    settings["monitor.every_epochs"] = 0
    unlabelled = mocokit.pretrain("demo", sources[0], "unlabelled", epochs=1, settings=settings)
    assert unlabelled.result["finished"]
    assert "a held-out tenth" in alone.result["protocol"]


def test_a_probe_scores_a_run_and_the_baseline(example, toy_npz, tmp_path):
    module = example("probe")
    settings = {**QUICK, **SMALL, "train.batch_size": 32, "monitor.every_epochs": 0}
    run = mocokit.pretrain("demo", toy_npz, tmp_path / "run", epochs=1, settings=settings)
    assert module.nearest_mean(run.folder, toy_npz) == pytest.approx(1.0, abs=0.2)
    assert 0 <= module.nearest_mean("random:resnet18", toy_npz) <= 1
