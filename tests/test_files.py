"""Files are written whole or not at all; locks; the cache folder; memory that is kept."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st

from mocokit import files, recipes
from mocokit.data.index import text_array, write_arrays
from mocokit.engine import checkpoint
from mocokit.engine.folder import RunFolder
from mocokit.engine.record import Metrics
from mocokit.errors import MocokitError, UserError
from mocokit.files import (
    append_line,
    cache_folder,
    json_lines,
    locked,
    partial_of,
    printable,
    read_regular,
    whole,
    write_text,
    writing,
)
from mocokit.nets.backbones import build_backbone
from mocokit.weights.write import write_backbone

SCRIPT = """
import resource, torch
from mocokit.files import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a, b = (torch.empty(size).fill_(0.0) for size in (300_000, 700_000))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_pages_are_taken_once():
    """20 times 4 MB are 20,000 pages of 4 KiB; left to itself glibc takes 5,396 of them anew."""
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 1000


def write_npz(path):
    write_arrays(path, {"a": text_array("x")}, compressed=True)


def save_checkpoint(path):
    checkpoint.save(path.parent, 1, {"x": torch.ones(2)}).rename(path)


WRITERS = {
    "text": lambda path: write_text(path, "x"),
    "npz": write_npz,
    "checkpoint": save_checkpoint,
    "backbone": lambda path: write_backbone(path, build_backbone("resnet_tiny"), recipes.demo()),
    "metrics": lambda path: Metrics(path).close(),
    "config": lambda path: (
        RunFolder(path.parent / "run").create(recipes.demo(), {}),
        (path.parent / "run/config.yaml").rename(path),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_follows_the_umask(tmp_path, name, mask):
    """safetensors' own writer makes files that their owner alone may read."""
    before = os.umask(mask)
    try:
        WRITERS[name](tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("sole", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, sole, error):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(error), whole(path, sole_writer=sole) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"  # until all is there
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_the_content_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("sync") or sync(file))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    for name in ("npz", "checkpoint"):
        calls.clear()
        WRITERS[name](tmp_path / name)
        assert calls[:2] == ["sync", "replace"], name
    calls.clear()
    write_text(tmp_path / "text", "x")
    assert calls == ["replace"]


def test_a_sole_writer_overwrites_what_a_kill_left(tmp_path):
    path = tmp_path / "file"
    partial_of(path).write_text("a piece")
    write_text(path, "x", sole_writer=True)
    assert path.read_text() == "x" and os.listdir(tmp_path) == ["file"]


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path, go = tmp_path / "file", threading.Barrier(4)
    texts = [letter * 300_000 for letter in "abcd"]

    def write(text):
        go.wait()
        for _ in range(20):
            write_text(path, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in texts
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and os.listdir(tmp_path) == ["file"]


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    script = "import sys, time; from pathlib import Path; from mocokit.files import locked\n"
    script += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pytest.fail("two have the lock")
        threading.Timer(0.3, other.kill).start()
        with locked(path):  # waits for the end of the other
            assert other.wait() != 0
    with locked(path, wait=False):
        pass


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("MOCOKIT_CACHE", "/one")
    assert cache_folder() == Path("/one")
    monkeypatch.setenv("MOCOKIT_CACHE", "~/own")
    assert cache_folder() == Path("/home/x/own")
    monkeypatch.delenv("MOCOKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/two/mocokit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().is_relative_to("/home/x") and cache_folder().name == "mocokit"


@pytest.mark.parametrize("stated", [None, "~/own"])
def test_without_a_home_the_cache_is_one_sentence(homeless, monkeypatch, stated):
    if stated:
        monkeypatch.setenv("MOCOKIT_CACHE", stated)
    with pytest.raises(UserError, match="no home folder .*; set MOCOKIT_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("MOCOKIT_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")


def test_strangers_text_is_one_line_without_control_characters():
    assert printable("a b ä 狗") == "a b ä 狗"
    assert printable("x\n\x1b[2J\x9b\udcff\u202e") == "x\\n\\x1b[2J\\x9b\\udcff\\u202e"
    assert files.show(Path("a\tb")) == "a\\tb"
    assert all(printable(chr(one)).isprintable() for one in np.r_[:1000, 0xD7F0:0xE010])


def test_a_refusal_to_write_is_one_sentence(tmp_path):
    with pytest.raises(MocokitError) as error, writing(tmp_path / "a\nb", room=5 * 2**20):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(error.value) == (
        f"cannot write {tmp_path}/a\\nb (No space left on device); it needs about 5 MiB; what was "
        "saved before is untouched: make room, or name another place"
    )
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("reason", "room"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True), (errno.EISDIR, False),
     (errno.EPERM, False), (errno.EEXIST, False), (errno.EROFS, False)],
)  # fmt: skip
def test_only_what_lacks_room_is_told_to_make_room(tmp_path, reason, room):
    with pytest.raises(MocokitError) as error, writing(tmp_path, room=1, remedy="make room, go on"):
        raise OSError(reason, os.strerror(reason))
    assert ("it needs about 1 MiB" in str(error.value)) == room
    assert str(error.value).endswith("make room, go on" if room else "put that right, go on")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_took_the_place_of_a_file_of_ours_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "log"
    make = {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/null"), "folder": os.mkdir}
    make[kind](path)

    def lock():
        with files.locked(path):
            pass

    taken = (lambda: append_line(path, "one"), lock, lambda: os.close(files.open_own(path)))
    for act in taken:
        with pytest.raises(OSError, match="Is a directory|neither a file nor a link to one"):
            act()


def test_a_line_is_appended_after_one_that_was_cut(tmp_path):
    path = tmp_path / "log"
    append_line(path, "one")
    append_line(path, "caf\udce9")
    path.write_bytes(path.read_bytes()[:-2])
    append_line(path, "three")
    assert path.read_bytes() == b"one\ncaf\nthree\n"


@given(
    st.lists(st.dictionaries(st.text(), st.integers() | st.text(), max_size=3), max_size=6),
    st.binary(max_size=30),
    st.integers(0, 6),
)
def test_a_damaged_line_costs_itself_alone(lines, junk, place):
    junk = junk.replace(b"\n", b"") or b"\xff"
    try:
        is_object = isinstance(json.loads(junk), dict)
    except ValueError:
        is_object = not junk.strip()
    assume(not is_object)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        raw = [json.dumps(line).encode() for line in lines]
        raw.insert(place, junk)
        path.write_bytes(b"\n".join(raw) + b"\n")
        assert json_lines(path) == (lines, 1)
        os.remove(path)
        assert json_lines(path) == ([], 0)


@pytest.mark.parametrize("junk", [b"[1]", b"3", b"null", b'"x"', b"[" * 10**5, b'{"a": 1'])
def test_a_line_that_is_no_object_is_damaged(tmp_path, junk):
    (tmp_path / "log").write_bytes(b'{"a": 1}\n' + junk + b'\n{"b": 2}\n')
    assert json_lines(tmp_path / "log") == ([{"a": 1}, {"b": 2}], 1)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert read_regular(tmp_path / "file", 3) == b"abc"
    for name, limit, why in [
        ("file", 2, "larger than 2 bytes"),
        ("pipe", 9, "neither a file"), ("zero", 9, "neither a file"),
        (".", 9, "Is a directory"), ("none", 9, "No such file"),
    ]:  # fmt: skip
        with pytest.raises(OSError, match=why):
            read_regular(tmp_path / name, limit)


def test_what_a_write_leaves_over_is_written_next(tmp_path, monkeypatch):
    """A pipe, a socket or a disk may take a part."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda number, content: write(number, content[:3]))
    with open(tmp_path / "file", "wb", buffering=0) as file:
        files._write_all(file.fileno(), b"all of it")
    assert (tmp_path / "file").read_bytes() == b"all of it"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_reads_the_very_same_bytes_of_a_word():
    texts = [
        "",
        "a b",
        "it's",
        "it's\n",
        "a\\b\n",
        "\udcff'",
        "$HOME `id`",
        "é\t'\\",
        "~",
        "-n\x1b",
    ]
    words = " ".join(map(files.shell_word, texts))
    assert words.isprintable()
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True
    )
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(text) for text in texts]
