"""The import directions of docs/design.md, and the sizes that keep the code readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mocokit"
FILES = sorted(PACKAGE.rglob("*.py"))

# From top to bottom; a module imports only from rows below its own, or from its own room.
LAYERS = [
    {"cli"},
    {"evaluate"},
    {"check", "pack"},
    {"pretrain"},
    {"run"},
    {"health", "detection"},
    {"protocols"},
    {"weights"},
    {"methods", "engine", "views", "data"},
    {"nets"},
    {"recipes"},
    {"view_settings"},
    {"sizes"},
    {"settings"},
    {"config"},
    {"places"},
    {"errors", "chance", "files", "paper"},
]
ENTRANCES = {"__init__", "__main__"}  # they import anything, when asked
# Below the builders: constructors take plain values.
PLAIN = {"health", "detection", "protocols", "methods", "views", "data", "nets"}


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mocokit":
            names = (
                [node.module.split(".")[1]]
                if "." in node.module
                else [alias.name for alias in node.names]
            )
            yield from names
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mocokit."):
                    yield alias.name.split(".")[1]


def row(name):
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def test_every_module_has_its_place():
    assert {room(path) for path in FILES} - ENTRANCES == set().union(*LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = room(path)
    if here in ENTRANCES:
        return
    for other in imported_rooms(path):
        assert other == here or row(other) > row(here), f"{here} imports {other}"


def test_rooms_below_the_builders_see_no_settings():
    for path in FILES:
        if room(path) in PLAIN:
            assert not {"config", "settings", "recipes", "sizes"} & set(imported_rooms(path)), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    text = path.read_text()
    limit = 200 if path.name == "pretrain.py" else 400
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickles_and_no_prints(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
            assert any(k.arg == "allow_pickle" and k.value.value is False for k in node.keywords)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            pytest.fail("print outside the recorder")


def test_importing_the_package_is_instant():
    script = (
        "import sys, mocokit; heavy = {'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import mocokit.pretrain\n"
        "assert callable(mocokit.pretrain), mocokit.pretrain\n"
        "from mocokit import load, pretrain\n"
        "assert callable(pretrain) and callable(load)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
