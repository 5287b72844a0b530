"""Which decoders are ever reached, whatever a file is called and wherever it lies."""

import io
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from mocokit.data.decode import BadImage, decode, look_at
from mocokit.data.formats import formats, is_tga
from mocokit.detection.dataset import image_size

PACKAGE = Path(__file__).resolve().parents[1] / "mocokit"
# Each starts, is drawn, or is opened by, something other than a decoder in this process.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
BINARY_EPS = b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(EPS).to_bytes(4, "little")
WMF = b"\xd7\xcd\xc6\x9a\0\0\0\0\0\0\x20\0\x20\0\x48\0" + b"\0" * 6 + b"\1\0\x09\0" + b"\0" * 60
EMF = b"\1\0\0\0\x6c\0\0\0" + b"\0" * 32 + b" EMF" + b"\0" * 80
PDF, SVG = b"%PDF-1.4\n" + b"x" * 90, b"<?xml version='1.0'?><svg xmlns='x'/>" + b" " * 60
STRANGE = {
    "ps": (EPS.replace(b" EPSF-3.0", b""), "PostScript"),
    "eps": (EPS, "PostScript"),
    "binary eps": (BINARY_EPS + b"\0" * 18 + EPS, "PostScript"),
    "eps after a mark": (b"\xef\xbb\xbf\n" + EPS, "PostScript"),
    "wmf": (WMF, "Windows metafile"),
    "old wmf": (b"\1\0\x09\0" + b"\0\3" * 40, "Windows metafile"),
    "emf": (EMF, "Windows metafile"),
    "pdf": (PDF, "PDF"),
    "svg": (SVG, "SVG"),
    "grib": (b"GRIB\0\0\0\2" + b"\0" * 60, "not read here"),
    "bufr": (b"BUFR\0\0\0\4" + b"\0" * 60, "not read here"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 60, "not read here"),
    "mpeg": (b"\0\0\1\xb3\x14\0\xf0" + b"\0" * 60, "not read here"),
    "fits": (b"SIMPLE  =                    T" + b" " * 300, "not read here"),
    "xpm": (b'/* XPM */\nstatic char * a[] = {\n"1 1 1 1"};' + b" " * 60, "not read here"),
    "iptc": (b"\x1c\x03\x3c\0\x02\x01\0" + b"\0" * 60, "not read here"),
    "fpx": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, "not read here"),
}
PROGRAM = """
import io, sys, tarfile
from pathlib import Path
import numpy as np

events = []
started = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
           "os.startfile", "pty.spawn")
def hook(name, arguments):
    if name in started:
        events.append((name, arguments[0] if arguments else ""))
    elif name == "open" and str(arguments[0]).startswith(str(root) + "/secret"):
        events.append((name, arguments[0]))

root = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from test_formats import STRANGE
from PIL import Image
from mocokit.data.open import open_data
from mocokit.data.decode import BadImage
from mocokit.detection.dataset import image_size
from mocokit.detection.annotations import BadAnnotation
from mocokit.data.sources.pack import write_pack

endings = "jpg jpeg png webp bmp tif tiff gif JPG".split()
good = io.BytesIO(); Image.new("RGB", (8, 8)).save(good, "PNG")
files = {f"{n}-{k}.{e}": c for n, (k, (c, _)) in enumerate(STRANGE.items()) for e in endings}
folder = root / "folder"; folder.mkdir()
for name, content in files.items():
    (folder / name).write_bytes(content)
for name in ("x.eps", "y.wmf", "z.ps"):
    (folder / name).write_bytes(STRANGE["eps"][0])
(folder / "good.png").write_bytes(good.getvalue())
(root / "list.txt").write_text("".join(f"folder/{n}\\n" for n in (*files, "x.eps", "y.wmf")))
with tarfile.open(root / "a.tar", "w") as tar:
    for name in (*files, "good.png"):
        tar.add(folder / name, name)
import pyarrow, pyarrow.parquet
rows = [{"image": {"bytes": content, "path": None}} for content in files.values()]
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "a.parquet")

sys.addaudithook(hook)
try:
    Image.open(io.BytesIO(STRANGE["eps"][0])).load()
except OSError:
    pass
assert events, "Pillow by itself starts a process, so the hook sees it"
events.clear()
places = ["folder", "list.txt", "a.tar", "a.parquet"]
write_pack(open_data(root / "folder"), root / "a.pack", 16, False, 1, lambda n: None)
write_pack(open_data(root / "folder"), root / "b.pack", None, False, 1, lambda n: None)
count = 0
for place in (*places, "a.pack", "b.pack"):
    source = open_data(root / place).train
    for number in range(len(source)):
        for bound in (None, 4):
            try:
                source.read(number, bound)
            except BadImage as error:
                assert "convert it to PNG" in str(error), error
                count += 1
            else:
                assert source.describe(number).endswith("good.png"), source.describe(number)
for name in files:
    try:
        image_size(folder / name)
    except BadAnnotation:
        count += 1
    else:
        raise AssertionError(name)
assert not events, events
print(count)
"""


def test_no_decoder_that_starts_a_process_is_reached(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2 * 6 * 9 * len(STRANGE)


def test_images_are_opened_in_one_place() -> None:
    """And the formats are named there."""
    calls = re.compile(r"\bImage\s*\.\s*open\s*\(|\bopen\s*as\b|ImageFile\.Parser|import open\b")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in path.read_text().splitlines()
        if calls.search(line)
    ]
    assert len(found) == 1 and found[0].startswith("data/formats.py: "), found
    assert "formats=" in found[0]


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_refused_is_said_in_one_line(kind: str, tmp_path: Path) -> None:
    content, why = STRANGE[kind]
    for call in (lambda: decode(content, None), lambda: look_at(content)):
        with pytest.raises(BadImage, match=why) as caught:
            call()
        assert len(str(caught.value)) < 110 and str(caught.value).isprintable()
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(Exception, match=why[:20]):
        image_size(tmp_path / "a.jpg")


def test_the_list_has_no_other_than_these() -> None:
    """A plugin of a newer Pillow is not reached before somebody has read it."""
    must = {"JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO"}
    others = {"AVIF", "PCX", "SGI", "SUN", "QOI", "PSD"}
    assert must <= set(formats()) <= must | others


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
KINDS = [
    *(("JPEG", "RGB", {}), ("PNG", "RGBA", {}), ("WEBP", "RGB", {}), ("GIF", "P", {})),
    *(("BMP", "RGB", {}), ("DIB", "RGB", {}), ("TIFF", "RGB", {}), ("PPM", "RGB", {})),
    *(("PPM", "L", {}), ("PPM", "1", {}), ("JPEG2000", "RGB", {"no_jp2": True})),
    *(("JPEG2000", "RGBA", {}), ("ICO", "RGBA", {}), ("TGA", "RGB", {}), ("TGA", "L", {})),
    *(("TGA", "RGBA", {"rle": True}), ("TGA", "P", {}), ("TGA", "LA", {"orientation": 1})),
    *(("PCX", "RGB", {}), ("SGI", "RGB", {}), ("QOI", "RGBA", {}), ("AVIF", "RGB", {})),
    ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (30, 20))]}),
]


def saved(kind: str, mode: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind, mode, options", KINDS)
def test_all_others_are_known_by_their_content(
    kind: str, mode: str, options: dict[str, object], tmp_path: Path
) -> None:
    if kind == "AVIF" and kind not in formats():
        pytest.skip("this Pillow has no AVIF")
    content = saved(kind, mode, **options)
    assert look_at(content).kind == kind and is_tga(io.BytesIO(content)) == (kind == "TGA")
    for name in ("a.jpg", "b.eps", "c"):
        (tmp_path / name).write_bytes(content)
        pixels = decode(tmp_path / name, None)
        assert image_size(tmp_path / name) == pixels.shape[:2]
    with Image.open(io.BytesIO(content)) as image:  # Pillow alone, with all its formats
        layer = image.convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    assert np.abs(pixels.astype(int) - np.asarray(white)[..., :3]).max() <= 1


def test_a_tga_of_the_first_version_has_no_mark_at_its_end() -> None:
    for mode, rle in (("RGB", False), ("L", True), ("P", False), ("LA", False)):
        content = saved("TGA", mode, rle=rle)
        bare = content[: -len(b"\0" * 8 + b"TRUEVISION-XFILE.\0")]
        assert is_tga(io.BytesIO(bare))
        np.testing.assert_array_equal(decode(bare, None), decode(content, None))
        if not rle:
            with pytest.raises(BadImage):
                decode(bare[:-20], None)


RED, BLUE = (0x7C00).to_bytes(2, "little"), (0x001F).to_bytes(2, "little")


def tga(
    kind: int, depth: int, flags: int, pixels: bytes, palette: bytes = b"", entry: int = 0
) -> bytearray:
    """Two pixels beside each other, written by hand; of the first version, and with a title."""
    entries = 8 * len(palette) // entry if entry else 0
    head = 3, int(entry > 0), kind, 0, entries, entry, 0, 0, 2, 1, depth, flags
    return bytearray(struct.pack("<3B2HB4H2B", *head) + b"abc" + palette + pixels)


TGAS = {  # how, and red and blue, or black and white
    "16 bits": (2, 16, 0, RED + BLUE),
    "16 bits with one of alpha": (2, 16, 1, RED + BLUE),
    "24 bits": (2, 24, 0, b"\0\0\xff\xff\0\0"),
    "32 bits": (2, 32, 0, b"\0\0\xff\xff\xff\0\0\xff"),
    "32 bits with 8 of alpha": (2, 32, 8, b"\0\0\xff\xff\xff\0\0\xff"),
    "from the upper left": (2, 24, 0x20, b"\0\0\xff\xff\0\0"),
    "packed": (10, 16, 1, b"\0" + RED + b"\0" + BLUE),
    "packed, both as they are": (10, 24, 0, b"\1\0\0\xff\xff\0\0"),
    "palette of 16 bits": (1, 8, 0, b"\1\0", BLUE + RED, 16),
    "palette of 24 bits": (1, 8, 0, b"\1\0", b"\xff\0\0\0\0\xff", 24),
    "palette of 32 bits": (1, 8, 8, b"\1\0", b"\xff\0\0\xff\0\0\xff\xff", 32),
    "packed palette": (9, 8, 0, b"\1\1\0", BLUE + RED, 16),
    "gray": (3, 8, 0, b"\0\xff"),
    "gray with alpha": (3, 16, 8, b"\0\xff\xff\xff"),
    "packed gray": (11, 8, 0, b"\1\0\xff"),
}  # fmt: skip


@pytest.mark.parametrize("how", TGAS)
def test_a_tga_is_known_by_a_head_that_fits(how: str) -> None:
    content = tga(*TGAS[how])
    colours = [[0] * 3, [255] * 3] if "gray" in how else [[255, 0, 0], [0, 0, 255]]
    assert is_tga(io.BytesIO(content)) and decode(bytes(content), None).tolist() == [colours]
    assert is_tga(io.BytesIO(content + b"behind it"))
    if "packed" not in how:  # of which only the least size is known
        assert not is_tga(io.BytesIO(content[:-1]))
    kind = TGAS[how][0]
    fields: dict[int, set[int]] = {  # the values of each field that this image may have
        1: {int(kind & 7 == 1)},
        16: {1: {8}, 2: {16, 24, 32}, 3: {8, 16}}[kind & 7],
        17: {upper | alpha for upper in (0x00, 0x10, 0x20, 0x30) for alpha in (0, 1, 8)},
    }
    for place, known in fields.items():
        for value in range(256):
            other = content.copy()
            other[place] = value
            # Pixels of more bits need more bytes, which are there.
            assert is_tga(io.BytesIO(other + b"more")) == (value in known), (place, value)
    for place in (12, 14):
        assert not is_tga(io.BytesIO(content[:place] + b"\0\0" + content[place + 2 :]))


@given(st.binary(max_size=400), st.sampled_from([one for one, _ in STRANGE.values()]))
@settings(max_examples=300)
def test_what_is_refused_is_never_taken_for_a_tga(rest: bytes, start: bytes) -> None:
    if not rest.endswith(b"TRUEVISION-XFILE.\0"):  # that mark decides
        for length in (8, 16, 32, 60):
            assert not is_tga(io.BytesIO(start[:length] + rest)) or length == 8


def test_pillow_writes_nothing_of_its_own() -> None:
    """It logs an error for a TIFF of 5,000 samples a pixel, which Python would print."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "TIFF")
    content = file.getvalue()
    at = content.index(b"\x15\1\3\0\1\0\0\0") + 8
    content = content[:at] + (5000).to_bytes(2, "little") + content[at + 2 :]
    script = "import sys; from mocokit.data.decode import decode\n"
    script += "try: decode(sys.stdin.buffer.read(), None)\nexcept Exception as e: print(e)"
    done = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True)
    assert done.stderr == b"" and b"not read here" in done.stdout
