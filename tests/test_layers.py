"""The import directions of docs/design.md, and the sizes that keep the code readable."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mocokit"
FILES = sorted(PACKAGE.rglob("*.py"))

# From top to bottom; a module imports only from rows below its own, or from its own room.
LAYERS = [
    {"cli"},
    {"evaluate"},
    {"train", "check", "pack"},
    {"run"},
    {"health", "detection"},
    {"protocols"},
    {"weights"},
    {"methods", "engine", "views", "data"},
    {"nets"},
    {"recipes"},
    {"settings"},
    {"chance", "files", "transfer", "published"},
    {"errors", "version"},
]
ENTRANCES = {"__init__", "__main__"}  # they import anything, when asked
# Below the builders: constructors take plain values.
PLAIN = {"health", "detection", "protocols", "methods", "views", "data", "nets"}
HALL = 14  # modules beside the rooms


def module(path):
    """`data.open` for data/open.py, `data` for data/__init__.py, and nothing for the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = {module(path) for path in FILES}


def imported_modules(path):
    """What a file imports of mocokit, wherever in it: modules, never the names in them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mocokit":
            base = node.module.removeprefix("mocokit").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else base
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mocokit."):
                    yield alias.name.removeprefix("mocokit.")


def imported_rooms(path):
    return {name.split(".")[0] for name in imported_modules(path)}


def row(name):
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


def test_every_module_has_its_place():
    assert {room(path) for path in FILES} - ENTRANCES == set().union(*LAYERS)


def test_the_hall_is_small_and_no_room_is_empty():
    assert len(list(PACKAGE.glob("*.py"))) <= HALL
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            assert len(list(path.parent.rglob("*.py"))) > 1, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = room(path)
    if here in ENTRANCES:
        return
    for other in imported_rooms(path):
        assert other == here or row(other) > row(here), f"{here} imports {other}"


def test_no_imports_go_round():
    """Within a room too; raises CycleError with the way round."""
    files = [path for path in FILES if path.parent != PACKAGE or room(path) not in ENTRANCES]
    graph = {module(path): set(imported_modules(path)) for path in files}
    TopologicalSorter(graph).prepare()


def test_rooms_below_the_builders_see_no_settings():
    """A method's `build` alone reads settings: its own section, from settings.methods."""
    for path in FILES:
        if room(path) in PLAIN:
            found = {
                name for name in imported_modules(path) if name.startswith(("settings", "rec"))
            }
            assert found <= ({"settings.methods"} if room(path) == "methods" else set()), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    text = path.read_text()
    limit = 200 if path.name == "train.py" and path.parent == PACKAGE else 400
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
        "import mocokit.train\n"
        "assert callable(mocokit.pretrain), mocokit.pretrain\n"
        "from mocokit import load, pretrain\n"
        "assert callable(pretrain) and callable(load)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
