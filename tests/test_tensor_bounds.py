"""Each bound on files of tensors is said by itself: another that would refuse them too hides it."""

import io
import json
import os
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save as save_safe
from test_tensors import OLD, archive, header, nested, one, torch_archive

from mocokit.engine import tensors
from mocokit.errors import UserError
from mocokit.weights.stored import read_stored

SMALL = 1000  # bytes of structure and values, here


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tensors, "STRUCTURE", SMALL)
    monkeypatch.setattr(tensors, "MOST", SMALL)
    monkeypatch.setattr(tensors, "ENTRIES", SMALL)


def entries_that_share():
    """Two names of the same bytes."""
    buffer = io.BytesIO(torch_archive(b"\x80\x02N.", bytes(5 * SMALL)))
    with zipfile.ZipFile(buffer, "a") as file:
        again = file.getinfo("a/data/0")
        for name in "ab":
            other = zipfile.ZipInfo(f"a/data/{name}")
            other.header_offset, other.file_size = again.header_offset, again.file_size
            other.compress_size, other.CRC = again.compress_size, again.CRC
            file.filelist.append(other)
        file._didModify = True
    return buffer.getvalue()


def large(claimed=None, decoy=False):
    """An archive of 30 entries, or of 3, with an end in 64 bits as in files above 4 GiB."""
    names = [f"a/{'x' * 40}{number}" for number in range(30 if claimed or decoy else 3)]
    content = archive({"a/data.pkl": b"\x80\x02N.", "a/version": "3", **dict.fromkeys(names, b"")})
    plain, end = content[:-22], list(struct.unpack("<4s4H2LH", content[-22:]))
    count, length, first = end[4:7]

    def record(length, first):
        return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, first)

    if decoy:  # before the list, with a small length in it
        plain = plain[:first] + record(50, first) + plain[first:]
    place = first if decoy else len(plain)
    plain += record(length, first + 56 * decoy)
    end[5] = 2**32 - 1 if claimed is None else claimed
    return plain + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1) + struct.pack("<4s4H2LH", *end)


TORCH = {
    "entries": (
        lambda: archive({
            "a/data.pkl": b"\x80\x02N.", **dict.fromkeys([f"{n:081}" for n in range(9)], b""),
        }),
        "its list of entries takes 1,199 bytes",
    ),
    "entries in 64 bits": (lambda: large(50), "its list of entries takes 2,"),
    "entries elsewhere": (lambda: large(decoy=True), "its end in 64 bits lies elsewhere"),
    "compressed": (
        lambda: torch_archive(b"\x80\x02N.", bytes(9 * SMALL), zipfile.ZIP_DEFLATED),
        "it is compressed",
    ),
    "shared": (entries_that_share, "its entries are larger than the file"),
    "structure": (
        lambda: torch_archive(b"\x80\x02]" + b"K\1a" * SMALL + b"."), "its structure takes over",
    ),
    "other structure": (
        lambda: archive({
            "a/data.pkl": b"\x80\x02N.", "a/version": "3", "a/constants.pkl": bytes(2 * SMALL),
        }),
        "its structure takes over",
    ),
    "old structure": (
        lambda: OLD + b"\x80\x02]" + b"K\1a" * SMALL + b".", "its structure takes over",
    ),
    "cut": (lambda: torch_archive(b"\x80\x02N.")[:-9], "its end is missing"),
}  # fmt: skip
SAFE = {
    "longer than what follows": (
        lambda: header(one(), bytes(8), len(json.dumps(one())) + 12),
        "its header is cut short",
    ),
    "too long": (lambda: header(b"{" + b" " * SMALL + b"}"), "its header takes 1,002 bytes"),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_file_of_torch_is_refused_for_its_own_reason(tmp_path, name):
    make, sentence = TORCH[name]
    (tmp_path / "x").write_bytes(make())
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=sentence):
        tensors.from_torch(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_archive_with_an_end_in_64_bits_is_read(tmp_path):
    (tmp_path / "x").write_bytes(large())
    assert tensors.from_torch(tmp_path / "x") is None


@pytest.mark.parametrize("name", SAFE)
def test_a_safetensors_file_is_refused_for_its_own_reason(tmp_path, name):
    make, sentence = SAFE[name]
    (tmp_path / "x").write_bytes(make())
    with pytest.raises(UserError, match=sentence):
        tensors.from_safetensors(tmp_path / "x")


class Other(torch.Tensor):
    pass


TREES = {
    "deep": (lambda: nested(60, lambda x: [x]), "nested over 50 deep"),
    "wide": (lambda: [0] * (SMALL + 1), "holds over 1,000 values"),
    "wide at every level": (lambda: nested(30, lambda x: [*[0] * 60, x]), "over 1,000 values"),
    "keys": (lambda: [{"x" * 10**5: 0}] * 20, "far larger than the file"),
    "texts": (lambda: ["x" * 10**5] * 20, "far larger than the file"),
    "tensors": (lambda: torch.zeros(1).expand(10**6), "far larger than the file"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "another kind of numbers"),
    "negative": (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "another kind of num"),
    "subclass": (lambda: torch.zeros(2).as_subclass(Other), "a tensor of another class, Other"),
    "long int": (lambda: 1 << 4096, "a value of another kind, int"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_refused_for_its_own_reason(name):
    make, sentence = TREES[name]
    with pytest.raises(tensors._Refused, match=sentence):
        tensors._check_plain(make(), SMALL)
    tensors._check_plain([{"a": [None, 1.5, 1 << 4095, (b"x", "y")]}, torch.ones(3)], SMALL)


@pytest.mark.parametrize("first", [0x80, 0x50])
def test_a_headers_length_may_begin_as_a_pickle_or_an_archive_does(tmp_path, first):
    """One safetensors file in 32, by how its header is padded."""
    written = save_safe({"x": torch.arange(3.0)})
    length = int.from_bytes(written[:8], "little")
    text = written[8 : 8 + length]
    text += b" " * ((first - length) % 256)
    (tmp_path / "x").write_bytes(header(text, written[8 + length :]))
    assert len(text) % 256 == first and tensors.is_safe(tmp_path / "x")
    metadata, found = tensors.from_safetensors(tmp_path / "x")
    assert metadata == {} and found["x"].tolist() == [0, 1, 2]


HEADS = {  # the first bytes, and how many more there are; whether the file is of safetensors
    "empty": (b"", 0, False),
    "length alone": (b"\x40" + bytes(7), 0, False),
    "no header": (b"\x40" + bytes(7) + b"[", 99, False),
    "whole": (b"\x40" + bytes(7) + b"{", 99, True),
    "cut": (b"\x40" + bytes(7) + b"{", 9, True),
    "cut after a byte": (b"\x40" + bytes(7) + b"{", 0, True),
    "archive": (b"PK\x03\x04" + bytes(4) + b"{", 99, False),
    "pickle": (b"\x80\x02}q\x00X\x01\x00{", 99, False),
    "length as an archive begins": (b"PK" + bytes(6) + b"{", 0x4B50, True),
    "length as a pickle begins": (b"\x80\x02" + bytes(6) + b"{", 0x280, True),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_file_is_of_safetensors_by_its_first_bytes(tmp_path, name):
    head, more, expected = HEADS[name]
    (tmp_path / "x").write_bytes(head + bytes(more))
    assert tensors.is_safe(tmp_path / "x") is expected


@pytest.mark.parametrize("left", [9, 40, -1])
def test_a_cut_file_is_refused_as_what_it_is(tmp_path, left):
    """A download that broke off, whichever reader it needs."""
    safe = save_safe({"x": torch.arange(99.0)})
    old = io.BytesIO()
    torch.save({"x": torch.arange(99.0)}, old, _use_new_zipfile_serialization=False)
    new = torch_archive(b"\x80\x02N.")
    reasons = "its header is cut short", "its end is missing", "cannot be read as tensors"
    for content, said in zip((safe, new, old.getvalue()), reasons, strict=True):
        (tmp_path / "x").write_bytes(content[:left])
        with pytest.raises(UserError) as refused:
            read_stored(tmp_path / "x")
        assert said in str(refused.value) or left == -1, content[:9]
        assert "begins as no file" not in str(refused.value)


def test_what_is_no_file_is_closed_again(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is no file"):
            tensors.is_safe(path)
    assert len(os.listdir("/proc/self/fd")) == before
