"""Logs of a run that a crash, a disk or a stranger has damaged: a line costs at most itself."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st
from test_full_disk import left
from test_run_identity import images, run, stop, stopped, straight  # noqa: F401

from mocokit.engine.bad_images import BadImages
from mocokit.engine.folder import RunFolder
from mocokit.engine.record import Metrics, read_metrics, read_steps
from mocokit.errors import MocokitError, UserError
from mocokit.files import markdown, shell_word
from mocokit.run import readme

LINES = [json.dumps({"step": step, "loss": 1.5}).encode() for step in (1, 2, 3)]
DAMAGES = {
    "flipped byte": lambda line: b"\xff" + line[1:],
    "cut": lambda line: line[:7],
    "zeros": lambda line: bytes(len(line)),
    "list": lambda line: b"[1]",
    "number": lambda line: b"1",
    "no step": lambda line: b'{"loss": 1}',
    "step is text": lambda line: b'{"step": "1"}',
    "step is true": lambda line: b'{"step": true}',
    "step is not whole": lambda line: b'{"step": 1.5}',
    "huge number": lambda line: b'{"step": ' + b"9" * 5000 + b"}",
    "deep": lambda line: b"[" * 100_000,
    "separators": lambda line: "\x1c\u2028\x85".encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_hides_no_other(tmp_path, damage, place):
    path = tmp_path / "metrics.jsonl"
    lines = [DAMAGES[damage](line) if at == place else line for at, line in enumerate(LINES)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    found, damaged = read_steps(path)
    assert [line["step"] for line in found] == [n + 1 for n in range(3) if n != place]
    assert damaged == 1
    metrics = Metrics(path, 3)
    assert metrics.damaged == 1
    metrics.write({"step": 4})
    metrics.close()
    assert [line["step"] for line in read_metrics(path)][-1] == 4
    assert Metrics(path, 4).damaged == 0  # it was left out


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("finished", [False, True])
def test_finished_is_judged_by_the_lines_that_can_be_read(tmp_path, damage, finished):
    folder = RunFolder(tmp_path)
    result = json.dumps({"step": 3, "finished": True}).encode()
    last = [result, DAMAGES[damage](LINES[0])] if finished else [DAMAGES[damage](result)]
    folder.metrics.write_bytes(b"\n".join([*LINES, *last]) + b"\n")
    assert (folder.result() is not None) == finished


@pytest.mark.parametrize("gone", [1, 2, 3])
@pytest.mark.parametrize("half", [False, True], ids=["whole", "half-a-line"])
def test_lines_that_follow_a_deletion_are_kept(tmp_path, monkeypatch, gone, half):
    """Of this file alone, in a living run: it is there again, and holds no descriptor too many."""
    path, write = tmp_path / "metrics.jsonl", os.write
    metrics = Metrics(path)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(1, 5):
        if step == gone and half:  # the disk was full in the middle of the line before
            monkeypatch.setattr(os, "write", lambda *_: _full())
            with pytest.raises(MocokitError, match="No space left"):
                metrics.write({"step": 0})
            monkeypatch.setattr(os, "write", write)
        if step == gone:
            path.unlink()
        metrics.write({"step": step, "loss": 0.5 * step})
    found, damaged = read_steps(path)
    assert found == [{"step": step, "loss": 0.5 * step} for step in range(gone, 5)]
    assert damaged == 0 and len(os.listdir("/proc/self/fd")) == before
    metrics.close()


def _full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_damaged_log_does_not_block_a_run(stopped, straight, images, tmp_path, capsys):  # noqa: F811
    folder = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    lines = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"\xff\n" + lines + b'{"step": 1, "lo')
    (folder / "evaluations.jsonl").write_bytes(b'\xff\n{"kind": 3}\n[]\n')
    (folder / "bad_images.txt").write_bytes(b"\xff\xfe\n1\t'cut\n5\t'x'\tr\tstep 0\n")
    run(images, folder, save__every_steps=1)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "metrics.jsonl: 2 lines that nobody can read, left out" in told
    assert "bad_images.txt: 3 lines that nobody can read, left out" in told
    assert (
        "Damaged lines of evaluations.jsonl, left out here: 3."
        in (folder / "README.md").read_text()
    )
    assert left(folder) == straight


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_images.txt"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_log_that_is_no_file_is_a_sentence(stopped, images, tmp_path, name, kind):  # noqa: F811
    folder = Path(shutil.copytree(stopped, tmp_path / "run", symlinks=True))
    (folder / name).unlink(missing_ok=True)
    (os.mkdir if kind == "folder" else os.mkfifo)(folder / name)
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        run(images, folder)


def test_a_run_whose_metrics_cannot_be_read_is_no_unfinished_one(tmp_path):
    from mocokit import recipes
    from mocokit.engine.folder import unfinished

    for number in (1, 2):
        RunFolder(tmp_path / f"demo-00{number}").create(recipes.demo(), {})
    (tmp_path / "demo-002/metrics.jsonl").mkdir()
    assert [folder.path.name for folder in unfinished("demo", "demo", tmp_path)] == ["demo-001"]


# Reasons and names that would be lines, fields or control characters if they were not quoted.
FORGED = [
    "x\n7\t'b.jpg'\tbroken\tstep 1",
    "x\r7\t'b'\ty\tstep 1",
    "\t\tstep 1",
    "\u2028 7\t'b'\ty\tstep 1",
    "\x1b[2J\x07",
    "\u202egpj",
    "caf\udce9",
    "",
]


@pytest.mark.parametrize("text", FORGED)
@pytest.mark.parametrize("where", ["name", "reason"])
def test_strangers_forge_no_line(tmp_path, text, where):
    path = tmp_path / "bad_images.txt"
    bad = BadImages(path, 100, 0.5, 4)
    bad.note(((3, text if where == "name" else "a", text if where == "reason" else "b"),), 6)
    again = BadImages(path, 100, 0.5, 4)
    assert again.first == {3: 6} and again.damaged == 0
    written = path.read_text()
    assert written.count("\n") == 1 and written[:-1].replace("\t", "").isprintable()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 99), st.text(), st.text(), st.integers(0, 50))))
def test_any_failures_are_read_back(tmp_path_factory, failures):
    path = tmp_path_factory.mktemp("bad") / "bad_images.txt"
    bad = BadImages(path, 100, 1.0, 4)
    for number, name, reason, step in failures:
        bad.note(((number, name, reason),), step)
    assert BadImages(path, 100, 1.0, 4).first == bad.first
    with open(path, "ab") as file:
        file.write(b"\n7\t'cut sho")
    again = BadImages(path, 100, 1.0, 4)
    assert again.first == bad.first and again.damaged == 1
    again.note(((99, "z", "z"),), 60)
    assert 99 in BadImages(path, 100, 1.0, 4).first  # a new line was begun


def test_numbers_that_are_no_image_are_left_out(tmp_path):
    path = tmp_path / "bad_images.txt"
    many = b"9" * 5000
    path.write_bytes(
        b"100\t'a'\tr\tstep 1\n-1\t'a'\tr\tstep 1\n3\t'a'\tr\tstep 0\n3\t'a'\tr\tstep "
        + many
        + b"\n"
        b"" + many + b"\t'a'\tr\tstep 1\n4\t'a'\tr\tstep 5\n"
    )
    bad = BadImages(path, 100, 0.5, 4)
    assert bad.first == {4: 4} and bad.damaged == 5


NAMES = [
    "caf\udce9", "new\nline", "`tick`", "a|b", "# h", "<img src=x>", "[a](b)", "\u202eabc",
    "it's", "$HOME", "\\", "@user", "www.x.y", "**b**",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_run_folder_works(images, tmp_path, name, capsys):  # noqa: F811
    """Stopped, resumed and described under a name that is no word, no UTF-8, or markup."""
    out = tmp_path / name
    if name in NAMES[:2]:  # the others differ in what is shown alone
        stop(images, out, 0)
        run(images, out)
        text = (out / "README.md").read_text(encoding="utf-8")
        assert "Traceback" not in capsys.readouterr().err
    else:
        text = described(out)
    heading = text.splitlines()[0]
    assert heading == f"# {markdown(name)}" and heading.isprintable()
    commands = [line for line in text.splitlines() if line.startswith("mocokit pretrain")]
    again, going_on = [out / "config.yaml"], [out / "config.yaml", "--out", out]
    expected = [again] if name in NAMES[:2] else [going_on, again]  # of one that is finished
    for command, words in zip(commands, expected, strict=True):
        printing = command.replace("mocokit pretrain", r"printf '%s\0'")
        with os.popen(f"bash -c {shell_word(printing)}") as shown:
            assert shown.buffer.read().split(b"\0")[:-1] == [*map(os.fsencode, words)]


def test_an_empty_score_is_left_out_and_nothing_else_with_it(tmp_path):
    folder = RunFolder(tmp_path)
    scores = {"raw pixels": None, "ours": 0.125, "nothing right": 0.0, "all right": 1.0}
    for features in ([*scores], ["raw pixels"]):
        results = [{"features": name, "accuracy": scores[name], "k": 5} for name in features]
        readme.append(
            folder,
            {
                "kind": "knn", "data": "d", "date": "2026-01-01", "protocol": "p", "seconds": 1,
                "hardware": "h", "notes": [], "results": results,
            },
        )  # fmt: skip
    text = folder.readme.read_text()
    assert text.count("### knn on d") == 2 and "left out" not in text
    assert [line for line in text.splitlines() if "k 5" in line] == [
        r"| ours, k 5 | 12.5% |", r"| nothing right, k 5 | 0.0% |", r"| all right, k 5 | 100.0% |",
    ]  # fmt: skip


def described(out):
    out.mkdir()
    plain = SimpleNamespace(
        folder=RunFolder(out),
        settings=SimpleNamespace(
            recipe="demo", seed=0, train=SimpleNamespace(epochs=1, parent=None),
            views=SimpleNamespace(mean=(0,), std=(1,)),
        ),
        splits=SimpleNamespace(train=SimpleNamespace(__len__=None, name=out.name)),
        effect=SimpleNamespace(total_steps=1),
        parts=SimpleNamespace(method=SimpleNamespace(encoder=SimpleNamespace(num_features=1))),
    )  # fmt: skip
    plain.splits.train = Named(out.name)
    return readme.text(plain, {})


class Named(list):
    def __init__(self, name):
        super().__init__([0])
        self.name = name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("my_photos", "my_photos"),
        ("_a_ b_", r"\_a\_ b\_"),
        ("a*b`c`", r"a\*b\`c\`"),
        ("<b>|#", r"\<b\>\|\#"),
        ("https://x.y", r"https\://x.y"),
        ("www.x.y", r"www\.x.y"),
        ("&lt;", r"\&lt;"),
        ("a\nb\x1b\u202e", r"a\\nb\\x1b\\u202e"),
        ("$x$ @me ~~s~~", r"\$x\$ \@me \~\~s\~\~"),
    ],
)
def test_markdown_shows_a_text_as_it_is(text, shown):
    assert markdown(text) == shown


@given(st.text())
def test_markdown_is_one_printable_line(text):
    assert markdown(text).isprintable() or not markdown(text)


def test_an_evaluations_names_are_escaped(tmp_path):
    folder = RunFolder(tmp_path)
    record = {
        "kind": "knn", "data": "a|b\n# x", "date": "2026-01-01", "protocol": "p", "seconds": 1,
        "hardware": "h", "notes": ["<script>"], "table": [["class"], ["x|y\n"]],
    }  # fmt: skip
    folder.evaluations.write_bytes(b'{"kind": "cut')
    readme.append(folder, record)
    text = folder.readme.read_text()
    assert r"### knn on a\|b\\n\# x, 2026-01-01" in text and r"| x\|y\\n |" in text
    assert r"Note: \<script\>." in text and "left out here: 1." in text
