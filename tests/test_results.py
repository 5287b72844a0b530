"""Files that a user asks for: nothing of the user's is lost, and a result is kept first."""

import errno
import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import mocokit
from mocokit import files
from mocokit.check import check
from mocokit.engine.folder import RunFolder
from mocokit.engine.record import Console
from mocokit.errors import MocokitError, UserError
from mocokit.evaluate import results
from mocokit.files import check_result, write_result
from mocokit.protocols.scores import Scores

OLD, NEW = b"ours, old", b"ours, new"


def write(path, content=NEW):
    write_result(path, content, "--json", lambda there: there.startswith(b"ours"))


def refused(path):
    """The sentence, which comes before the work and after it."""
    with pytest.raises(UserError) as before:
        check_result(path, "--json", lambda there: there.startswith(b"ours"))
    with pytest.raises(UserError) as after:
        write(path)
    assert str(before.value) == str(after.value)
    assert str(before.value).endswith("choose another place with --json")
    return str(before.value)


@pytest.mark.parametrize("there", [None, b"", OLD])
def test_a_new_file_and_one_of_ours_are_written_with_the_users_mode(tmp_path, there):
    place = tmp_path / "x.json"
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        if there is not None:
            place.write_bytes(there)
        before = os.umask(mask)
        try:
            write(place)
        finally:
            os.umask(before)
        assert place.read_bytes() == NEW and stat.S_IMODE(place.stat().st_mode) == mode
        place.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_is_refused(tmp_path):
    for content in (b"my only photo", b"{}", b"\0", b"our"):
        place = tmp_path / "mine"
        place.write_bytes(content)
        assert "another file, which would be lost" in refused(place)
        assert place.read_bytes() == content
    assert os.listdir(tmp_path) == ["mine"]


def test_links_stay_and_their_targets_are_written(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/real").write_bytes(OLD)
    (tmp_path / "link").symlink_to("in/real")
    (tmp_path / "in/two").symlink_to("../link")
    (tmp_path / "folder").symlink_to("in")
    for name in ("link", "in/two", "folder/two"):
        (tmp_path / "in/real").write_bytes(OLD)
        write(tmp_path / name)
        assert (tmp_path / "in/real").read_bytes() == NEW
        assert not (tmp_path / "in/real").is_symlink()
    (tmp_path / "in/real").write_bytes(b"mine")
    assert "would be lost" in refused(tmp_path / "in/two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "in/two").is_symlink()
    (tmp_path / "in/real").unlink()
    assert "a link to" in refused(tmp_path / "in/two") and "not exist" in refused(tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in refused(tmp_path / "loop")


def test_what_is_no_file_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "it is a folder" in refused(tmp_path)
    assert "there is no folder" in refused(tmp_path / "none/x")
    assert "there is no folder" in refused(tmp_path / "file/x")
    assert "null byte" in refused("a\0b") and "Bad file descriptor" in refused("/dev/fd/999")
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        assert "it is a socket" in refused("socket")
    reading = os.open("file", os.O_RDONLY)
    assert "read alone" in refused(f"/dev/fd/{reading}")
    os.close(reading)


@pytest.mark.parametrize("extra", [0, os.O_APPEND, os.O_NONBLOCK])
@pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_an_open_file_is_written_where_it_is_open_to_write(tmp_path, mode, extra):
    """A terminal's standard output is open to read too."""
    (tmp_path / "file").write_bytes(b"mine ")
    number = os.open(tmp_path / "file", mode | extra)
    names = [f"/dev/fd/{number}", f"/proc/self/fd/{number}", f"/proc/{os.getpid()}/fd/{number}"]
    try:
        if mode == os.O_RDONLY:
            for name in names:
                assert "it is open to be read alone" in refused(name)
        else:
            os.lseek(number, 0, os.SEEK_END)
            for name in names:
                check_result(name, "--json", lambda there: False)
                write(name)
    finally:
        os.close(number)
    times = 0 if mode == os.O_RDONLY else len(names)
    assert (tmp_path / "file").read_bytes() == b"mine " + times * NEW


def test_a_terminal_is_written_into(tmp_path):
    """As its device, as the open file that it is, and as what a link leads to."""
    import pty
    import tty

    reader, terminal = pty.openpty()
    try:
        tty.setraw(terminal)
        (tmp_path / "link").symlink_to(f"/dev/fd/{terminal}")
        for place in (f"/dev/fd/{terminal}", os.ttyname(terminal), tmp_path / "link"):
            write(place)
            assert os.read(reader, 100) == NEW
    finally:
        os.close(reader)
        os.close(terminal)


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="makes devices")
def test_devices_are_written_into_and_disks_are_not(tmp_path):
    for name, kind, number in (("null", stat.S_IFCHR, (1, 3)), ("full", stat.S_IFCHR, (1, 7))):
        try:
            os.mknod(tmp_path / name, kind | 0o666, os.makedev(*number))
        except PermissionError:
            pytest.skip("may not make devices")
    write(tmp_path / "null")
    (tmp_path / "link").symlink_to("null")
    write(tmp_path / "link")
    with pytest.raises(MocokitError, match="No space left on device"):
        write(tmp_path / "full")
    assert all(stat.S_ISCHR(os.stat(tmp_path / name).st_mode) for name in ("null", "full"))
    os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 200))
    assert "it is a disk" in refused(tmp_path / "disk")


def test_a_pipe_is_written_into_and_waits_a_little_for_its_reader(tmp_path, monkeypatch):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    monkeypatch.setattr(files, "_READER_SECONDS", 0.2)
    with pytest.raises(MocokitError, match="nobody reads it"):
        write(pipe)
    monkeypatch.setattr(files, "_READER_SECONDS", 30.0)
    large = b"ours" + bytes(2**20)  # more than a pipe holds
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    threading.Timer(0.3, reader.start).start()
    write(pipe, large)
    reader.join(30)
    assert found == [large] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("redirect", ["> out", ">> out", "| cat > out", "> out 2>&1"])
def test_standard_output_and_shell_pipes(tmp_path, redirect):
    """In the order in which it was printed, and nothing that was printed is overwritten."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = "from mocokit.files import write_result as w\nprint('before')\n"
    code += "for p in ('/dev/stdout', '/dev/fd/1', '/proc/self/fd/1', 'link'):\n"
    code += "    w(p, p.encode() + b'\\n', '--json', bool)\nprint('after')"
    (tmp_path / "x.py").write_text(code)
    subprocess.run(
        f"{sys.executable} x.py {redirect}", shell=True, cwd=tmp_path, check=True, timeout=60
    )
    said = (tmp_path / "out").read_text().split()
    assert said == ["before", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link", "after"]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_is_a_sentence_and_leaves_the_old_file(
    tmp_path, monkeypatch, reason
):
    def full(*words, **named):
        raise OSError(reason, os.strerror(reason))

    place = tmp_path / "x.json"
    place.write_bytes(OLD)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MocokitError, match=f"cannot write .*{os.strerror(reason)}.*--json"):
        write(place)
    assert place.read_bytes() == OLD and os.listdir(tmp_path) == ["x.json"]


def shown(counts, capsys, **asked):
    """What is printed of these counts, a line with single spaces each."""
    names = tuple(f"class{number}" for number in range(len(counts)))
    found = results.Result("ours", {}, Scores(counts), {})
    evaluation = results.Evaluation(
        kind="knn", run="r", data="d", protocol="p", results=(found,), classes=names, notes=(),
        weights="w", fingerprint="f", seconds=1.0, peak_memory_gib=0.1,
    )  # fmt: skip
    results.publish(
        evaluation, Console(), None, None, **{"per_class": False, "confusion": False} | asked
    )
    return "\n".join(" ".join(one.split()) for one in capsys.readouterr().err.splitlines())


def test_the_weakest_class_comes_first_and_one_without_images_last(capsys):
    """Of equals the first."""
    confusion = np.zeros((6, 6), int)
    confusion[0, 0], confusion[2, 2], confusion[2, 0] = 5, 3, 1
    confusion[3, 1], confusion[4, 4], confusion[4, 2], confusion[5, 5] = 2, 1, 3, 4
    text = shown(confusion, capsys, per_class=True)
    assert re.findall(r"class(\d) \W ?([\d.]+%|-) \W ?(\d+)", text) == [
        ("3", "0.0%", "2"), ("4", "25.0%", "4"), ("2", "75.0%", "4"), ("0", "100.0%", "5"),
        ("5", "100.0%", "4"), ("1", "-", "0"),
    ]  # fmt: skip


def test_of_many_classes_the_commonest_mistakes_are_shown(capsys):
    confusion = np.diag([50] * 21)
    confusion[3, 5], confusion[7, 2], confusion[4, 6] = 2, 9, 1
    text = shown(confusion, capsys, confusion=True)
    assert re.findall(r"class(\d+) taken for class(\d+)\D+(\d+)", text) == [
        ("7", "2", "9"), ("3", "5", "2"), ("4", "6", "1"),
    ]  # fmt: skip


RECORD = {
    "kind": "knn", "run": "r", "data": "caf\udce9/[x]", "protocol": "kNN", "results": [],
    "notes": ["\udcff"], "date": "2026-11-28", "seconds": 1.0, "hardware": "a CPU",
    "peak_memory_gib": 0.1, "versions": {"mocokit": "0.2"},
}  # fmt: skip


def test_a_path_that_is_no_utf8_is_kept_in_a_stated_form(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    results.keep(RECORD, Console(), folder, tmp_path / "x.json")
    results.keep(RECORD, Console(), folder, tmp_path / "x.json")  # an earlier result is replaced
    content = (tmp_path / "x.json").read_bytes().decode()
    assert json.loads(content)["data"] == "caf\\udce9/[x]"
    assert json.loads(content)["notes"] == ["\\udcff"] and "\\\\udce9" in content
    assert len(folder.evaluations.read_text().splitlines()) == 2
    assert "udce9" in folder.readme.read_text()
    results.keep(RECORD, Console(), folder, None)
    said = capsys.readouterr().err
    assert said.count("added to") == 3 and "no run folder keeps this" not in said
    results.keep(RECORD, Console(), None, None)
    assert "no run folder keeps this; --json FILE" in " ".join(capsys.readouterr().err.split())


def test_a_result_like_an_earlier_one_must_be_written_too(tmp_path, capsys, monkeypatch):
    folder = RunFolder(tmp_path)
    for name in ("first", "second"):
        results.keep(RECORD | {"data": name}, Console(), folder, None)
    monkeypatch.setattr(results.readme, "append", lambda *_: None)
    results.keep(RECORD | {"data": "first"}, Console(), folder, None)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("added to") == 2 and "does not hold what was written" in said


@pytest.mark.parametrize("damage", [b'{"kind": "kn', b"\xff\xfe\n", b"[1]\n", b"null\n", b"{{\n"])
def test_a_damaged_line_hides_nothing_that_follows(tmp_path, damage, capsys):
    """It costs itself, is told, and what is added later is there."""
    folder = RunFolder(tmp_path)
    results.keep(RECORD, Console(), folder, None)
    with open(folder.evaluations, "ab") as file:
        file.write(damage)
    for name in ("first", "second"):
        results.keep(RECORD | {"data": name}, Console(), folder, None)
    found, damaged = files.json_lines(folder.evaluations)
    assert [line["data"] for line in found] == ["caf\\udce9/[x]", "first", "second"]
    assert damaged == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("added to") == 3 and said.count("1 damaged line,") == 2


@pytest.mark.parametrize("how", ["folder", "vanished", "pipe", "full", "silent"])
def test_added_is_said_only_if_it_is_so(tmp_path, how, capsys, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    if how != "vanished":
        folder.path.mkdir()
    if how == "folder":
        folder.evaluations.mkdir()
    if how == "pipe":
        os.mkfifo(folder.evaluations)
    if how == "full":
        folder.evaluations.symlink_to("/dev/full")
    if how == "silent":  # a disk that says yes and keeps nothing
        monkeypatch.setattr("mocokit.run.readme.append", lambda *words: None)
    results.keep(RECORD, Console(), folder, tmp_path / "x.json")
    said = " ".join(capsys.readouterr().err.split())
    assert "added to" not in said and "cannot add this to" in said
    assert results.is_result((tmp_path / "x.json").read_bytes())


def test_the_run_keeps_what_the_copy_loses(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(MocokitError, match="No space left"):
        results.keep(RECORD, Console(), folder, "/dev/full")
    assert len(files.json_lines(folder.evaluations)[0]) == 1


def test_every_evaluation_asks_before_it_works(tmp_path, monkeypatch, toy_npz):
    mine = tmp_path / "mine.json"
    mine.write_text('{"my": "notes"}')

    def worked(*words, **named):
        raise AssertionError("the work began")

    for name in ("evaluate.session.open_model", "evaluate.voc.open_model"):
        monkeypatch.setattr(f"mocokit.{name}", worked)
    for evaluate in (
        mocokit.evaluate_knn,
        mocokit.evaluate_linear,
        mocokit.evaluate_finetune,
        mocokit.evaluate_voc,
    ):
        with pytest.raises(UserError, match="another file, which would be lost.*--json"):
            evaluate("random:resnet_tiny", toy_npz, json=mine)
    assert json.loads(mine.read_text()) == {"my": "notes"}


def test_check_replaces_its_own_sheet_alone(tmp_path, toy_npz, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("views.png", "wb") as file:
        Image.new("RGB", (4, 4)).save(file, "PNG")
    mine = (tmp_path / "views.png").read_bytes()
    with pytest.raises(UserError, match=r"views.png \(there is another file.*--out"):
        check("demo", toy_npz, quick=True)
    assert (tmp_path / "views.png").read_bytes() == mine
    (tmp_path / "views.png").unlink()
    for place in ("views.png", "x.jpg", "bare"):
        for _ in range(2):
            check("demo", toy_npz, out=place, quick=True)
    for place, kind in (("views.png", "PNG"), ("x.jpg", "JPEG"), ("bare", "PNG")):
        with Image.open(io.BytesIO((tmp_path / place).read_bytes())) as sheet:
            assert sheet.format == kind
    with pytest.raises(UserError, match="names no picture format"):
        check("demo", toy_npz, out="x.docx", quick=True)


def test_slurm_replaces_its_own_file_alone(tmp_path, mocokit, toy_npz):
    words = ["slurm", "demo", toy_npz, "--out", "run", "--gpus", "1", "--file", tmp_path / "job"]
    for _ in range(2):
        assert mocokit(*words)[0] == 0
    (tmp_path / "job").write_text("#!/bin/bash\n#SBATCH --time=1\necho mine\n")
    code, _, err = mocokit(*words)
    assert code == 2 and "would be lost" in err and "--file" in err
    assert "mine" in (tmp_path / "job").read_text()
