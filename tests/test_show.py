"""`pretrain --show`, `--show-all` and `recipes`: what they say, and that it fits."""

import re
import sys

import pytest
import torch
import yaml

from mocokit import recipes
from mocokit.cli import show, tables
from mocokit.engine.runtime import default_precision
from mocokit.run import command
from mocokit.settings import flatten, from_yaml

CPU = torch.device("cpu")


def block(text, title):
    """The rows below a title, as one line a setting: {"optim.lr": "0.03 -> 0.1 peak ..."}."""
    lines = text.split(f"\n{title}", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    rows, section, name = {}, "", ""
    for line in lines:
        if re.match(r"  \S", line):
            section = line.strip()
        elif re.match(r"    \S", line):
            name, rest = re.split(r"\s{2,}", line.strip(), maxsplit=1)
            name = f"{section}.{name}"
            rows[name] = " ".join(rest.split())
        else:
            rows[name] += " " + " ".join(line.split())
    return rows


class TestShow:
    def test_tells_the_users_changes_from_the_recipes(self, mocokit):
        code, out, err = mocokit("pretrain", "mocov1", "--show", "--set", "optim.lr=0.1")
        assert code == 0 and not err
        assert block(out, "Changed by you") == {
            "optim.lr": "0.03 -> 0.1 peak learning rate, at lr_batch"
        }
        own = block(out, "The recipe's own")
        assert own["net.head"].startswith("mlp -> linear ")
        assert own["method.temperature"].startswith("0.2 -> 0.07 ")
        assert "optim.lr" not in own

    def test_says_when_nothing_differs(self, mocokit):
        _, out, _ = mocokit("pretrain", "mocov2", "--show")
        assert "Changed by you: nothing" in out
        assert "The recipe's own: nothing, since mocokit's defaults are mocov2" in out

    def test_what_is_in_effect_without_images(self, mocokit):
        words = ["--show", "--batch-size", 64, "--set", "engine.device=cpu"]
        _, out, _ = mocokit("pretrain", "mocov2", *words)
        rows = block(out, "In effect")
        assert rows["optim.learning rate"].startswith("0.0075 ")
        assert rows["method.groups"].startswith("2 ")
        assert rows["method.key momentum"].startswith("0.99975 ")
        assert rows["train.steps per epoch"].startswith("unknown ")
        assert rows["engine.device"].startswith("cpu ")
        assert rows["engine.precision"].startswith(f"auto -> {default_precision(CPU)} ")
        assert rows["data.workers"].startswith("auto -> 1 ")
        assert "engine.threads" in rows and "Images: none named" in out

    def test_what_you_state_is_in_effect(self, mocokit):
        words = ["--show", "--batch-size", 64, "--set", "optim.lr=0.1"]
        _, out, _ = mocokit("pretrain", "mocov2", *words)
        assert block(out, "In effect")["optim.learning rate"].startswith("0.1 ")

    def test_sizes_are_fitted_to_the_images(self, mocokit, toy_npz):
        code, out, _ = mocokit("pretrain", "mocov2", toy_npz, "--show")
        assert code == 0 and "Images: 160 in " in out and "Changed by you: nothing" in out
        fitted, effect = block(out, "Fitted to the 160 images"), block(out, "In effect")
        assert fitted["method.queue_size"].startswith("65536 -> 64 ")
        assert "note: queue 65536 -> 64" in out
        assert effect["optim.learning rate"].startswith("0.0075 ")
        assert effect["train.steps per epoch"].startswith("2 ")
        assert effect["train.total steps"].startswith("400 ")

    def test_the_views_in_order(self, mocokit):
        _, out, _ = mocokit("pretrain", "mocov2", "--show")
        lines = out.split("Augmentation")[1].split("\n\n")[0].splitlines()[1:]
        order = [re.split(r"\s{2,}", line.strip())[0] for line in lines if line[2] != " "]
        assert order[1:7] == [
            "random resized crop", "colour jitter", "grayscale", "Gaussian blur", "flip",
            "normalise",
        ]  # fmt: skip
        text = " ".join(out.split())
        assert "brightness [0.6, 1.4]" in text and "sigma uniform in [0.1, 2]" in text

    @pytest.mark.parametrize("name", recipes.RECIPES)
    def test_fits_80_columns_where_there_is_no_terminal(self, name, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        asked, stated = command.asked(name, None, {"seed": 1}, needs_data=False)
        monkeypatch.setattr(show, "_count_images", lambda asked: 4000)
        for text in (show.pretrain(asked, stated, everything=False), show.recipe_story(name)):
            assert max(map(len, text.splitlines())) <= 80

    def test_follows_the_terminal(self, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        for columns, width in ((100, 100), (20, 60), (500, 110)):
            monkeypatch.setenv("COLUMNS", str(columns))
            longest = max(map(len, show.recipe_story("simclr").splitlines()))
            assert width - 12 < longest <= width


class TestShowAll:
    @pytest.mark.parametrize("name", recipes.RECIPES)
    def test_a_recipe_comes_back_from_its_file(self, name, monkeypatch):
        asked, stated = command.asked(name, None, {"seed": 7}, needs_data=False)
        monkeypatch.setattr(show, "_count_images", lambda asked: 10**6)
        assert from_yaml(show.pretrain(asked, stated, everything=True)) == asked

    def test_the_file_gives_the_same_run(self, mocokit, toy_npz, tmp_path):
        words = ["--set", "optim.lr=0.1", "--set", "views.blur_probability=[1,0.1]", "--epochs", 3]
        code, out, err = mocokit("pretrain", "mocov2", toy_npz, *words, "--show-all")
        assert code == 0 and not err
        path = tmp_path / "config.yaml"
        path.write_text(out)
        code, again, err = mocokit("pretrain", path, "--show-all")
        assert code == 0 and not err
        assert yaml.safe_load(again) == yaml.safe_load(out)
        assert yaml.safe_load(out)["optim"]["lr_batch"] == 64  # fitted, and the rate is kept
        assert yaml.safe_load(out)["resolved"]["lr"] == 0.1

    def test_what_the_machine_settles_stays_open(self, mocokit):
        _, out, _ = mocokit("pretrain", "mocov2", "--show-all", "--set", "engine.device=cpu")
        tree = yaml.safe_load(out)
        assert tree["engine"]["precision"] == "auto"
        assert tree["resolved"]["engine.precision"] == default_precision(CPU)
        assert "total_steps" not in tree["resolved"]

    def test_every_setting_has_its_meaning_above_it(self, mocokit):
        _, out, _ = mocokit("pretrain", "demo", "--show-all")
        lines = out.splitlines()
        settings = out.split("# What follows")[0]
        for path in flatten(recipes.demo()):
            name = path.rpartition(".")[2]
            places = [n for n, line in enumerate(lines) if re.match(rf" *{name}: ", line)]
            assert any(lines[n - 1].lstrip().startswith("# ") for n in places), path
        assert max(map(len, settings.splitlines())) <= 100


class TestRecipes:
    def test_one_line_a_recipe_in_groups(self, mocokit):
        code, out, err = mocokit("recipes")
        lines = out.splitlines()
        assert code == 0 and not err and max(map(len, lines)) <= 100
        names = [line.split()[0] for line in lines if line]
        assert set(recipes.RECIPES) <= set(names)
        assert all(names.count(name) == 1 for name in recipes.RECIPES)
        assert names.index("mocov2") < names.index("simclr") < names.index("mocov2_cifar10")
        row = next(line for line in lines if line.startswith("mocov2_cifar10 "))
        assert re.split(r"\s{2,}", row)[2:] == ["kNN 82.6", "kNN 82.6"]
        row = next(line for line in lines if line.startswith("mocov2 "))
        assert re.split(r"\s{2,}", row)[2:] == ["linear 67.5", "-"]

    def test_the_whole_story_of_one(self, mocokit):
        code, out, err = mocokit("recipes", "mocov2")
        text = " ".join(out.split())
        assert code == 0 and not err
        for part in (
            "stronger augmentation", "arXiv 2003.04297", "mocokit pretrain mocov2 IMAGES/",
            "53 h on eight V100", "ImageNet linear 67.5", "AP50 82.4, AP 57.0, AP75 63.6",
            "Measured not measured.",
        ):  # fmt: skip
            assert part in text, part
        changed = block(out, "Derived from mocov1")
        assert changed["method.temperature"].startswith("0.07 -> 0.2 ")
        assert block(out, "In effect")["optim.learning rate"].startswith("0.03 ")

    def test_a_difference_is_not_printed_twice(self, mocokit):
        _, out, _ = mocokit("recipes", "mocov2_cifar10")
        assert "Derived from" not in out and "queue_size" in out

    def test_an_unknown_name(self, mocokit):
        code, out, err = mocokit("recipes", "mocov3")
        assert code == 2 and not out
        assert err == "mocokit: there is no recipe named 'mocov3'; did you mean mocov2?\n"


def test_a_table_keeps_every_word():
    rows = [tables.Row("a.b", "one two three four " * 5, "five six seven " * 9)]
    lines = tables.settings([("title", rows)], 60)
    words = sorted(" ".join(lines).split())
    assert words == sorted(f"title a b {rows[0].value} {rows[0].meaning}".split())
    assert max(map(len, lines)) <= 60
