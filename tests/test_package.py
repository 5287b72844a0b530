"""The wheel: what is in it, and that it runs with the packages it declares and no others."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mocokit

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uv():
    """The uv of `make setup`, else the system's."""
    places = [ROOT / ".tools/bin/uv", Path(sys.prefix).parent / ".tools/bin/uv"]
    found = next((str(path) for path in places if path.is_file()), shutil.which("uv"))
    return found or pytest.skip("uv builds the wheel, and is not here")


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(uv, tmp_path_factory):
    """(wheel, source archive) of this checkout, built as `make dist` does."""
    folder = tmp_path_factory.mktemp("dist")
    run(uv, "build", "--quiet", "--out-dir", folder, cwd=ROOT)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def test_make_dist_is_what_is_tested_and_names_no_registry():
    text = (ROOT / "Makefile").read_text()
    assert "\t$(UV) build --quiet --out-dir dist\n" in text
    assert "://" not in text and "index" not in text.replace("--no-emit-index-url", "")


def test_the_wheel_is_small_and_holds_the_package_alone(dist):
    wheel, _ = dist
    assert wheel.stat().st_size < 2**20
    assert wheel.name.startswith(f"mocokit-{mocokit.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "mocokit/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mocokit"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "mocokit").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


def test_the_source_archive_holds_what_the_tests_need(dist):
    with tarfile.open(dist[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "LICENSE", "README.md", "mocokit/py.typed", "tests/conftest.py"}
    assert wanted <= names and not any(name.startswith("runs/") for name in names)


def required(name, found):
    """The distributions that a package needs without its extras, by name, with their needs."""
    for text in distribution(name).requires or ():
        one = Requirement(text)
        wanted = [one.marker is None or one.marker.evaluate({"extra": ""})]
        wanted += [one.marker.evaluate({"extra": extra}) for extra in one.extras if one.marker]
        if any(wanted) and one.name not in found:
            found.add(one.name)
            required(one.name, found)
    return found


@pytest.fixture(scope="module")
def installed(uv, dist, tmp_path_factory):
    """A fresh environment with the wheel installed.

    Nothing is downloaded: the packages that the wheel declares, and what those need, are links to
    the files of this environment. All else of it stays outside, so a dependency that is missing
    from pyproject.toml is missing here too. Whether a registry still has these versions is not
    tested.
    """
    place = tmp_path_factory.mktemp("fresh") / "env"
    run(uv, "venv", "--quiet", "--python", sys.executable, place)
    (site,) = place.glob("lib/python*/site-packages")
    run(uv, "pip", "install", "--quiet", "--no-deps", "--python", place / "bin/python", dist[0])
    for name in required("mocokit", set()):
        home = distribution(name)
        tops = {Path(file).parts[0] for file in home.files or ()}
        for top in tops - {"..", "__pycache__"}:
            if not (site / top).exists() and not top.endswith(".pth"):
                (site / top).symlink_to(Path(home.locate_file(top)).resolve())
    return place


@pytest.fixture(scope="module")
def call(installed, tmp_path_factory):
    """Runs a program of the fresh environment in an empty folder."""
    home = tmp_path_factory.mktemp("home")
    variables = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    return lambda name, *words: run(installed / "bin" / name, *words, cwd=home, env=variables)


def test_the_wheel_runs_without_extras(call, installed):
    script = "import mocokit, importlib.util as u; print(mocokit.__file__, u.find_spec('pyarrow'))"
    home, extra = call("python", "-c", script).split()
    assert Path(home).is_relative_to(installed) and extra == "None"
    assert call("mocokit", "--version").startswith(f"mocokit {mocokit.__version__}\nPython ")
    assert "mocov2_cifar10" in call("mocokit", "recipes")
    words = ["--epochs", "1", "--out", "run", "--device", "cpu", "--set", "engine.threads=1"]
    call("mocokit", "pretrain", "demo", *words)
    script = "import mocokit, torch; print(mocokit.load('run')(torch.zeros(2, 3, 32, 32)).shape)"
    assert call("python", "-c", script).strip() == "torch.Size([2, 64])"
