"""The names that others rely on (docs/design.md): they exist, with these parameters."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

import mocokit
from mocokit.cli.app import app
from mocokit.protocols import defaults

NAMES = {
    "mocokit.train.pretrain": (
        "recipe data out epochs batch_size device seed resume extend settings method allow_import"
    ),
    "mocokit.weights.resolve.load": "path",
    "mocokit.settings.difference": "a b",
    "mocokit.chance.uniform": "seed epoch index view slot",
    "mocokit.views.separable.crop_resize": "images boxes size flip",
    "mocokit.views.separable.gaussian_blur": "images sigma",
    "mocokit.views.colour.jitter": "images brightness contrast saturation hue order",
    "mocokit.methods.losses.info_nce": "query key negatives temperature",
    "mocokit.methods.losses.nt_xent": "a b temperature",
    "mocokit.methods.parts.follow": "key_module module momentum",
    "mocokit.evaluate.knn.knn_scores": "bank labels queries k temperature classes",
    "mocokit.evaluate.voc_ap.average_precision": "detections ground_truth iou metric",
    "mocokit.methods.parts.Queue": "size dim keys_per_image",
    "mocokit.recipes.mocov1": "",
    "mocokit.recipes.mocov2": "",
    "mocokit.recipes.mocov2_800": "",
    "mocokit.recipes.mocov2_cifar10": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    module, attribute = name.rsplit(".", 1)
    value = getattr(importlib.import_module(module), attribute)
    assert " ".join(inspect.signature(value).parameters) == NAMES[name]


def test_grouped_batch_norm_begins_with_channels_and_group_size():
    from mocokit.nets.batchnorm import GroupedBatchNorm2d

    assert list(inspect.signature(GroupedBatchNorm2d).parameters)[:2] == ["channels", "group_size"]


ALL = """
    Interrupted MocokitError NonFiniteLoss Run UserError evaluate_finetune evaluate_knn
    evaluate_linear evaluate_voc load pretrain
"""


def test_public_names():
    assert sorted(mocokit.__all__) == sorted(ALL.split())
    for name in mocokit.__all__:
        assert getattr(mocokit, name) is not None
    assert callable(mocokit.pretrain) and callable(mocokit.load)
    assert mocokit.recipes.mocov2().recipe == "mocov2"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mocokit.nothing  # noqa: B018


@pytest.mark.parametrize("name", [name for name in ALL.split() if name.islower()])
def test_public_functions_name_every_argument(name):
    for parameter in inspect.signature(getattr(mocokit, name)).parameters.values():
        assert parameter.kind is not parameter.VAR_KEYWORD
        assert parameter.annotation is not parameter.empty


@pytest.mark.parametrize("name", ["evaluate_knn", "evaluate_linear", "evaluate_finetune"])
def test_an_unknown_argument_is_a_type_error_that_names_it(name):
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'lay'"):
        getattr(mocokit, name)("random", lay="head")


def test_a_wrong_value_is_a_sentence():
    for wrong in ({"layer": "haed"}, {"precision": "float8"}):
        with pytest.raises(mocokit.UserError, match=f"unknown {next(iter(wrong))} .*; use "):
            mocokit.evaluate_knn("random", "nowhere", **wrong)
    with pytest.raises(mocokit.UserError, match=r"unknown split '2007'; use 07\+12, 07"):
        mocokit.evaluate_voc("random", "nowhere", split="2007")


VERBS = {
    "knn": (mocokit.evaluate_knn, defaults.Knn, defaults.Shared),
    "linear": (mocokit.evaluate_linear, defaults.Linear, defaults.Shared),
    "finetune": (mocokit.evaluate_finetune, defaults.FineTune, defaults.Shared),
    "voc": (mocokit.evaluate_voc, defaults.Voc, defaults.Shared),
}


def plain(value):
    """Typer wants lists where Python has tuples, and None where Python has an empty tuple."""
    return (tuple(value) if isinstance(value, list) else value) or None


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_and_python_have_the_defaults_of_one_table(verb):
    function, *tables = VERBS[verb]
    stated = {k: v for table in reversed(tables) for k, v in vars(table()).items()}
    python = {k: p.default for k, p in inspect.signature(function).parameters.items()}
    group = typer.main.get_command(app).commands["evaluate"]
    options = {one.name: one for one in group.commands[verb].params if one.name != "help"}
    options = {{"assignments": "settings"}.get(k, k): one for k, one in options.items()}
    assert set(options) == set(python)
    context = click.Context(group.commands[verb])
    seen = 0
    for name, option in options.items():
        if python[name] is inspect.Parameter.empty:
            continue
        assert plain(option.get_default(context)) == plain(python[name]), name
        if name in stated:
            assert plain(python[name]) == plain(stated[name]), name
            seen += 1
    assert seen >= len(vars(tables[0]()))


def test_the_guide_states_the_defaults_of_the_table():
    guide = " ".join((Path(__file__).parents[1] / "docs/guide.md").read_text().split())
    linear, tune = defaults.Linear(), defaults.FineTune()
    percent = ", ".join(f"{share:g}" for share in tune.percent)
    assert f"SGD, lr {linear.lr:g}, no weight decay, {linear.epochs} epochs" in guide
    assert f"k {defaults.NEIGHBOURS}, temperature {defaults.Knn.temperature[0]:g}" in guide
    assert f"{percent} % of the labels, {tune.epochs} epochs, lr {tune.lr:g}" in guide
    assert f"{defaults.Voc.trials} trials" in guide


SCRIPT = """\
import mocokit

run: mocokit.Run = mocokit.pretrain("demo", epochs=1)
accuracy: float = mocokit.evaluate_knn(run.folder, k=[20]).accuracy
width: str = mocokit.evaluate_knn(run.folder, k="20")
mocokit.load(run.folder).eval()
"""


# Other packages' types are not what is tested, and reading torch's takes a minute.
CONFIG = "".join(
    f"[mypy-{name}.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n"
    for name in ("torch", "numpy", "PIL", "pydantic", "rich", "typer", "click", "yaml")
)


def test_mypy_sees_the_types(tmp_path):
    """A user's script: its one wrong line is reported, and no other."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{CONFIG}")
    command = [sys.executable, "-m", "mypy", "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert all(line.startswith("script.py:5: error:") for line in errors), done.stdout
    assert "[assignment]" in done.stdout and "[arg-type]" in done.stdout, done.stdout
