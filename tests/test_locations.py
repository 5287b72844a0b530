"""Texts that name images."""

import os

import pytest

from mocokit.data import locations
from mocokit.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{0..2}.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
        ("a-{008..011}", ["a-008", "a-009", "a-010", "a-011"]),
        ("a-{9..11}", ["a-9", "a-10", "a-11"]),
        ("{0..0}{98..101}", ["098", "099", "0100", "0101"]),
        ("{b,a}{0..1}", ["b0", "b1", "a0", "a1"]),
        ("{a,b{1..2}}", ["a", "b1", "b2"]),
        ("x{a}", ["xa"]),
        ("x{", ["x{"]),
    ],
)
def test_braces(pattern, texts):
    assert locations.expand(pattern) == texts


def test_braces_agree_with_a_shell():
    import shutil
    import subprocess

    if (bash := shutil.which("bash")) is None:
        pytest.skip("needs bash")
    patterns = ["s-{000..012}.tar", "{a,b}/{1..3}", "{a,{b,c}d}", "p{1..3}{x,y}q"]
    ends = ("0", "1", "7", "9", "10", "11", "99", "100", "101", "00", "07", "09", "007", "010")
    pairs = [(a, b) for a in ends for b in ends if int(a) <= int(b)]
    # Left out are zeros before one end of two lengths: of {01..100} the shell makes 001, ..., 100.
    plain = [end for end in ends if end == "0" or end[0] != "0"]
    alike = [(a, b) for a, b in pairs if len(a) == len(b) or (a in plain and b in plain)]
    patterns += [f"{{{a}..{b}}}" for a, b in alike]
    command = "\n".join(f"echo {pattern}" for pattern in patterns)
    said = subprocess.run([bash, "-c", command], capture_output=True, text=True, check=True)
    for pattern, line in zip(patterns, said.stdout.splitlines(), strict=True):
        assert locations.expand(pattern) == line.split(), pattern


@pytest.mark.parametrize("pattern", ["{3..1}", "{0..9999999}", "{0..9999}{0..9999}"])
def test_patterns_that_are_refused(pattern):
    with pytest.raises(UserError, match=r"no range of numbers|more than 1,000,000"):
        locations.expand(pattern)


def test_what_exists_comes_before_what_a_text_could_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "a::b", "{0..1}", "s*"):
        (tmp_path / name).mkdir()
        assert locations.split(name) == [name] and locations.exist(name)
        assert not locations.is_elsewhere(name)
        assert locations.absolute(name) == str(tmp_path / name)
    assert locations.is_elsewhere("cifar100") and locations.is_elsewhere("hub:owner/name")


def test_several_places_are_joined_by_two_colons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar", "b-0.tar", "b-1.tar"):
        (tmp_path / name).touch()
    text = "a.tar::b-{0..1}.tar::cifar10"
    assert locations.split(text) == ["a.tar", "b-0.tar", "b-1.tar", "cifar10"]
    assert locations.split("b-?.tar") == ["b-0.tar", "b-1.tar"]
    assert locations.exist(text) and not locations.exist("a.tar::gone")
    assert not locations.exist("x-{0..1}")
    there = os.path.realpath(tmp_path)
    assert locations.absolute(text) == f"{there}/a.tar::{there}/b-{{0..1}}.tar::cifar10"
    assert not locations.exist("") and not locations.exist("a\0b")
    assert not locations.exist("x" * 5000)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("in/a.tar", ["work/in/a.tar"]),
        ("../b.tar", ["b.tar"]),
        ("~", ["home"]),
        ("~/c", ["home/c"]),
        ("~/c-{9..11}", ["home/c-9", "home/c-10", "home/c-11"]),
        ("{~/c,~/d}", ["home/c", "home/d"]),
        ("{~,in}/c", ["home/c", "work/in/c"]),
        ("{../in,~/in}/{c,d}", ["in/c", "in/d", "home/in/c", "home/in/d"]),
        ("in/{c/../d,e}", ["work/in/d", "work/in/e"]),
        ("~/c::cifar10::{~/d,e}::hub:a/b", ["home/c", "=cifar10", "home/d", "work/e", "=hub:a/b"]),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_is_kept_in_the_settings_is_found_from_any_folder(
    tmp_path, monkeypatch, text, places, there
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home", "work", "other"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    wanted = [one[1:] if one[0] == "=" else str(tmp_path / one) for one in places]
    for one in filter(os.path.isabs, wanted if there else ()):
        os.makedirs(one, exist_ok=True)
    kept = locations.absolute(text)
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("HOME", str(tmp_path / "other"))  # another user's, who reads the settings
    assert locations.split(kept) == wanted and locations.absolute(kept) == kept


@pytest.mark.parametrize("text", ["a.tar::", "::a.tar", "a.tar::::b.tar"])
def test_nothing_beside_two_colons_is_told(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="nothing stands before or after a `::`"):
        locations.split(text)
    assert not locations.exist(text) and "nothing stands" in locations.lacking(text)
    with pytest.raises(UserError, match="without a name"):
        locations.split("")


def test_a_path_is_not_taken_for_a_misspelt_set():
    assert "cifar10" in locations.remedy("photos")
    assert "cifar10" not in locations.remedy("x/y-{0..3}.tar")
