"""The examples of docs/adding: each is written to a file as a reader would do, and used."""

import importlib
import io
import re
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_contract import QUICK, SMALL, interrupted_at
from test_pretrain import assert_same, state_of

import mocokit
from mocokit.data.source import Splits
from mocokit.errors import Interrupted
from mocokit.settings import methods

PAGES = Path(__file__).resolve().parents[1] / "docs" / "adding"
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
    alone = mocokit.pretrain("demo", sources[0], "alone", epochs=1, settings=settings)
    assert "a held-out tenth" in alone.result["protocol"]


def test_a_probe_scores_a_run_and_the_baseline(example, toy_npz, tmp_path):
    module = example("probe")
    settings = {**QUICK, **SMALL, "train.batch_size": 32, "monitor.every_epochs": 0}
    run = mocokit.pretrain("demo", toy_npz, tmp_path / "run", epochs=1, settings=settings)
    assert module.nearest_mean(run.folder, toy_npz) == pytest.approx(1.0, abs=0.2)
    assert 0 <= module.nearest_mean("random:resnet18", toy_npz) <= 1
