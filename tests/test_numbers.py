"""Numbers that no option and no setting takes: NaN, infinity, and what cannot fit."""

import inspect
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

import mocokit
from mocokit import settings
from mocokit.cli.app import app
from mocokit.detection.protocol import Plan, plan_for
from mocokit.errors import UserError
from mocokit.protocols.limits import LIMITS, check_numbers
from mocokit.settings.methods import BUILT_IN
from mocokit.settings.schema import Settings

NOT_FINITE = ["nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "-1e999"]
BEYOND = [10**39, -1, -(10**30)]


def commands(group, path=()):
    for command in group.registered_commands:
        name = command.name or command.callback.__name__
        yield (*path, name), command.callback
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*path, inner.name))


def number_options():
    """Every option of every command that takes numbers, with words that would run it."""
    for path, command in commands(app):
        needed = ["random:resnet_tiny"] if path[0] == "evaluate" else ["demo"]
        if path[-1] in {"voc", "pack"}:
            needed.append("images")
        if path[-1] == "slurm":
            needed += ["--out", "run", "--gpus", "1"]
        for name, hint in get_type_hints(command, include_extras=True).items():
            kind, *infos = get_args(hint) or [hint]
            named = [d for info in infos for d in info.param_decls or () if d.startswith("--")]
            if infos and isinstance(infos[0], OptionInfo) and numeric(kind):
                yield [*path, *needed], (named or [f"--{name.replace('_', '-')}"])[0], name


def numeric(annotation):
    """Whether numbers may stand in a value of this type."""
    kinds = {annotation, *get_args(annotation)}
    return bool({int, float} & kinds) or any(numeric(one) for one in kinds - {annotation})


OPTIONS = list(number_options())


def test_every_number_is_found():
    assert len(OPTIONS) > 30
    found = {name for _, _, name in OPTIONS}
    assert found >= {"k", "temperature", "lr", "layer_decay", "percent", "epochs", "seed", "nodes"}


@pytest.mark.parametrize(
    ("words", "option"), [(w, o) for w, o, _ in OPTIONS], ids=lambda x: "-".join(x[:2])
)
def test_no_option_takes_what_is_not_finite_or_cannot_be(words, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in [*NOT_FINITE, *(str(n) for n in BEYOND)]:
        if value.lstrip("-").isdigit() and option in LEFT:
            continue
        done = CliRunner().invoke(app, [*words, f"{option}={value}"])
        error = done.exception
        if isinstance(error, UserError):
            assert option.strip("-").replace("-", "_") in str(error), (value, error)
            assert str(error).isprintable() and len(str(error)) < 300
        else:
            assert done.exit_code == 2 and option in done.output, (value, done.output, error)
    assert not list(tmp_path.iterdir())


LEFT = {"--iterations", "--ims-per-step"}  # of 0.1, whatever their number

FUNCTIONS = {
    "evaluate_knn": ["random:resnet_tiny"],
    "evaluate_linear": ["random:resnet_tiny"],
    "evaluate_finetune": ["random:resnet_tiny"],
    "evaluate_voc": ["random:resnet_tiny", "images"],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_takes_what_is_not_finite(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = getattr(mocokit, name)
    taken = [p for p in inspect.signature(function).parameters if p in LIMITS]
    assert len(taken) >= 4
    for option in taken:
        several = isinstance(inspect.signature(function).parameters[option].default, tuple)
        for value in (math.nan, math.inf, -math.inf, -1, 10**39, "3", True, np.float64("nan")):
            given = [1, value] if several else value
            with pytest.raises(UserError, match=f"^{option} = .*: must be a"):
                function(*FUNCTIONS[name], **{option: given})


def test_what_python_gives_as_numbers_is_taken():
    check_numbers(k=np.array([1, 2]), lr=np.float32(0.1), seed=np.int64(3), percent=(1, 100.0))
    check_numbers(k=range(1, 3), size=None)
    with pytest.raises(UserError, match="name at least one value"):
        check_numbers(k=())


def number_settings():
    for method in BUILT_IN:
        base = settings.replace(Settings(), {"method.name": method})
        for path, field in settings.fields(base):
            if numeric(field.annotation):
                yield method, path


SETTINGS = sorted({path: method for method, path in number_settings()}.items())


def places(value, bad):
    """A setting's value with a bad number in place of each number of it."""
    if not isinstance(value, tuple):
        return [bad]
    return [[*value[:n], bad, *value[n + 1 :]] for n in range(len(value))]


@pytest.mark.parametrize(("path", "method"), SETTINGS)
def test_no_setting_takes_what_is_not_finite(path, method):
    base = settings.replace(Settings(), {"method.name": method})
    for bad in (math.nan, math.inf, -math.inf, True, "1", np.float64("nan")):
        for value in places(settings.get(base, path), bad):
            with pytest.raises(UserError, match=path.replace(".", r"\.")):
                found = settings.replace(base, {path: value})
                raise AssertionError(settings.get(found, path))
    for text in (".nan", ".inf", "-.inf", "1e999"):
        with pytest.raises(UserError, match=path.replace(".", r"\.")):
            settings.replace(base, settings.parse_assignments([f"{path}={text}"]))


@pytest.mark.parametrize("name", Plan.model_fields)
def test_no_value_of_the_detection_protocol_takes_what_is_not_finite(name):
    default = Plan.model_fields[name].default
    for bad in (math.nan, math.inf, -math.inf, True, "1"):
        for value in places(default, bad):
            with pytest.raises(UserError, match=name):
                plan_for("07+12", settings={name: value})


def test_every_numeric_setting_is_found():
    assert len(SETTINGS) > 50
    assert {"method.bank_negatives", "views.blur_probability", "engine.threads"} <= dict(
        SETTINGS
    ).keys()
