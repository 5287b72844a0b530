"""What documents and `--help` promise: each command is one, each claim has the test that runs it.

A claim without a test must say in its own paragraph that it was not run. Of `--help`, each clause
of each option, argument and verb is a claim.
"""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import typer.main

import mocokit
from mocokit.cli import app
from mocokit.settings import fields
from mocokit.settings.schema import Settings

ROOT = Path(__file__).resolve().parents[1]
ADDING = [f"docs/adding/{path.name}" for path in sorted((ROOT / "docs/adding").glob("*.md"))]
PAGES = ["README.md", "docs/guide.md", "docs/scale.md", *ADDING]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}

LINES = (ROOT / "tests/data/claims.txt").read_text(encoding="utf-8").splitlines()
CLAIMS = [line.split(" | ") for line in LINES if not line.startswith("#")]


COMMAND = typer.main.get_command(app.app)
WAYS = {f"evaluate {name}": way for name, way in COMMAND.commands["evaluate"].commands.items()}
COMMANDS = {"mocokit": COMMAND, **COMMAND.commands, **WAYS}
# The name of a setting, and no more than that: tests/test_wires.py sees each of them arrive.
PLAIN = {
    f"help: {verb} {option}"
    for verb in ("pretrain", "slurm")
    for option in ("--epochs", "--batch-size", "--seed")
}


def flat(text):
    return " ".join(text.split())


def help_texts():
    """What `--help` says of each verb, "help: pack", and parameter, "help: pack --raw"."""
    for name, verb in COMMANDS.items():
        yield f"help: {name}", verb.help
        for parameter in verb.params:
            if not getattr(parameter, "hidden", False):
                word = next((o for o in parameter.opts if o.startswith("--")), parameter.name)
                yield f"help: {name} {word}", parameter.help


HELP = dict(help_texts())


def named(pages):
    """The pages that a row names: `help: evaluate knn,linear --size` is two."""
    return [" ".join(words) for words in product(*(word.split(",") for word in pages.split()))]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim[1][:60])
def test_a_claim_has_a_test_or_says_that_it_was_not_run(claim):
    pages, words, where = claim
    for page in named(pages):
        paragraphs = [flat(part) for part in (TEXTS | HELP)[page].split("\n\n")]
        found = [part for part in paragraphs if words in part]
        assert found, f"{page} no longer says {words!r}: mend this table"
        if where == "UNRUN":
            assert re.search(r"\bnot (yet )?run|Nothing here was run", found[0])
    if where == "UNRUN":
        return
    file, name = where.split()
    assert f"def test_{name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), where


@pytest.mark.parametrize("page", sorted(HELP.keys() - PLAIN))
def test_every_clause_of_a_help_text_is_a_claim(page):
    claimed = [words for pages, words, _ in CLAIMS if page in named(pages)]
    for clause in re.split(r"; |\. |\.?\n\n|\.$", HELP[page]):
        clause = flat(clause)
        if clause != "repeatable":
            assert any(words in clause or clause in words for words in claimed), clause


def test_what_may_be_repeated_says_so():
    for name, verb in COMMANDS.items():
        for parameter in verb.params:
            said = "repeatable" in (getattr(parameter, "help", "") or "")
            assert said == getattr(parameter, "multiple", False), f"{name} {parameter.name}"


def commands():
    """Every command of mocokit in the documents, on a line of its own or between backquotes."""
    for page, text in TEXTS.items():
        lines = re.findall(r"^(?: {4})?(mocokit (?:[a-z].*))$", text, re.M)
        lines += map(flat, re.findall(r"`(mocokit [a-z][^`]*)`", text))
        for line in lines:
            words = shlex.split(line.split("  #")[0].split(" > ")[0].replace("...", ""))
            if words[1:2] and (words[1] in VERBS or "--" in line):
                yield pytest.param(words, id=f"{page}: {' '.join(words)[:70]}")


VERBS = {"pretrain", "check", "pack", "slurm", "recipes", "evaluate"}


def test_the_verbs_are_all_here():
    assert {*COMMAND.commands} == VERBS
    assert {*WAYS} == {f"evaluate {way}" for way in ("knn", "linear", "finetune", "voc")}
    assert len([*commands()]) >= 40


@pytest.mark.parametrize("words", [*commands()])
def test_a_command_is_one(words):
    """Its verb, its options and their values are taken, and its settings exist."""
    verb, rest = COMMAND.commands[words[1]], words[2:]
    if words[1] == "evaluate" and rest:
        verb, rest = verb.commands[rest[0]], rest[1:]
        context = verb.make_context("mocokit", [*rest] or ["run"], resilient_parsing=True)
    else:
        context = verb.make_context("mocokit", [*rest], resilient_parsing=True)
    assert not context.args
    for option in (word for word in rest if word.startswith("--")):
        assert any(option in parameter.opts for parameter in verb.params), option


def test_every_option_of_the_guide_is_one():
    options = [parameter for verb in COMMANDS.values() for parameter in verb.params]
    known = {text for option in options for text in (*option.opts, *option.secondary_opts)}
    for page, text in TEXTS.items():
        for option in re.findall(r"`(--[a-z][a-z-]+)", text):
            assert option in known | {"--max-restarts", "--only"}, f"{page}: {option}"


def test_every_setting_that_is_named_is_one():
    known = {path for path, _ in fields(Settings())}
    sections = {path.split(".")[0] for path in known if "." in path}
    methods = {"method.margin", "method.hidden", "method.chunk", "method.batch_norm"}
    for page, text in TEXTS.items():
        for path in re.findall(r"`(?:--set )?'?([a-z]+\.[a-z_]+)", text):
            if path.split(".")[0] in sections and not path.endswith((".png", ".py")):
                assert path in known | methods, f"{page}: {path}"


def test_the_python_of_the_guide_names_what_there_is():
    for page, text in TEXTS.items():
        for name in re.findall(r"\bmocokit\.([a-z_]+)\(", text):
            assert callable(getattr(mocokit, name)), f"{page}: {name}"


def test_the_exit_codes_of_the_guide_are_those_of_the_errors():
    from mocokit import errors
    from mocokit.engine.stop import BY_HAND, PREEMPTED

    table = TEXTS["docs/guide.md"].split("## Exit codes")[1].split("##")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    raised = {errors.MocokitError.exit_code, errors.UserError.exit_code, PREEMPTED, BY_HAND}
    assert codes == {0} | raised
