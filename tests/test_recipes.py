"""Recipes hold the papers' settings, and differ by exactly what the papers changed."""

import re

import pytest

from mocokit import published, recipes
from mocokit.errors import UserError
from mocokit.recipes.derive import parent
from mocokit.recipes.story import GROUPS, LINES, story
from mocokit.run import command
from mocokit.settings import difference, get

V1_TO_V2 = {
    "net.head": ("linear", "mlp"),
    "method.temperature": (0.07, 0.2),
    "views.order": (
        ("crop", "grayscale", "jitter", "flip"),
        ("crop", "jitter", "grayscale", "blur", "flip"),
    ),
    "views.jitter_probability": (1.0, 0.8),
    "views.hue": (0.4, 0.1),
    "views.blur_probability": (0.0, 0.5),
    "optim.schedule": ("steps", "cosine"),
}


def test_v2_is_v1_with_the_papers_changes():
    assert difference(recipes.mocov1(), recipes.mocov2()) == V1_TO_V2


HEAD = {"net.head", "method.temperature"}
AUG = {p for p in V1_TO_V2 if p.startswith("views.")}
COS = {"optim.schedule"}


@pytest.mark.parametrize(
    ("row", "parts"),
    [("ablation_a", HEAD), ("ablation_b", AUG), ("ablation_c", HEAD | AUG)],
)
def test_ablation_rows_are_table_1(row, parts):
    changed = difference(recipes.mocov1(), recipes.RECIPES[row]())
    assert changed == {path: V1_TO_V2[path] for path in parts}


def test_800_epochs_differ_in_nothing_else():
    assert difference(recipes.mocov2(), recipes.mocov2_800()) == {"train.epochs": (200, 800)}
    assert difference(recipes.mocov2_cifar10(), recipes.mocov2_cifar10_symmetric()) == {
        "method.symmetric": (False, True)
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("net.backbone", "resnet50"),
        ("net.dim", 128),
        ("net.zero_init_last", False),
        ("method.queue_size", 65536),
        ("method.momentum", 0.999),
        ("method.group_size", 32),
        ("optim.lr", 0.03),
        ("optim.lr_batch", 256),
        ("optim.momentum", 0.9),
        ("optim.weight_decay", 1e-4),
        ("optim.drops", (0.6, 0.8)),
        ("optim.per", "epoch"),
        ("optim.warmup_epochs", 0),
        ("train.epochs", 200),
        ("train.batch_size", 256),
        ("data.last", "drop"),
        ("views.crop_area", (0.2, 1.0)),
        ("views.grayscale_probability", 0.2),
        ("views.flip_probability", 0.5),
        ("views.brightness", 0.4),
        ("views.mean", (0.485, 0.456, 0.406)),
    ],
)
def test_v1_and_v2_share_the_authors_settings(path, value):
    assert get(recipes.mocov1(), path) == get(recipes.mocov2(), path) == value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("net.backbone", "resnet18"),
        ("net.stem", "small"),
        ("net.head", "linear"),
        ("method.temperature", 0.1),
        ("method.queue_size", 4096),
        ("method.momentum", 0.99),
        ("method.group_size", 64),
        ("optim.lr", 0.06),
        ("optim.lr_batch", 512),
        ("optim.weight_decay", 5e-4),
        ("optim.first_epoch", 1),
        ("train.batch_size", 512),
        ("train.epochs", 200),
        ("views.order", ("crop", "flip", "jitter", "grayscale")),
        ("views.crop_area", (0.08, 1.0)),
        ("views.std", (0.2023, 0.1994, 0.2010)),
        ("monitor.k", 200),
        ("monitor.temperature", 0.1),
    ],
)
def test_the_cifar_recipe_is_the_notebooks(path, value):
    assert get(recipes.mocov2_cifar10(), path) == value


class TestStory:
    """The docstring of every recipe has one form, from which `mocokit recipes` is made."""

    @pytest.mark.parametrize("name", recipes.RECIPES)
    def test_the_form(self, name):
        told = story(name)
        assert tuple(told.lines) == LINES and all(told.lines.values())
        assert 0 < len(told.title) <= 34 and not told.title.endswith(".")
        assert (recipes.RECIPES[name].__doc__ or "").splitlines()[0] == f"{told.title}."
        assert told.group in GROUPS
        ends = [text[-1] for label, text in told.lines.items() if label != "Command"]
        assert set(ends) == {"."}
        assert recipes.by_name(name).recipe == name

    @pytest.mark.parametrize("name", recipes.RECIPES)
    def test_its_command_names_it(self, name):
        words = story(name).lines["Command"].split()
        assert words[:2] == ["mocokit", "pretrain"]
        settings, _ = command.asked(next(iter(words[2:]), None), None, {}, needs_data=False)
        assert settings == recipes.by_name(name)

    @pytest.mark.parametrize("name", recipes.RECIPES)
    def test_published_numbers_are_those_of_published(self, name):
        line = story(name).lines["Published"]
        if name in published.ACCURACY:
            assert line == str(published.ACCURACY[name])
        else:
            assert line.startswith("no accuracy") and not re.search(r"\d", line)

    @pytest.mark.parametrize("name", recipes.RECIPES)
    def test_a_measured_number_has_its_seeds(self, name):
        told = story(name)
        line = told.lines["Measured"]
        assert line.startswith("not ") or ("seed" in line and told.measured)
        assert not (line.startswith("not ") and told.measured)

    def test_published_values_name_recipes_and_rows(self):
        assert published.ACCURACY.keys() | published.VOC_OF_RECIPE.keys() <= recipes.RECIPES.keys()
        rows = {row.name for row in published.VOC["07+12"]}
        assert set(published.VOC_OF_RECIPE.values()) <= rows

    def test_several_seeds_are_a_range(self):
        assert story("demo").measured == "kNN 94.5-95.3"
        assert story("mocov2_cifar10").measured == "kNN 82.6"
        assert story("simclr_cifar10").published == "linear about 91"

    def test_parents(self):
        built = {name: parent(recipe()) for name, recipe in recipes.RECIPES.items()}
        assert built["mocov1"] is None and list(built.values()).count(None) == 1
        assert built["mocov2"] == "mocov1" and built["mocov2_cifar10"] == "mocov2"


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean mocov2"):
        recipes.by_name("mocov3x")
    with pytest.raises(UserError, match="there are demo, mocov1"):
        recipes.by_name("zzz")


class TestAsked:
    def test_nothing_is_the_demo(self):
        settings, stated = command.asked(None, None, {})
        assert settings == recipes.demo() and not stated

    def test_a_path_alone_is_the_data_of_mocov2(self, tmp_path):
        settings, stated = command.asked(str(tmp_path), None, {"seed": 3})
        assert settings.recipe == "mocov2" and settings.data.path == str(tmp_path)
        assert settings.seed == 3 and stated == {"seed"}

    def test_a_recipe_without_data_is_refused(self):
        with pytest.raises(UserError, match="mocov1 needs images: name a folder"):
            command.asked("mocov1", None, {})
        assert command.asked("mocov1", None, {}, needs_data=False)[0].recipe == "mocov1"

    @pytest.mark.parametrize("arguments", [("none/", None), ("mocov2", "none"), ("a.jpg", None)])
    def test_a_missing_path_is_named(self, arguments):
        with pytest.raises(UserError, match="there is no file or folder (none|a.jpg)"):
            command.asked(*arguments, {})

    def test_a_misspelt_recipe_is_no_path(self):
        with pytest.raises(UserError, match="did you mean mocov2"):
            command.asked("mocv2", None, {})

    def test_a_file_states_what_it_holds(self, tmp_path):
        (tmp_path / "c.yaml").write_text(
            f"method: {{queue_size: 99}}\ndata: {{path: {tmp_path}}}\n"
        )
        settings, stated = command.asked(str(tmp_path / "c.yaml"), None, {"seed": 1})
        assert settings.method.queue_size == 99
        assert stated == {"method.queue_size", "data.path", "seed"}


def left_out(*names, **values):
    """What MoCo's settings have and another method's lack, by default or with these values."""
    own = {
        "queue_size": 65536, "momentum": 0.999, "momentum_batch": 256, "enqueue": "both",
        "momentum_schedule": "constant",
    } | values  # fmt: skip
    own |= {name: default for name, default in OF_BOTH_VIEWS.items() if name in names}
    return {f"method.{name}": (value, None) for name, value in own.items()}


OF_BOTH_VIEWS = {"symmetric": False, "shuffle": True}
TO_ENDTOEND = {"method.name": ("moco", "simclr"), **left_out()}
SYMMETRIC = {"method.symmetric": (False, True)}
TO_BANK = {
    "method.name": ("moco", "memorybank"),
    **left_out("symmetric", "shuffle"),
    "method.bank_momentum": (None, 0.5),
}
CIFAR = {"queue_size": 4096, "momentum": 0.99, "momentum_batch": 512}


@pytest.mark.parametrize(
    ("one", "other", "changed"),
    [
        ("mocov2", "endtoend", TO_ENDTOEND | SYMMETRIC),
        ("mocov1", "endtoend_v1", TO_ENDTOEND),
        (
            "endtoend",
            "endtoend_4096",
            {"train.batch_size": (256, 4096), "train.micro_batch": (None, 256)},
        ),
        ("simclr", "simclr_256", {"train.batch_size": (4096, 256), "train.epochs": (1000, 200)}),
        (
            "mocov1",
            "memorybank",
            TO_BANK | {"method.loss": ("info_nce", "nce"), "method.bank_negatives": (None, 4096)},
        ),
        ("mocov1", "memorybank_softmax", TO_BANK | {"method.bank_negatives": (None, 65536)}),
        ("mocov2", "mocov2_symmetric", {"method.symmetric": (False, True)}),
        (
            "mocov2_cifar10",
            "endtoend_cifar10",
            TO_ENDTOEND | SYMMETRIC | left_out(**CIFAR),
        ),
        (
            "mocov2_cifar10",
            "memorybank_softmax_cifar10",
            TO_BANK | left_out(**CIFAR) | {"method.bank_negatives": (None, 4096)},
        ),
    ],
)
def test_mechanisms_differ_in_nothing_but_the_mechanism(one, other, changed):
    assert difference(recipes.by_name(one), recipes.by_name(other)) == changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim.name", "lars"), ("optim.lr", 0.3), ("optim.lr_batch", 256),
        ("optim.scale", "linear"), ("optim.weight_decay", 1e-6), ("optim.trust", 0.001),
        ("optim.momentum", 0.9), ("optim.warmup_epochs", 10), ("optim.per", "step"),
        ("optim.schedule", "cosine"), ("method.temperature", 0.1),
        ("method.batch_norm", "whole"), ("method.symmetric", True), ("net.zero_init_last", True),
        ("net.head", "mlp"), ("net.dim", 128), ("views.crop_area", (0.08, 1.0)),
        ("views.brightness", 0.8), ("views.hue", 0.2), ("views.interpolation", "bicubic"),
        ("views.mean", (0, 0, 0)), ("views.blur_probability", 0.5),
    ],
)  # fmt: skip
def test_simclr_has_its_papers_settings(path, value):
    assert get(recipes.simclr(), path) == value


def test_simclrs_learning_rate_is_the_published_one():
    from mocokit.settings.sizes import resolve

    assert resolve(recipes.simclr(), 1_281_167).lr == pytest.approx(4.8)
    assert resolve(recipes.simclr_cifar10(), 50_000).lr == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("net.head", "mlp_bn"), ("net.hidden", 4096), ("net.dim", 256), ("net.predictor", True),
        ("method.symmetric", True), ("method.enqueue", "one"), ("method.momentum", 0.99),
        ("method.momentum_schedule", "cosine"), ("method.batch_norm", "whole"),
        ("method.temperature", 0.2), ("method.queue_size", 65536), ("train.batch_size", 256),
        ("optim.warmup_epochs", 10),
    ],
)  # fmt: skip
def test_v2_plus_is_megviis(path, value):
    assert get(recipes.mocov2plus(), path) == value


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method.queue_size": None}, "setting: method.queue_size = null: .*integer"),
        ({"method.loss": "nce"}, "setting: method.loss = 'nce': input should be 'info_nce'"),
        (
            {"method.name": "memorybank", "method.loss": "nce"},
            "setting: method.bank_negatives must be a number for loss nce",
        ),
        (
            {"method.bank_negatives": 5},
            "method.bank_negatives does not exist for method moco; it belongs to memorybank",
        ),
        ({"method.enqueue": "one"}, "setting: method.enqueue = 'one' needs method.symmetric=true"),
        (
            {"method.name": "simclr", "net.predictor": True},
            "setting: net.predictor must be false for simclr",
        ),
        (
            {"method.name": "simclr", "method.queue_size": 64},
            "method.queue_size does not exist for method simclr; it belongs to moco",
        ),
        (
            {"method.name": "memorybank", "method.symmetric": True},
            "method.symmetric does not exist for method memorybank; it belongs to moco and simclr",
        ),
        ({"method.name": "simsiam"}, "setting: method.name = 'simsiam' is no method; use moco,"),
        ({"views.order": ["flip"]}, "setting: views.order must begin with crop"),
    ],
)
def test_mechanisms_that_cannot_be_are_refused(changes, sentence):
    from mocokit.settings import replace

    with pytest.raises(UserError, match=sentence):
        replace(recipes.mocov2(), changes)


def test_a_batch_with_one_set_of_statistics_is_not_cut():
    from mocokit.settings import replace
    from mocokit.settings.sizes import fit

    settings = replace(recipes.simclr_256(), {"train.micro_batch": 64})
    with pytest.raises(UserError, match="one .*batch_norm=whole.*recipe endtoend"):
        fit(settings, 10**6)


def test_the_memory_bank_states_its_size_beforehand():
    from mocokit.settings.sizes import fit

    _, notices = fit(recipes.memorybank(), 1_281_167)
    assert any("1,281,167 x 128 float32: 626 MiB" in notice for notice in notices)


def test_a_bank_smaller_than_its_negatives_is_taken_whole():
    from mocokit.settings.sizes import fit

    settings, notices = fit(recipes.memorybank_softmax(), 5000)
    assert settings.method.bank_negatives is None
    assert any("all of the bank's 5000" in notice for notice in notices)


def test_a_short_run_has_a_short_warm_up():
    from mocokit.settings import replace
    from mocokit.settings.sizes import fit

    short = replace(recipes.simclr_256(), {"train.epochs": 5})
    settings, notices = fit(short, 10**6)
    assert settings.optim.warmup_epochs == 0.5 and any("warm-up" in n for n in notices)
    stated = {"optim.warmup_epochs": 5.0}  # what a user states is what runs
    settings, notices = fit(replace(short, stated), 10**6, stated)
    assert settings.optim.warmup_epochs == 5 and any("leaves none of the 5" in n for n in notices)
