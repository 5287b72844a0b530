"""YAML and --set of strangers: one rule for scalars, bounds, and a sentence for all else."""

import math
import os
import time

import pytest
import yaml
from hypothesis import example, given, settings as hypothesis_settings, strategies as st

from mocokit import settings
from mocokit.errors import UserError
from mocokit.settings import reading
from mocokit.settings.schema import Settings

NULLS = ["", "~", "null", "Null", "NULL", "None", "  "]
TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
NUMBERS = {
    "0": 0, "-0": 0, "+3": 3, "-17": -17, "10": 10, "007.5": "007.5", "1e-3": 1e-3, "1E5": 1e5,
    "1e+16": 1e16, ".5": 0.5, "-.5": -0.5, "5.": 5.0, "5.e3": 5e3, "0.1": 0.1, "0e0": 0.0,
    "1" * 400: int("1" * 400), "1" * 401: "1" * 401, "1e9999999999": "1e9999999999",
}  # fmt: skip
TEXTS = [
    "010", "0x10", "0o17", "0b1", "1_000", "1:30", "1:30:00", "yes", "Yes", "no", "on", "off", "y",
    "n", "2024-01-01", "2024-01-01 10:00:00", "1e", "e5", ".", "-", "+", "1.2.3", "1,5", "0,5",
    "1 000", "٣", "\uff11", "nan", "inf", "none", "<<", "=", "!!float 1", "*a", "&a 1", "# 1",
    "a: b", "C:\\x: y # z", "- 1", "|", "%", "@x", "`", "1e5x", "True ish", "null!", "Infinity",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, None) for text in NULLS),
        *TRUTHS.items(),
        *NUMBERS.items(),
        *((text, text) for text in TEXTS),
    ],
)
def test_a_value_of_set_is_read_by_one_rule(text, value):
    found = settings.parse_assignments([f"a.b={text}"])["a.b"]
    assert (type(found), found) == (type(value), value)


PLAIN = [t for t in [*NULLS, *TRUTHS, *NUMBERS, *TEXTS] if t.strip() and t[0] not in "!*&#|%@`-"]


@pytest.mark.parametrize("text", [*PLAIN, "-17", "-.5", "-"])
def test_a_file_is_read_by_the_same_rule(text):
    if ": " in text or text == "-":  # YAML's own signs
        text = f"'{text}'"
    expected = settings.parse_assignments([f"a={text}"])["a"]
    assert reading.from_text(f"a: {text}", "x.yaml") == {"a": expected}
    quoted = text.strip("'").replace("'", "''")
    assert reading.from_text(f"a: '{quoted}'", "x.yaml") == {"a": text.strip("'")}


@given(st.floats() | st.integers(-(10**300), 10**300))
@example(1e-7)
@example(1e22)
def test_every_number_that_python_writes_is_read_back(number):
    found = reading.scalar(repr(number)) if math.isfinite(number) else number
    assert type(found) is type(number)
    assert found == number or math.isnan(number)
    if math.isfinite(number):
        assert reading.from_text(yaml.safe_dump({"a": number}), "x")["a"] == number
        assert reading.from_text(reading.to_text({"a": number}), "x")["a"] == number


leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(TEXTS)
trees = st.recursive(
    leaves | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(texts, trees, max_size=4))
@example({"a": ["1e5", "None", "0o17", "010", "yes", "1:30", ".5", "~", ""]})
def test_what_is_written_is_read_back(tree):
    assert reading.from_text(reading.to_text(tree), "x") == tree
    assert yaml.safe_load(reading.to_text(tree)) == tree  # by other readers too


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optim.lr=true", "optim.lr = true: must be a number, and this is true or false"),
        ("optim.lr='0.1'", r"optim.lr = '0.1': must be a number, .* without quotes"),
        ("seed=010", "seed = '010': must be a number, and this is text"),
        ("seed=true", "seed = true: must be a number"),
        ("seed=1_000", "seed = '1_000': must be a number"),
        ("seed=0x10", "seed = '0x10'"),
        ("seed=1:30", "seed = '1:30'"),
        ("train.epochs=2024-01-01", "train.epochs = '2024-01-01'"),
        ("train.micro_batch=true", "train.micro_batch = true: must be a number"),
        ("method.symmetric=yes", "symmetric = 'yes': must be true or false.* write true or false"),
        ("method.symmetric=on", "symmetric = 'on': must be true or false"),
        ("method.symmetric=1", "symmetric = 1: must be true or false, and this is a number"),
        ("engine.compile=1", "engine.compile = 1: must be true or false"),
        ("optim.first_epoch=true", "first_epoch = true: must be a number"),
        ("views.crop_area=[0.5, true]", r"crop_area = \[0.5, True\]: must be a number"),
        ("views.blur_probability=true", "blur_probability = true: must be a number"),
        ("method.groups=true", "method.groups = true: must be a number"),
        ("data.path=2024", 'data.path = 2024: must be text; put it into quotes, as in "2024"'),
        ("optim.lr=.nan", "optim.lr = nan: input should be a finite number"),
        ("optim.lr=1e999", "optim.lr = inf: input should be a finite number"),
        ("optim.lr=nan", "optim.lr = 'nan'"),
        ("seed={a: 1}", r"seed = \{'a': 1\}: input should be a valid integer"),
    ],
)
def test_a_value_of_another_kind_is_refused(assignment, sentence):
    with pytest.raises(UserError, match=sentence):
        settings.replace(Settings(), settings.parse_assignments([assignment]))


def test_a_value_keeps_its_kind_in_python_too():
    for path, value in {
        "optim.lr": True, "seed": "3", "method.symmetric": "true", "views.crop_area": (0.2, True),
        "views.crop_ratio": ["0.5", 1.0], "views.mean": (0.5, 0.5, "0.5"), "optim.drops": (True,),
    }.items():  # fmt: skip
        with pytest.raises(UserError, match="must be"):
            settings.replace(Settings(), {path: value})
    ours = settings.replace(Settings(), {"optim.lr": 1, "train.epochs": 1e3})
    assert type(ours.optim.lr) is float and type(ours.train.epochs) is int


def _laughs(levels, leaf="lol", anchor="a"):
    lines = [f"zz:\n - &{anchor}0 [{','.join([leaf] * 10)}]\n"]
    for level in range(1, levels):
        lines.append(f" - &{anchor}{level} [{','.join([f'*{anchor}{level - 1}'] * 10)}]\n")
    return "".join(lines) + f"optim: {{lr: *{anchor}{levels - 1}}}\n"


BOMBS = {
    "laughs 4": _laughs(4),
    "laughs 9": _laughs(9),
    "laughs of long texts": _laughs(3, leaf="x" * 5000),
    "laughs of maps": _laughs(9, leaf="{a: 1}"),
    "holds itself": "a: &x [*x]",
    "holds itself in a map": "&x {a: *x}",
    "anchor of a key": "&k a: 1\n*k : 2",
    "key is a list": "[a, b]: 1",
    "key is a map": "{a: 1}: 1",
    "merge": "a: &a {lr: 1}\noptim:\n  <<: *a",
    "deep flow": "[" * 100_000,
    "deep closed flow": "a: " + "[" * 900 + "]" * 900,
    "deep maps": "{a: " * 50_000,
    "deep block": "".join(" " * n + "a:\n" for n in range(500)),
    "deep dashes": "- " * 100_000 + "a",
    "many values": "a: [" + "1," * 120_000 + "1]",
    "many keys": "".join(f"k{n}: 1\n" for n in range(25_000)),
    "many documents": "--- a\n" * 40_000,
    "long text": "a: " + "x" * (reading.LARGEST - 10),
    "long key": "x" * 1000 + ": 1",
    "longer than all": "a: " + "x" * reading.LARGEST,
    "long quoted": 'a: "' + "\\x41" * 60_000 + '"',
    "long comment": "#" * (reading.LARGEST - 1),
    "empty lines": "\n" * (reading.LARGEST - 1),
    "long number": "seed: " + "9" * 250_000,
    "long exponent": "optim: {lr: 1e" + "9" * 250_000 + "}",
    "digits and underscores": "seed: " + "1_" * 250_000,
    "sexagesimal": "seed: " + "59:" * 80_000 + "1",
    "binary": "a: !!binary AAAA",
    "python": "a: !!python/object/apply:os.system ['true']",
    "python name": "a: !!python/name:os.system",
    "own tag": "a: !" + "x" * 10_000 + " 1",
    "tag of the whole": "!!set {a, b}",
    "omap": "a: !!omap [b: 1]",
    "pairs": "a: !!pairs [b]",
    "float": 'a: !!float ""',
    "int": 'a: !!int ""',
    "bool": "a: !!bool x",
    "timestamp": "a: !!timestamp x",
    "null": "a: !!null x",
    "map of a text": "a: !!map x",
    "str of a map": "a: !!str {}",
    "undefined alias": "a: *" + "b" * 100_000,
    "directive": "%YAML 9.9\n---\na: 1",
    "long directive": "%YAML 1." + "1" * 10_000 + "\n---\na: 1",
    "strange directive": "%" + "\u202e" * 100 + " x\n---\na: 1",
    "tag directive": "%TAG !e! tag:x,2000:\n---\na: !e!b 1",
    "wide escape": 'a: "\\UFFFFFFFF"',
    "surrogate": 'a: "\\ud800"',
    "control": "a: \x07",
    "escaped control": '"\\e]0;owned\\a\\e[2J": 1',
    "nul": "a\0b",
    "tab": "a:\t\tb\n\tc: 1",
    "twice": "seed: 1\nseed: 2",
    "twice inside": "optim: {lr: 1, lr: 2}",
    "unclosed": "a: [1, 2",
    "unclosed quote": "a: '",
    "colon colon": "a: b: c",
    "two roots": "a: 1\n- b",
    "a list": "- a",
    "a text": "hello",
    "nothing": "",
    "a number": "3",
    "escapes in a text": 'data: {path: 3, "\\e[2J": 1}',
    "date key": "2024-01-01: 1",
    "null key": "~: 1",
    "number key": "optim: {1: 2}",
    "section is a list": "optim: [1]",
    "section is a text": "method: moco",
    "method of a list": "method: {name: [moco]}",
    "method of a long name": "method: {name: " + "x" * 9999 + "}",
    "recipe": 'recipe: "\\e[2J"',
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_text_makes_more_than_a_sentence(tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_text(BOMBS[name], encoding="utf-8", errors="surrogatepass")
    for read in (
        lambda: settings.load(path),
        lambda: settings.stated_in(path),
        lambda: settings.from_yaml(BOMBS[name], "inside.pt"),
    ):
        start = time.process_time()
        with pytest.raises(UserError) as caught:
            read()
        text = str(caught.value)
        assert text.isprintable() and len(text) < 400 + len(str(path))
        assert "mine.yaml" in text or "inside.pt" in text
        assert time.process_time() - start < 5


@pytest.mark.parametrize("name", BOMBS)
def test_no_value_of_set_makes_more_than_a_sentence(name):
    for value in (BOMBS[name], f"[{BOMBS[name]}]", f"{{a: {BOMBS[name]}}}"):
        with pytest.raises(UserError) as caught:
            settings.replace(Settings(), settings.parse_assignments([f"optim.name={value}"]))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("laughs 9", "holds over 20,000 values"),
        ("laughs of maps", "holds over 20,000 values"),
        ("many values", "holds over 20,000 values"),
        ("many keys", "holds over 20,000 values"),
        ("deep flow", "is nested over 16 deep"),
        ("deep block", "is nested over 16 deep"),
        ("longer than all", "is no settings: it has 262,147 characters"),
        ("python", "has a tag, tag:yaml.org,2002:python/object/apply:os.system; write plain"),
        ("float", "has a tag, tag:yaml.org,2002:float; write plain values, without tags"),
        ("binary", "has a tag"),
        ("map of a text", "has a tag"),
        ("many documents", "holds several YAML documents; keep one"),
        ("twice inside", "states lr twice; keep one"),
        ("key is a list", "has a key that is no text"),
        ("holds itself", "repeats x, which is not stated before"),
    ],
)
def test_the_sentence_names_the_bound(name, sentence):
    with pytest.raises(UserError, match=sentence):
        reading.from_text(BOMBS[name], "mine.yaml")


def test_an_alias_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfviews: {crop_area: &a [0.5, 1.0], blur_sigma: *a}\n")
    assert settings.load(path).views.blur_sigma == (0.5, 1.0)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "a: ä".encode("latin-1"), os.urandom(5000)])
def test_what_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content + b"\xff")
    with pytest.raises(UserError, match="cannot read .*mine.yaml: it is not UTF-8 text"):
        settings.load(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    (tmp_path / "huge.yaml").touch()
    os.truncate(tmp_path / "huge.yaml", reading.LARGEST + 1)
    for name in ("pipe", "folder", "device", "huge", "missing"):
        with pytest.raises(UserError, match=f"cannot read .*{name}.yaml"):
            settings.load(tmp_path / f"{name}.yaml")
    with pytest.raises(UserError, match="larger than 0.25 MiB, refused"):
        settings.load(tmp_path / "huge.yaml")


@hypothesis_settings(max_examples=300)
@given(st.text(max_size=60) | st.text("a&*![]{}:,-\n ?|>'\"%@#\\<0e.~\t", max_size=60))
def test_any_text_is_settings_or_a_mistake(text):
    try:
        settings.from_yaml(text)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 400
