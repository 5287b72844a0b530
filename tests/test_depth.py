"""One scale for all images of 9 to 16 bits, and bands that are no transparency.

Files are written by hand here, byte by byte, so that the reading is not compared with itself.
"""

import io
import struct
import tarfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from shapes import write_voc, xml

from mocokit.data import depth
from mocokit.data.decode import BadImage, decode, look_at
from mocokit.data.index import load_index, save_index
from mocokit.data.loader import Loader
from mocokit.data.open import open_data
from mocokit.data.source import Splits
from mocokit.data.sources.pack import write_pack
from mocokit.detection.open import open_boxes
from mocokit.detection.views import view

WHITE = 65535


def tiff(levels: np.ndarray, *, end: str = "<", packed: bool = False, **tags: Any) -> bytes:
    """An uncompressed TIFF of levels (H, W) or (H, W, C); `tags` are further fields by number."""
    height, width = levels.shape[:2]
    bands = 1 if levels.ndim == 2 else levels.shape[2]
    bits = 16 if levels.dtype.itemsize == 2 else 8
    if packed:  # 12 bits, two levels in three bytes
        rows = np.pad(levels, [(0, 0), (0, width % 2)]).reshape(height, -1, 2)
        a, b = rows[..., 0], rows[..., 1]
        body = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
        bits = 12
    else:
        body = levels.astype(levels.dtype.newbyteorder(end)).tobytes()
    fields: dict[int, tuple[int, list[int]]] = {
        256: (3, [width]), 257: (3, [height]), 258: (3, [bits] * bands), 259: (3, [1]),
        262: (3, [2 if bands > 2 else 1]), 273: (4, [0]), 277: (3, [bands]), 278: (3, [height]),
        279: (4, [len(body)]),
    }  # fmt: skip
    fields |= {int(key[1:]): (3, list(value)) for key, value in tags.items()}
    size = 8 + 2 + 12 * len(fields) + 4
    after, entries = b"", b""
    for tag, (kind, values) in sorted(fields.items()):
        value = struct.pack(f"{end}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if tag == 273:
            value = b"here"
        elif len(value) > 4:
            value, after = struct.pack(f"{end}I", size + len(after)), after + value
        entries += struct.pack(f"{end}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    entries = entries.replace(b"here", struct.pack(f"{end}I", size + len(after)))
    start = (b"II*\0" if end == "<" else b"MM\0*") + struct.pack(f"{end}I", 8)
    return start + struct.pack(f"{end}H", len(fields)) + entries + b"\0\0\0\0" + after + body


def png(levels: np.ndarray, *, significant: int | tuple[int, ...] = 0) -> bytes:
    """A PNG of 16 bits: gray (H, W), with transparency, colours, or both (H, W, C)."""
    height, width = levels.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[1 if levels.ndim == 2 else levels.shape[2]]
    rows = levels.reshape(height, -1).astype(">u2")
    # A row's filter may be any; the difference to the row above is the hardest to get by chance.
    raw = rows.view(np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(raw[:1]), raw[:-1]])
    lines = b"".join(b"\2" + (raw[y] - above[y]).tobytes() for y in range(height))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    if isinstance(significant, int):
        significant = (significant,) * {0: 1, 4: 2, 2: 3, 6: 4}[colour]
    bits = chunk(b"sBIT", bytes(significant))
    middle = (bits if any(significant) else b"") + chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + middle + chunk(b"IEND", b"")


def noise(top: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Levels of 16 bits, 0 and `top` among them."""
    levels = np.random.default_rng(seed).integers(0, top + 1, shape).astype(np.uint16)
    levels[0, 0], levels[-1, -1] = 0, top
    return levels


def expected(levels: np.ndarray, top: int) -> np.ndarray:
    gray = np.floor(levels.astype(np.float64) * 255 / top + 0.5).astype(np.uint8)
    return np.stack([gray] * 3, -1) if gray.ndim == 2 else gray


def folder(root: Path, contents: list[bytes], ending: str = "png") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(contents):
        (root / f"{number:03d}.{ending}").write_bytes(content)
    return root


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("write, ending", [(tiff, "tif"), (png, "png")])
def test_every_depth_keeps_its_range(bits: int, write: Any, ending: str, tmp_path: Path) -> None:
    top = 2**bits - 1
    levels = [noise(top if n == 3 else top - 2 ** (bits - 2), 9, 11, seed=n) for n in range(5)]
    source = open_data(folder(tmp_path / "in", [write(one) for one in levels], ending)).train
    for number, one in enumerate(levels):
        np.testing.assert_array_equal(source.read(number), expected(one, top))
    assert depth.top_of(source) == top and f"{bits} bits" in " ".join(source.notes)


@pytest.mark.parametrize("end", ["<", ">"])
@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_colours_of_sixteen_bits_too(end: str, bands: int, bits: int, tmp_path: Path) -> None:
    top = 2**bits - 1
    levels = noise(top, 8, 9, bands)
    if bands == 4:
        levels[..., 3] = WHITE
    contents = [png(levels), tiff(levels, end=end, **({"t338": [2]} if bands == 4 else {}))]
    places = folder(tmp_path / "a", contents[:1]), folder(tmp_path / "b", contents[1:], "tif")
    for place in places:
        pixels = open_data(place).train.read(0).astype(int)
        # Of full 16 bits Pillow's own upper bytes stay, as ever.
        same = levels[..., :3] >> 8 if bits == 16 else expected(levels[..., :3], top)
        assert np.array_equal(pixels, same), place


def test_gray_with_transparency_of_sixteen_bits(tmp_path: Path) -> None:
    levels = np.dstack([noise(1023, 6, 7), np.full((6, 7), WHITE, np.uint16)])
    source = open_data(folder(tmp_path / "a", [png(levels)])).train
    np.testing.assert_array_equal(source.read(0), expected(levels[..., 0], 1023))
    levels[..., 1] = 800  # on the scale of the gray levels: 199 of 255
    source = open_data(folder(tmp_path / "b", [png(levels)])).train
    gray = expected(levels[..., 0], 1023).astype(int)
    over_white = 255 + (gray - 255) * 199 / 255
    assert np.abs(source.read(0) - over_white).max() <= 1


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs(compression: str, tmp_path: Path) -> None:
    levels = noise(4095, 30, 31)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "TIFF", compression=compression)
    source = open_data(folder(tmp_path / "a", [file.getvalue()], "tif")).train
    np.testing.assert_array_equal(source.read(0), expected(levels, 4095))


def test_packed_twelve_bits_and_what_files_declare(tmp_path: Path) -> None:
    """Dark images: no level reaches the range that their files declare."""
    dark = noise(700, 6, 8)
    declared = {
        "packed": tiff(dark, packed=True),
        "maximum": tiff(dark, t281=[4095]),
        "significant": png(dark, significant=12),
    }
    for name, content in declared.items():
        ending = "png" if name == "significant" else "tif"
        source = open_data(folder(tmp_path / name, [content], ending)).train
        np.testing.assert_array_equal(source.read(0), expected(dark, 4095), err_msg=name)
    full = {"tif": tiff(dark, t281=[WHITE]), "png": png(dark, significant=16)}
    for ending, content in full.items():
        source = open_data(folder(tmp_path / ending, [content], ending)).train
        np.testing.assert_array_equal(source.read(0), expected(dark, WHITE), err_msg=ending)
    uneven = png(noise(700, 6, 8, 3), significant=(10, 12, 11))  # the scale holds every band
    source = open_data(folder(tmp_path / "uneven", [uneven])).train
    np.testing.assert_array_equal(source.read(0), expected(noise(700, 6, 8, 3), 4095))
    bare = open_data(folder(tmp_path / "bare", [tiff(dark)], "tif")).train
    np.testing.assert_array_equal(bare.read(0), expected(dark, 1023))


def test_significant_bits_that_were_spread_over_all_are_full(tmp_path: Path) -> None:
    """As PNG asks: 12 bits are shifted up, or repeated below; a dark image of them is dark."""
    twelve = noise(700, 6, 8)
    for name, levels in (("shifted", twelve << 4), ("repeated", twelve << 4 | twelve >> 8)):
        source = open_data(folder(tmp_path / name, [png(levels, significant=12)])).train
        np.testing.assert_array_equal(source.read(0), expected(levels, WHITE), err_msg=name)


def test_transparency_on_the_scale_of_the_colours(tmp_path: Path) -> None:
    """Writers of 12 bits put 4,095 for opaque, which is 16 of 255 where 65,535 is meant."""
    levels = noise(4095, 6, 7, 4)
    levels[..., 3] = 4095
    for name, content in (("a", png(levels)), ("b", tiff(levels, t338=[2]))):
        ending = "png" if name == "a" else "tif"
        source = open_data(folder(tmp_path / name, [content], ending)).train
        np.testing.assert_array_equal(source.read(0), expected(levels[..., :3], 4095))


def test_what_pillow_reads_as_eight_bits_is_refused(tmp_path: Path) -> None:
    for levels in (noise(4095, 6, 7, 3), noise(4095, 6, 7)):
        source = open_data(folder(tmp_path / "a", [tiff(levels, t284=[2])], "tif")).train
        with pytest.raises(BadImage, match="TIFF of 16 bits with each band in a plane of its own"):
            source.read(0)


def test_zero_is_white_where_a_tiff_says_so(tmp_path: Path) -> None:
    levels = noise(4095, 6, 7)
    source = open_data(folder(tmp_path / "a", [tiff(levels, t262=[0])], "tif")).train
    np.testing.assert_array_equal(source.read(0), 255 - expected(levels, 4095))


def test_a_dark_pgm_stays_dark(tmp_path: Path) -> None:
    """Pillow stretches its levels to 16 bits, by the largest that the file declares."""
    levels = noise(900, 6, 7)
    content = b"P5 7 6 4095\n" + levels.astype(">u2").tobytes()
    source = open_data(folder(tmp_path / "a", [content], "png")).train  # told by content
    assert np.abs(source.read(0).astype(int) - expected(levels, 4095)).max() <= 1


def test_images_that_a_scale_makes_dark_are_told(tmp_path: Path) -> None:
    usual = [tiff(noise(4095, 4, 4, seed=n)) for n in range(6)]
    unit = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(unit, "TIFF")
    for name, extra, said in (
        ("one", tiff(noise(WHITE, 4, 4)), "half of these reach no more than 4,095, which becomes"),
        ("unit", unit.getvalue(), "1 of these hold levels from 0 to 1 and are black"),
        ("dark", tiff(noise(700, 4, 4)), None),
    ):
        notes = open_data(folder(tmp_path / name, [*usual, extra], "tif")).train.notes
        assert [said in note for note in notes[1:]] == ([True] if said else []), notes


def test_one_scale_for_integers_and_floats_of_a_set(tmp_path: Path) -> None:
    for name, top, scale in (("unit", 1.0, 1), ("byte", 200.0, 255), ("ten", 900.0, 1023)):
        levels = np.linspace(0, top, 12, dtype=np.float32).reshape(3, 4)
        contents = []
        for part in (levels, levels / 2):
            file = io.BytesIO()
            Image.fromarray(part).save(file, "TIFF")
            contents.append(file.getvalue())
        source = open_data(folder(tmp_path / name, contents, "tif")).train
        assert depth.top_of(source) == scale
        assert source.read(0).max() == round(255 * top / scale)
        assert source.read(1).max() in (round(127.5 * top / scale), int(127.5 * top / scale))


def test_an_image_above_the_scale_is_bad_and_says_so(tmp_path: Path) -> None:
    contents = [tiff(noise(4095, 4, 4, seed=n)) for n in range(400)]
    root = folder(tmp_path / "a", contents, "tif")
    seen = set(depth.spread(400, depth.MEASURED))
    unseen = next(n for n in range(400) if n not in seen)
    (root / f"{unseen:03d}.tif").write_bytes(tiff(noise(5000, 4, 4)))
    source = open_data(root).train
    with pytest.raises(BadImage, match=r"5000 do not fit 0 to 4,095 \(12 bits\)"):
        source.read(unseen)


def test_images_of_eight_bits_are_as_ever_beside_deep_ones(tmp_path: Path) -> None:
    plain = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(plain).save(file, "PNG")
    source = open_data(folder(tmp_path / "a", [file.getvalue(), png(noise(4095, 5, 6))])).train
    np.testing.assert_array_equal(source.read(0), plain)
    shallow = open_data(folder(tmp_path / "b", [file.getvalue()])).train
    assert depth.top_of(shallow) is None and shallow.notes == ()


def test_the_same_scale_in_every_container_split_and_worker(tmp_path: Path) -> None:
    """A tar, a parquet file, packs and two parts: train and validation, and two workers."""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    levels = [noise(4095 if n == 7 else 1500, 8, 8, seed=n) for n in range(12)]
    contents = [png(one) for one in levels]
    root = folder(tmp_path / "in", contents)
    split = tmp_path / "split"
    folder(split / "train" / "a", contents[:7])
    folder(split / "val" / "a", contents[7:])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(root.iterdir()):
            tar.add(path, path.name)
    rows = [{"image": {"bytes": one, "path": None}} for one in contents]
    import pyarrow as arrow

    pyarrow.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, bound, raw in (("raw", 64, True), ("kept", 64, False), ("small", 4, False)):
        write_pack(open_data(root), tmp_path / f"{name}.pack", bound, raw, 1, lambda n: None)
    (tmp_path / "list.txt").write_text("".join(f"in/{n:03d}.png\n" for n in range(12)))
    places = ["in", "a.tar", "a.parquet", "raw.pack", "kept.pack", "list.txt"]
    for place in places:
        source = open_data(tmp_path / place).train
        for number, one in enumerate(levels):
            np.testing.assert_array_equal(source.read(number), expected(one, 4095), err_msg=place)
    small = open_data(tmp_path / "small.pack").train.read(7)
    assert abs(small.mean() - expected(levels[7], 4095).mean()) < 3
    train, held = open_data(split)
    assert held is not None
    np.testing.assert_array_equal(train.read(0), expected(levels[0], 4095))
    np.testing.assert_array_equal(held.read(0), expected(levels[7], 4095))
    both = open_data(f"{split / 'train'}::{tmp_path / 'in'}").train
    np.testing.assert_array_equal(both.read(0), expected(levels[0], 4095))
    options: dict[str, Any] = {"seed": 0, "batch_size": 4, "epochs": 1, "last": "drop"}
    batches = [
        [batch.pixels.numpy().copy() for _, batch in Loader(both, bound=None, workers=w, **options)]
        for w in (0, 2)
    ]
    np.testing.assert_array_equal(*batches)


def test_a_run_keeps_the_scale_that_it_began_with(tmp_path: Path) -> None:
    root = folder(tmp_path / "in", [png(noise(4095, 6, 6, seed=n)) for n in range(3)])
    began = open_data(root)
    save_index(began.train.index(), tmp_path / "images.idx")
    (root / "002.png").write_bytes(png(noise(WHITE, 6, 6)))  # now the set would be of 16 bits
    again = open_data(root)
    assert depth.top_of(*again) == WHITE
    assert again.train.stamp() != began.train.stamp()
    depth.keep(again, load_index(tmp_path / "images.idx").top)
    np.testing.assert_array_equal(again.train.read(0), expected(noise(4095, 6, 6), 4095))


def test_a_run_of_before_reads_as_it_did(tmp_path: Path) -> None:
    """Its index names no scale: 16 bits are 0 to 65,535, whatever they hold."""
    root = folder(tmp_path / "in", [png(noise(4095, 6, 6))])
    splits = open_data(root)
    depth.keep(splits, None)
    np.testing.assert_array_equal(splits.train.read(0), expected(noise(4095, 6, 6), WHITE))
    assert splits.train.index().top is None


def test_an_index_without_deep_images_is_written_as_ever(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    save_index(open_data(tmp_path).train.index(), tmp_path / "images.idx")
    with np.load(tmp_path / "images.idx") as arrays:
        assert b"top" not in arrays["head"].tobytes()


COLOURS = np.random.default_rng(1).integers(0, 256, (7, 8, 6), np.uint8)


@pytest.mark.parametrize("end", ["<", ">"])
@pytest.mark.parametrize(
    "bands, extra, clear, left_out",
    [
        (4, None, False, 1),  # near infrared, as satellites and drones write it
        (4, [0], False, 1),
        (4, [2], True, 0),
        (4, [1], True, 0),
        (4, [999], False, 1),
        (5, [0, 0], False, 2),
        (5, [2, 0], True, 1),
        (6, [0, 0, 0], False, 3),
        (3, None, False, 0),
    ],
)
def test_a_band_of_a_tiff_is_transparency_if_the_file_says_so(
    bands: int, extra: list[int] | None, clear: bool, left_out: int, end: str
) -> None:
    levels = COLOURS[..., :bands].copy()
    if extra and extra[0] == 1:  # multiplied into the colours
        levels[..., :3] = levels[..., :3] * (levels[..., 3:4] / 255.0)
    content = tiff(levels, end=end, **({"t338": extra} if extra else {}))
    plain = COLOURS[..., :3].astype(np.float64)
    seen = COLOURS[..., 3:4] / 255.0
    wanted = plain * seen + 255 * (1 - seen) if clear else plain
    difference = np.abs(decode(content, None) - wanted)
    assert difference.max() <= (3 if extra and extra[0] == 1 else 1), difference.max()
    assert look_at(content).left_out == left_out


def test_other_files_that_do_not_say_so() -> None:
    image = Image.fromarray(COLOURS[..., :4])
    contents = {}
    for kind in ("TGA", "JPEG2000"):
        file = io.BytesIO()
        image.save(file, kind)
        contents[kind] = file.getvalue()
    tga = bytearray(contents["TGA"])
    assert look_at(bytes(tga)).left_out == 0
    tga[17] &= 0xF0  # no bits of transparency
    np.testing.assert_array_equal(decode(bytes(tga), None), COLOURS[..., :3])
    assert look_at(bytes(tga)).left_out == 1
    jp2 = contents["JPEG2000"]
    assert look_at(jp2).left_out == 0
    at = jp2.index(b"cdef")
    other = jp2[:at] + b"free" + jp2[at + 4 :]  # the box that says so is another now
    assert look_at(other).left_out == 1
    np.testing.assert_array_equal(decode(other, None), COLOURS[..., :3])
    with pytest.raises(AssertionError):  # and with it, the band is transparency
        np.testing.assert_array_equal(decode(jp2, None), COLOURS[..., :3])


def test_bands_left_out_are_told(tmp_path: Path) -> None:
    plain = tiff(COLOURS[..., :3])
    for bands in (4, 5, 6):  # of which the last is any number's: it is images that are counted
        extra = tiff(COLOURS[..., :bands], t338=[0] * (bands - 3))
        root = folder(tmp_path / str(bands), [extra] * 3 + [plain], "tif")
        (note,) = open_data(root).train.notes
        assert note.startswith("3 of 4 images looked at have bands")
    assert open_data(folder(tmp_path / "plain", [plain] * 2, "tif")).train.notes == ()


@given(st.data())
@settings(max_examples=60)
def test_any_order_and_mixture_gives_the_same_scale(data: st.DataObject) -> None:
    tops = data.draw(st.lists(st.integers(0, WHITE), min_size=1, max_size=6))
    contents = [
        data.draw(st.sampled_from([png, tiff]))(np.full((2, 3), top, np.uint16)) for top in tops
    ]
    order = data.draw(st.permutations(range(len(tops))))
    one = depth.measure(lambda n: contents[n], len(tops))
    other = depth.measure(lambda n: contents[order[n]], len(tops))
    assert one == other
    assert one.top == max(255, 2 ** int(max(tops)).bit_length() - 1)


def test_detection_reads_on_one_scale_too(tmp_path: Path) -> None:
    levels = {name: noise(top, 40, 60) for name, top in (("a", 4095), ("b", 900), ("c", 3000))}
    objects = xml([("cat", (11, 6, 30, 25))])
    pictures = {name: (Image.new("L", (60, 40)), objects) for name in levels}
    root = write_voc(tmp_path, {"trainval": "ab", "test": "c"}, pictures)
    for name, one in levels.items():
        (root / "JPEGImages" / f"{name}.jpg").unlink()
        (root / "JPEGImages" / f"{name}.png").write_bytes(png(one))
    data = open_boxes(root, "07", (), lambda text, total: nullcontext(lambda count: None))
    assert "12 bits" in data.train.notes[0]
    for sample in (*data.train.samples, *data.test.samples):
        seen = view(sample, 40, 60, False).pixels
        np.testing.assert_array_equal(seen, expected(levels[sample.path.stem], 4095))


def test_which_images_say_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """First and last are among them; more are measured than are looked at for deep ones."""
    assert list(depth.spread(100, 3)) == [0, 49, 99] and list(depth.spread(2, 9)) == [0, 1]
    deep = SimpleNamespace(left_out=0, deep=True)
    monkeypatch.setattr(depth, "_look", lambda content, number: deep)
    monkeypatch.setattr(depth, "_reached", lambda content, number: 1023)
    found = depth.measure(lambda number: b"", 1000)
    assert found.top == 1023 and "that holds the 256 looked at" in found.notes[0]


def test_a_kept_scale_leaves_what_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [SimpleNamespace(settled=True, top=255), SimpleNamespace(settled=False, top=None)]
    monkeypatch.setattr(depth, "encoded", lambda *sources: parts)
    depth.keep(Splits(None, None), 4095)  # type: ignore[arg-type]
    assert [part.top for part in parts] == [255, 4095]
