"""Every reader of images, whatever is done to its file: a sentence in time, or a bad image."""

import io
import json
import os
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from mocokit.data import npz
from mocokit.data.decode import BadImage, decode, look_at
from mocokit.data.index import load_index, save_index
from mocokit.data.open import open_data
from mocokit.data.sources.pack import HEAD, MAGIC, TRAILER, Head, write_pack
from mocokit.detection.annotations import BadAnnotation, read_xml
from mocokit.errors import UserError

SECONDS = 20  # a hang is minutes; a shared machine is slow


def png(number: int = 0, side: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number * 7 % 256, 90, 30)).save(file, "PNG")
    return file.getvalue()


def tar_of(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            for ending, content in (("png", png(number)), ("cls", b"%d" % (number % 2))):
                entry = tarfile.TarInfo(f"{'long/' * 25}{number}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def parquet_of(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"image": {"bytes": png(n), "path": None}, "label": n % 2, "text": f"class {n % 2}"}
        for n in range(6)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)


def npz_of(path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 3), np.uint8)
    np.savez_compressed(path, train_images=images, train_labels=np.arange(4))


def npy_of(path: Path) -> None:
    np.save(path, np.zeros((4, 3, 3, 3), np.uint8))


def folder_of(root: Path) -> Path:
    for number in range(4):
        place = root / f"train/{number % 2}/{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(number))
    (root / "train/0/bad.jpg").write_bytes(b"junk")
    return root


def pack_of(path: Path) -> None:
    folder = folder_of(path.parent / "in")
    write_pack(open_data(folder), path, 4, False, 1, lambda count: None)


def idx_of(path: Path) -> None:
    save_index(open_data(folder_of(path.parent / "in")).train.index(), path)


def list_of(path: Path) -> None:
    path.write_text("".join(f"in/train/{n % 2}/{n}.png\tclass {n % 2}\n" for n in range(4)))


def xml_of(path: Path) -> None:
    corner = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    thing = f"<object><name>cat</name><bndbox>{corner}</bndbox><difficult>0</difficult></object>"
    path.write_text(f"<annotation><size><width>9</width></size>{thing * 2}</annotation>")


def read_images(path: Path) -> None:
    for source in open_data(path):
        for number in range(0 if source is None else len(source)):
            assert source is not None and source.describe(number).isprintable()
            assert len(source.describe(number)) < 5000
            try:
                source.read(number, 3)
            except BadImage as error:
                assert str(error).isprintable() and 0 < len(str(error)) < 600, str(error)


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "a.tar": (tar_of, read_images),
    "a.parquet": (parquet_of, read_images),
    "a.npz": (npz_of, read_images),
    "a.npy": (npy_of, read_images),
    "a.pack": (pack_of, read_images),
    "a.txt": (list_of, read_images),
    "images.idx": (idx_of, load_index),
    "a.xml": (xml_of, read_xml),
}
PLACES = st.integers(0, 2**30)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
    st.tuples(st.just("cut"), PLACES, st.just(0)),
    st.tuples(st.just("drop"), PLACES, st.integers(1, 40)),
    st.tuples(st.just("put"), PLACES, st.binary(min_size=1, max_size=40)),
    st.tuples(
        st.just("write"),
        PLACES,
        st.sampled_from(
            [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"9" * 11, b"-1", b"7" * 7]
        ),
    ),
)


def damaged(content: bytes, how: str, place: int, what: Any) -> bytes:
    # Half of the places lie near the ends, where heads and directories are.
    size = max(1, len(content))
    at = (
        place % size
        if place % 2
        else (place // 2 % min(200, size)) * (-1 if place % 4 else 1) % size
    )
    if how == "flip":
        return content[:at] + bytes([content[at] ^ what]) + content[at + 1 :]
    if how == "cut":
        return content[:at]
    if how == "drop":
        return content[:at] + content[at + what :]
    return content[:at] + what + content[at + (len(what) if how == "write" else 0) :]


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=120, suppress_health_check=list(HealthCheck))
def test_any_damage_is_a_sentence_in_time(
    name: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    write, read = READERS[name]
    root = tmp_path_factory.getbasetemp() / f"bounds-{name}"
    if not root.exists():
        root.mkdir()
        folder_of(root / "in")
        write(root / name)
        (root / "whole").write_bytes((root / name).read_bytes())
        read(root / name)
    content = (root / "whole").read_bytes()
    for how, place, what in data.draw(st.lists(DAMAGE, min_size=1, max_size=3)):
        content = damaged(content, how, place, what) if content else content
    (root / name).write_bytes(content)
    began = time.monotonic()
    try:
        read(root / name)
    except (UserError, BadAnnotation) as error:
        assert str(error).isprintable() and len(str(error)) < 1500
    assert time.monotonic() - began < SECONDS


KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA", "DIB"]
KINDS += ["PCX", "SGI", "QOI", "AVIF"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_any_damage_to_an_image_is_a_reason(kind: str, data: st.DataObject) -> None:
    if kind not in Image.SAVE:
        Image.init()
        if kind not in Image.SAVE:
            pytest.skip(f"this Pillow writes no {kind}")
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 18, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    content = file.getvalue()
    for how, place, what in data.draw(st.lists(DAMAGE, min_size=1, max_size=3)):
        content = damaged(content, how, place, what) if content else content
    began = time.monotonic()
    for call in (
        lambda: decode(content, 5),
        lambda: look_at(content),
        lambda: decode(content, None),
    ):
        try:
            call()
        except BadImage as error:
            assert str(error).isprintable() and 0 < len(str(error)) < 200, str(error)
    assert time.monotonic() - began < SECONDS


def refusal(path: Path) -> str:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_images(path)
    assert time.monotonic() - began < SECONDS and str(caught.value).isprintable()
    return str(caught.value)


def zip_with(path: Path, name: str, header: dict[str, Any] | bytes, content: bytes = b"") -> None:
    """An .npz of one member, with a header of any kind."""
    text = header if isinstance(header, bytes) else repr(header).encode()
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{name}.npy", head + content)


def shape(*sides: int, kind: str = "|u1") -> dict[str, Any]:
    return {"descr": kind, "fortran_order": False, "shape": sides}


@pytest.mark.parametrize(
    "header",
    [
        shape(2**40, 3, 3), shape(2**62, 2**62), shape(-1, 3, 3), shape(4, 3, 3, 3, kind="|O"),
        shape(4, 3, 3, 3, kind="<U9"), shape(4, kind="V99999"), shape(10**30, 3, 3),
        b"{'descr': '|u1'", b"[" * 5000, b"{" + b"'a':" * 2000, b"\0" * 90, b"(" * 9000,
    ],
)  # fmt: skip
def test_what_an_npz_claims_is_not_believed(header: Any, tmp_path: Path) -> None:
    zip_with(tmp_path / "a.npz", "train_images", header, b"\0" * 108)
    assert "cannot be read" in refusal(tmp_path / "a.npz") or "pickle" in refusal(
        tmp_path / "a.npz"
    )
    zip_with(tmp_path / "images.idx", "head", header, b"\0" * 108)
    with pytest.raises(UserError, match="no index of images"):
        load_index(tmp_path / "images.idx")
    text = header if isinstance(header, bytes) else repr(header).encode()
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text
    (tmp_path / "a.npy").write_bytes(head + b"\0" * 108)
    assert "a.npy" in refusal(tmp_path / "a.npy")


def test_columns_first_and_bytes_too_many(tmp_path: Path) -> None:
    """numpy writes an array as it lies in memory; a file longer than it says is damaged."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    np.save(tmp_path / "a.npy", np.asfortranarray(images))
    np.savez(tmp_path / "a.npz", train_images=np.asfortranarray(images))
    for name in ("a.npy", "a.npz"):
        train = open_data(tmp_path / name).train
        found = np.stack([train.read(number) for number in range(5)])
        np.testing.assert_array_equal(found, images)
    with (tmp_path / "a.npy").open("ab") as file:
        file.write(b"\0")
    assert "its shape is not that of its content" in refusal(tmp_path / "a.npy")


def test_an_npz_that_does_not_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte that unpacks to a thousand is refused before any of it is unpacked."""
    monkeypatch.setattr(npz, "memory", lambda: 10**6)
    zip_with(tmp_path / "a.npz", "train_images", shape(2 * 10**5, 3, 3), b"\0" * (18 * 10**5))
    assert (tmp_path / "a.npz").stat().st_size < 10**4
    assert "more than this machine's memory" in refusal(tmp_path / "a.npz")
    zip_with(tmp_path / "images.idx", "head", shape(18 * 10**5), b"\0" * (18 * 10**5))
    with pytest.raises(UserError, match="more than this machine's memory"):
        load_index(tmp_path / "images.idx")
    parts = {"a": np.zeros(6 * 10**5, np.uint8), "b": np.zeros(6 * 10**5, np.uint8)}
    np.savez_compressed(tmp_path / "b.npz", **parts)  # each fits, and not all of them
    with (tmp_path / "b.npz").open("rb") as file:
        archive = npz.Archive(file)
        assert len(archive["a"]) == 6 * 10**5
        with pytest.raises(ValueError, match="more than this machine's memory"):
            archive.every()


def test_a_zip_of_a_million_entries(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for number in range(20_000):
            file.writestr(f"{number}.npy", b"")
    assert "directory is larger" in refusal(tmp_path / "a.npz")


def test_the_size_of_a_directory_counts_not_that_of_its_file(tmp_path: Path) -> None:
    """Twenty long names fill it; 2 MiB of pixels, a hundred arrays and a comment do not."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for number in range(20):
            file.writestr(f"{number}{'x' * 60_000}.npy", b"")
    assert "directory is larger than 1 MiB" in refusal(tmp_path / "a.npz")
    images = np.zeros((170, 64, 64, 3), np.uint8)
    rest = {f"more_{number}": np.zeros(1) for number in range(100)}
    np.savez(tmp_path / "b.npz", train_images=images, **rest)
    with zipfile.ZipFile(tmp_path / "b.npz", "a") as file:
        file.comment = b"PK\5\7" * (2**14 - 1)
    assert len(open_data(tmp_path / "b.npz").train) == 170
    images[0, 0, :8].reshape(-1)[:24] = [*b"PK\5\6", *[255] * 20]  # as the end of another
    np.savez(tmp_path / "c.npz", train_images=images[:4])
    assert open_data(tmp_path / "c.npz").train.read(0)[0, 0].tolist() == [80, 75, 5]


@pytest.mark.parametrize("comment", [0, 7, 2**16 - 1])
@pytest.mark.parametrize("side", [3, 200])
def test_an_end_in_64_bits_is_bounded_too(
    comment: int, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As zipfile writes it for files above 4 GiB; it is believed before the end in 32 bits."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0)
    np.savez(tmp_path / "a.npz", train_images=np.zeros((4, side, side, 3), np.uint8))
    content = (tmp_path / "a.npz").read_bytes()[:-2] + struct.pack("<H", comment) + b"x" * comment
    (tmp_path / "b.npz").write_bytes(content)
    assert len(open_data(tmp_path / "b.npz").train) == 4
    record, where, end = (content.index(mark) for mark in (b"PK\6\6", b"PK\6\7", b"PK\5\6"))
    for place, said in ((record + 40, "directory is larger than 1 MiB"), (where + 8, "elsewhere")):
        changed = bytearray(content)
        struct.pack_into("<Q", changed, place, 2**21)
        (tmp_path / "c.npz").write_bytes(changed)
        assert said in refusal(tmp_path / "c.npz")
    monkeypatch.setattr(npz, "_LARGEST_DIRECTORY", 60)  # of this array it is 62 bytes
    changed = bytearray(content)
    struct.pack_into("<L", changed, end + 12, 50)
    (tmp_path / "d.npz").write_bytes(changed)
    assert "directory is larger" in refusal(tmp_path / "d.npz")


@pytest.mark.parametrize("field", range(5))
@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1])
def test_absurd_records_of_a_pack_and_of_its_part(field: int, value: int, tmp_path: Path) -> None:
    pack_of(tmp_path / "a.pack")
    content = bytearray((tmp_path / "a.pack").read_bytes())
    (long,) = struct.unpack_from("<I", content, len(MAGIC))
    first = len(MAGIC) + 4 + long
    _, *fields = HEAD.unpack_from(content, first)
    fields[field] = min(value, 255) if field == 0 else value * (2**31 if field == 3 else 1)
    HEAD.pack_into(content, first, b"IMG\n", *fields)
    (tmp_path / "a.pack").write_bytes(content)
    read_images(tmp_path / "a.pack")
    end = TRAILER.unpack(content[-TRAILER.size :])[0]
    (tmp_path / "b.pack.part").write_bytes(content[:end])
    write_pack(open_data(tmp_path / "in"), tmp_path / "b.pack", 4, False, 1, lambda count: None)
    splits = open_data(tmp_path / "b.pack")
    assert sum(source is not None and len(source) for source in splits) == 5


def test_a_reason_in_a_pack_stays_one_line_and_forges_nothing(tmp_path: Path) -> None:
    """Neither lines of bad_images.txt nor a terminal's commands, however long."""
    pack_of(tmp_path / "a.pack")
    content = (tmp_path / "a.pack").read_bytes()
    at = content.index(b"not an image")
    start = at - HEAD.size
    for reason in ("x\n7\tname\tforged\x1b[2J\u202e", "y" * 10**6, "\x00\xff"):
        text = reason.encode()
        head = Head.of(0, 0, 0, text)
        whole = content[:start] + HEAD.pack(b"IMG\n", *head) + text
        # The index lies behind, and says where records are: this one is put at the end of them.
        index, end = content[-TRAILER.size :], TRAILER.unpack(content[-TRAILER.size :])
        body = content[end[0] : end[0] + end[1]]
        (tmp_path / "b.pack").write_bytes(
            whole + body + TRAILER.pack(len(whole), end[1], end[2], end[3])
        )
        assert index
        source = open_data(tmp_path / "b.pack").train
        number = next(n for n in range(len(source)) if "bad" in source.describe(n))
        with pytest.raises(BadImage) as caught:
            source.read(number)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 2500
        assert "\t" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        {"bound": "x"}, {"bound": -1}, {"bound": True}, {"raw": 3}, {"top": 17}, {"top": "x"},
        {"lengths": [4, -1]}, {"lengths": "ab"}, {"lengths": [2**80]}, {"lengths": None},
    ],
)  # fmt: skip
def test_headers_that_no_pack_has(header: dict[str, Any], tmp_path: Path) -> None:
    pack_of(tmp_path / "a.pack")
    content = (tmp_path / "a.pack").read_bytes()
    (long,) = struct.unpack_from("<I", content, len(MAGIC))
    first = len(MAGIC) + 4
    changed = json.dumps(json.loads(content[first : first + long]) | header).encode()
    offset, length, check, magic = TRAILER.unpack(content[-TRAILER.size :])
    moved = len(changed) - long
    (tmp_path / "a.pack").write_bytes(
        MAGIC
        + struct.pack("<I", len(changed))
        + changed
        + content[first + long : -TRAILER.size]
        + TRAILER.pack(offset + moved, length, check, magic)
    )
    assert "cannot be read" in refusal(tmp_path / "a.pack")


def entry(name: str, size: int = 0, kind: bytes = b"0", pax: dict[str, str] | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = size, kind, pax or {}
    return info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    "bad",
    [
        entry("a.png", 2**62), entry("a.png", 2**33), entry("a.png", 5, b"S"),
        entry("a.png", 9, pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        entry("a.png", 9, pax={"GNU.sparse.map": "0," * 1000}),
        entry("a.png", 9, pax={"size": "99999999999999999999"}),
        entry("a.png", 9, pax={"size": "-5"}),
        entry("a.png", 9, pax={"GNU.sparse.size": "x"}),
        entry("a.png", pax={"comment": "x" * 2 * 2**20}), entry("x" * 10**6 + ".png", 9),
        entry("a.png", 9, b"L") * 30, entry("a.png", 9, b"x") * 2000, entry("a.png", 0, b"2"),
        entry("a.png", 2**40, b"L"), entry("../../a.png", 9, b"1"), b"\xff" * 5120, b"9" * 512,
    ],
)  # fmt: skip
def test_entries_of_a_tar_that_mean_harm(bad: bytes, tmp_path: Path) -> None:
    good = png(1)
    whole = entry("good.png", len(good)) + good.ljust(-(-len(good) // 512) * 512, b"\0")
    for content in (whole + bad + b"\0" * 2048, bad + whole + b"\0" * 1024, bad):
        (tmp_path / "a.tar").write_bytes(content)
        began = time.monotonic()
        try:
            read_images(tmp_path / "a.tar")
        except UserError as error:
            assert str(error).isprintable() and content is not whole + bad
        assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.npz", "a.npy", "a.txt", "a.pack", "x"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_pipes_and_devices_are_named_not_read(name: str, kind: str, tmp_path: Path) -> None:
    if kind == "fifo":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    assert "pipe" in refusal(tmp_path / name) or "no file" in refusal(tmp_path / name)


def test_a_jpeg_of_endless_scans_is_refused_at_once() -> None:
    file = io.BytesIO()
    Image.new("L", (400, 400)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    at = content.rindex(b"\xff\xda")
    again = content[at:-2] * 3000
    with pytest.raises(BadImage, match="scans, refused"):
        decode(content[:at] + again + content[-2:], 50)
    assert decode(content, 50).shape == (50, 50, 3)


def test_many_pixels_in_a_form_that_python_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """QOI, plain PPM and run-length coded BMP take microseconds for each pixel."""
    run = b"qoif" + struct.pack(">IIBB", 9000, 9000, 3, 0) + b"\xfd" * (9000 * 9000 // 62 + 1)
    for content in (run, b"P3 9000 9000 255\n" + b"1 " * 100, b"P5 9000 9000 77\n" + b"1" * 100):
        began = time.monotonic()
        with pytest.raises(BadImage, match="one by one"):
            decode(content, 8)
        assert time.monotonic() - began < SECONDS


def test_lists_of_strange_lines(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for lines in (
        "a.png\n" + "x" * 10**6 + ".png\n",
        "a.png\n" * 5 + "\x1b[2J.png\n",
        "a.png\n/\n.\n",
    ):
        (tmp_path / "a.txt").write_text(lines)
        read_images(tmp_path / "a.txt")


@pytest.mark.parametrize("rows", [3, 10**6])
def test_parquet_that_nests_or_repeats(rows: int, tmp_path: Path) -> None:
    """Deep types are no images; a million rows of one value are small on disk, and read."""
    import pyarrow
    import pyarrow.parquet

    nested = pyarrow.array([None] * 3, pyarrow.int8())
    for _ in range(60):
        nested = pyarrow.StructArray.from_arrays([nested], ["inside"])
    table = pyarrow.table({"image": [png()] * 3, "deep": nested, "label": [1, 1, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    read_images(tmp_path / "a.parquet")
    many = pyarrow.table({"nothing": [None] * rows, "label": [1] * rows})
    pyarrow.parquet.write_table(many, tmp_path / "b.parquet")
    assert "no column of images" in refusal(tmp_path / "b.parquet")


@pytest.mark.parametrize("cell", [bytes(10**5), {"bytes": bytes(10**5), "path": "x"}])
def test_a_row_group_that_takes_all_memory(tmp_path: Path, monkeypatch: Any, cell: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    from mocokit.data.sources import columns

    table = pyarrow.table({"image": [cell] * 30})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    monkeypatch.setattr(columns, "memory", lambda: 10**6)
    assert "write it in smaller row groups" in refusal(tmp_path / "a.parquet")
