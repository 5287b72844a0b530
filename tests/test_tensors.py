"""Checkpoints and weights of strangers: a sentence within bounds of time and memory, or tensors."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from safetensors.torch import save as save_safe

from mocokit import recipes, settings
from mocokit.engine import checkpoint, tensors
from mocokit.errors import UserError
from mocokit.weights.encoder import build_encoder
from mocokit.weights.resolve import open_model
from mocokit.weights.stored import read_stored

CPU = torch.device("cpu")
TINY = settings.replace(
    recipes.mocov2(), {"net.backbone": "resnet_tiny", "views.size": 32, "net.dim": 4}
)
META = {"mocokit": json.dumps(TINY.model_dump(mode="json"))}


class Trap:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def read(path):
    """What a file of strangers makes; the sentence if it is refused."""
    start = time.process_time()
    try:
        return read_stored(path)
    except UserError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 500 + 2 * len(str(path)), text
        for word in ("weights_only", "safe_globals", "likely succeed", "allowlist", "trust"):
            assert word not in text
        return text
    finally:
        assert time.process_time() - start < 30


def state_of(**changes):
    encoder = build_encoder(TINY)
    state = {
        "format": checkpoint.FORMAT,
        "step": 3,
        "method": {f"encoder.{k}": v for k, v in encoder.state_dict().items()},
        "settings": settings.to_yaml(TINY),
        **changes,
    }
    return {**state, "checksum": checkpoint.digest(state)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of each kind, by name."""
    folder = tmp_path_factory.mktemp("whole")
    state = state_of()
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    backbone = {
        k.removeprefix("encoder.backbone."): v
        for k, v in state["method"].items()
        if k.startswith("encoder.backbone.")
    }
    (folder / "safe.safetensors").write_bytes(save_safe(backbone, META))
    return folder


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "safe.safetensors"])
def test_whole_files_are_read_whatever_they_are_called(whole, tmp_path, name):
    for other in ("x", "x.pt", "x.pth.tar", "x.safetensors", "x.bin"):
        (tmp_path / other).write_bytes((whole / name).read_bytes())
        found = read(tmp_path / other)
        assert found.settings == TINY and found.model == "resnet_tiny"
        assert open_model(tmp_path / other, CPU).subject.width == 64


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "safe.safetensors"])
def test_any_damage_is_one_sentence(whole, tmp_path, name):
    content = (whole / name).read_bytes()
    expected = read(whole / name)
    path = tmp_path / "damaged"
    # Where structure lies, each kind of damage at many places; among numbers, at some.
    places = sorted({*range(0, 600, 13), *range(0, len(content), len(content) // 30)})
    places += range(len(content) - 400, len(content), 19)
    refused = 0
    for number, place in enumerate(places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << number % 8
        for damaged in (
            content[:place],
            bytes(flipped),
            content[:place] + b"\xff\0{[" + content[place:],
            content[:place] + content[place + 3 :],
            content[:place] + b"\xff" * 8 + content[place + 8 :],
        ):
            path.write_bytes(damaged)
            found = read(path)
            if isinstance(found, str):
                refused += 1
            elif name != "safe.safetensors":  # which has no checksum
                assert found.settings == expected.settings
                for key, value in expected.encoder.items():
                    assert torch.equal(found.encoder[key], value)
    assert refused > 3 * len(places)


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from([torch.zeros(3), torch.ones(2, 2, dtype=torch.int64), torch.zeros(())])
    | st.sampled_from([torch.zeros(1).expand(9), torch.zeros(2, 2).to_sparse(), b"x", {1, 2}])
    | st.sampled_from([torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64)])
    | st.sampled_from([torch.bfloat16, torch.Size([3]), torch.device("cpu"), 3j])
)  # fmt: skip
keys = st.sampled_from(["format", "step", "method", "settings", "checksum", "state_dict"])
keys |= st.text(max_size=5) | st.integers(-1, 3)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=9,
)


@hypothesis_settings(
    max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(trees, st.booleans(), st.booleans())
def test_any_tree_is_one_sentence(tmp_path, tree, new, signed):
    if signed and isinstance(tree, dict):
        tree |= {"format": checkpoint.FORMAT, "step": 1, "settings": settings.to_yaml(TINY)}
        tree.pop("checksum", None)
        try:
            tree["checksum"] = checkpoint.digest(tree)
        except (RuntimeError, NotImplementedError):
            tree["checksum"] = "x"
    torch.save(tree, tmp_path / "tree.pt", _use_new_zipfile_serialization=new)
    found = read(tmp_path / "tree.pt")
    if not isinstance(found, str):  # a checkpoint with a method: its weights do not fit
        with pytest.raises(UserError, match="does not fit resnet_tiny: it lacks"):
            open_model(tmp_path / "tree.pt", CPU)


def nested(depth, wrap):
    found = 0
    for _ in range(depth):
        found = wrap(found)
    return found


def shared(value, width, levels):
    for _ in range(levels):
        value = [value] * width
    return value


def itself():
    found = []
    found.append(found)
    return found


CONTENTS = {
    "shared lists": lambda: shared(0, 10, 13),
    "shared dicts": lambda: shared({"a": 1}, 10, 13),
    "shared empties": lambda: shared([], 10, 13),
    "shared tensors": lambda: shared(torch.zeros(1000), 10, 5),
    "shared large tensor": lambda: [torch.zeros(10**6)] * 10**4,
    "shared long text": lambda: ["x" * 10**5] * 10**4,
    "shared long keys": lambda: [{"x" * 10**5: 1}] * 10**4,
    "deep lists": lambda: nested(900, lambda x: [x]),
    "deep dicts": lambda: nested(900, lambda x: {"a": x}),
    "deep tuples": lambda: nested(900, lambda x: (x,)),
    "itself": itself,
    "stride 0": lambda: torch.zeros(1).expand(10**13),
    "stride 0 small": lambda: torch.zeros(1).expand(2000, 2000),
    "windows": lambda: torch.zeros(5000).as_strided((4000, 1000), (1, 1)),
    "meta": lambda: torch.zeros(10**13, device="meta"),
    "sparse": lambda: torch.zeros(3, 3).to_sparse(),
    "sparse of absurd shape": lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**15,)),
    "csr": lambda: torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1)),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(3)),
    "negative": lambda: torch.zeros(3, dtype=torch.complex64).conj().imag,
    "conjugate": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "set": lambda: {1, 2},
    "bytearray": lambda: bytearray(10),
    "long int": lambda: 1 << 10**6,
    "many ints": lambda: list(range(1_200_000)),
    "storage": lambda: torch.zeros(3).untyped_storage(),
    "dtype": lambda: torch.float16,
    "text with escapes": lambda: {"\x1b]0;owned\a\x1b[2J": torch.zeros(2)},
    "long key": lambda: {"x" * 10**6: torch.zeros(2)},
    "tuple keys": lambda: {(1, 2): 3},
    "none key": lambda: {None: 3},
    "trap": Trap,
    "settings of escapes": lambda: None,
}


def as_weights(value):
    """A value where strangers may put it."""
    yield {"state_dict": {"conv1.weight": value, "layer1.0.conv1.weight": value}}
    yield {"conv1.weight": value, "layer1.0.conv1.weight": value, 5: value}
    yield value
    signed = {"format": checkpoint.FORMAT, "step": 1, "checksum": "0"}
    yield {**signed, "method": {"encoder.backbone.conv1.weight": value}, "settings": "seed: 1"}
    yield {**signed, "x": value}


def archive(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def torch_archive(structure, data=b"\0" * 16, compression=zipfile.ZIP_STORED):
    entries = {"a/data.pkl": structure, "a/byteorder": "little", "a/data/0": data}
    return archive({**entries, "a/version": "3\n"}, compression)


def pickled_tensor(shape, stride, size, kind=b"FloatStorage"):
    """A pickle of one tensor with the shape, stride and storage that it claims."""

    def number(value):
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\x000X\x03\0\0\0cpu"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(size) + b"tQ"
        + number(0) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)RtR."
    )  # fmt: skip


OLD = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)


def header(text, data=b"", length=None):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(**changes):
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def large_end(length):
    """A zip's end that claims a list of entries of this length."""
    return b"PK\x03\x04" + b"\0" * 99 + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, length, 0, 0)


FILES = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "random": lambda: os.urandom(5000),
    "image": lambda: b"\x89PNG\r\n\x1a\n" + bytes(99),
    "plain pickle": lambda: pickle.dumps({"a": 1}),
    "trap": lambda: pickle.dumps(Trap()),
    "trap in protocol 2": lambda: pickle.dumps(Trap(), 2),
    "trap in an archive": lambda: torch_archive(pickle.dumps(Trap(), 2)),
    "old trap": lambda: OLD + pickle.dumps(Trap(), 2),
    "marks": lambda: b"\x80\x02" + b"(" * 10**7,
    "lists": lambda: torch_archive(b"\x80\x02" + b"]" * (tensors.STRUCTURE - 9) + b"."),
    "old lists": lambda: OLD + b"\x80\x02" + b"]" * 10**7 + b".",
    "deep pickle": lambda: torch_archive(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "many tuples": lambda: torch_archive(
        b"\x80\x02" + b")\x85" * (tensors.STRUCTURE // 2 - 9) + b"."
    ),
    "claimed text": lambda: OLD + b"\x80\x02X\xff\xff\xff\x7fabc",
    "claimed bytearray": lambda: torch_archive(
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R."
    ),
    "claimed tensor": lambda: torch_archive(b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x10\x85R."),
    "claimed shape": lambda: torch_archive(pickled_tensor([10**12], [1], 4)),
    "claimed stride": lambda: torch_archive(pickled_tensor([10**12], [0], 4)),
    "claimed storage": lambda: torch_archive(pickled_tensor([10**12], [1], 10**12)),
    "negative shape": lambda: torch_archive(pickled_tensor([-4], [1], 4)),
    "negative stride": lambda: torch_archive(pickled_tensor([4], [-1], 4)),
    "overflowing shape": lambda: torch_archive(pickled_tensor([2**40, 2**40], [0, 0], 4)),
    "claimed old storage": lambda: OLD + pickled_tensor([10**9], [1], 10**9),
    "unknown storage": lambda: torch_archive(pickled_tensor([4], [1], 4, b"EvilStorage")),
    "quantized storage": lambda: torch_archive(pickled_tensor([4], [1], 4, b"QInt8Storage")),
    "no storage": lambda: archive({"a/data.pkl": pickled_tensor([4], [1], 4), "a/version": "3"}),
    "compressed": lambda: torch_archive(
        pickled_tensor([2**25], [1], 2**25), bytes(2**27), zipfile.ZIP_DEFLATED
    ),
    "compressed structure": lambda: torch_archive(b"]" * 2**26, b"", zipfile.ZIP_DEFLATED),
    "large structure": lambda: torch_archive(b"]" * 2**25),
    "no entries": lambda: archive({}),
    "other archive": lambda: archive({"word/document.xml": "<a/>"}),
    "script": lambda: archive({"a/data.pkl": b"\x80\x02N.", "a/constants.pkl": "", "version": ""}),
    "long list of entries": lambda: archive({f"a/{n}": "" for n in range(30_000)}),
    "claimed list of entries": lambda: large_end(2**32 - 2),
    "names with escapes": lambda: archive({"\x1b[2J/data.pkl": b"\x80\x02N.", "b/version": "3"}),
    "tar": lambda: b"state_dict/" + bytes(501) + bytes(1024),
    "header of nothing": lambda: header({}),
    "header too long": lambda: header({}, length=2**60),
    "header longer than the file": lambda: header(one(), bytes(8), length=500),
    "header of spaces": lambda: header(b"{" + b" " * (2**22 + 9) + b"}"),
    "deep header": lambda: header(b'{"a":' * 50_000),
    "deep list in a header": lambda: header(b'{"a":' + b"[" * 10**6),
    "header no object": lambda: header(b"{]"),
    "many names": lambda: header({f"{n}": one()["x"] for n in range(30_000)}, bytes(8)),
    "overlapping": lambda: header({**one(), "y": one()["x"]}, bytes(8)),
    "gap": lambda: header(one(data_offsets=[8, 16]), bytes(16)),
    "beyond": lambda: header(one(data_offsets=[0, 80], shape=[20]), bytes(8)),
    "negative": lambda: header(one(data_offsets=[-8, 0]), bytes(8)),
    "huge shape": lambda: header(one(shape=[2**62, 2**62]), bytes(8)),
    "zero and huge": lambda: header(one(shape=[0, 2**62], data_offsets=[0, 0])),
    "wrong dtype": lambda: header(one(dtype="F7"), bytes(8)),
    "strange dtype": lambda: header(one(dtype="F8_E8M0", shape=[8]), bytes(8)),
    "trailing": lambda: header(one(), bytes(800)),
    "metadata no texts": lambda: header({"__metadata__": {"mocokit": {"a": 1}}, **one()}, bytes(8)),
    "metadata no object": lambda: header({"__metadata__": [1], **one()}, bytes(8)),
    "metadata laughs": lambda: header(
        {"__metadata__": {"mocokit": "a: &a [1]\nb: &b [*a,*a]\nseed: [*b,*b]"}, **one()}, bytes(8)
    ),
    "metadata deep": lambda: header({"__metadata__": {"mocokit": "[" * 10**6}, **one()}, bytes(8)),
    "metadata long": lambda: header({"__metadata__": {"mocokit": "x" * 10**6}, **one()}, bytes(8)),
    "metadata escapes": lambda: header(
        {"__metadata__": {"mocokit": '"\\e[2J": 1'}, **one()}, bytes(8)
    ),
    "names of escapes": lambda: header({"\x1b[2J\u202e": one()["x"]}, bytes(8)),
    "name twice": lambda: header(
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],'
        b'"data_offsets":[0,1]}}', b"1"
    ),
}  # fmt: skip


def attack(folder, structure):
    """Every instance above in this process, whose memory is measured."""
    limit = 8 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tried = 0
    tensors.STRUCTURE = structure  # bounds of count are as many times faster to reach
    tensors.MOST = tensors.MOST // (2**22 // structure)
    for name, make in FILES.items():
        path = folder / "file"
        path.write_bytes(make())
        assert isinstance(read(path), str), name
        tried += 1
    sys.setrecursionlimit(10**5)
    for name, make in CONTENTS.items():
        for number, tree in enumerate(as_weights(make())):
            for new in (True, False):
                path = folder / f"{number}.pt"
                try:
                    torch.save(tree, path, _use_new_zipfile_serialization=new)
                except Exception:
                    continue  # what torch itself does not save so
                found = read(path)
                assert isinstance(found, str) or number < 2, (name, number)
                tried += 1
    assert not Path("PWNED").exists()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(f"{tried} {peak:.2f}")


@pytest.mark.parametrize("structure", [2**18, pytest.param(2**22, marks=pytest.mark.slow)])
def test_strangers_files_stay_within_bounds(tmp_path, structure):
    """In a process of its own, with a limit of memory, so that a breach fails and does not hang."""
    script = (
        f"import test_tensors as t, pathlib; t.attack(pathlib.Path({str(tmp_path)!r}), {structure})"
    )
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": here}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tried, peak = done.stdout.split()
    assert int(tried) > 250 and float(peak) < 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": {}}, "does not fit resnet_tiny: it lacks (backbone.)?conv1.weight, and"),
        ({"method": None}, "is a checkpoint of something else, not of pre-training"),
        ({"method": [1]}, "is a checkpoint of something else"),
        ({"method": None, "detector": {}}, "is a checkpoint of a detector, not of pre-training"),
        ({"settings": None}, "is a checkpoint of something else"),
        ({"settings": "a: ["}, "is not YAML"),
        ({"settings": "seed: x"}, "seed = 'x'"),
        ({"format": 1}, "not a checkpoint of this version"),
        ({"format": "2"}, "not a checkpoint of this version"),
        ({"format": [2]}, "not a checkpoint of this version"),
        ({"step": "3"}, "not a checkpoint of this version"),
        ({"step": None}, "not a checkpoint of this version"),
    ],
)
def test_a_checkpoint_of_another_content_is_one_sentence(tmp_path, changes, sentence):
    torch.save(state_of(**changes), tmp_path / "x.pt")
    for layer in ("backbone", "head"):
        with pytest.raises(UserError, match=sentence) as caught:
            open_model(tmp_path / "x.pt", CPU, layer=layer)
        assert "x.pt" in str(caught.value)


NAME = "encoder.backbone.conv1.weight"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.zeros(3), r"it has (backbone\.)?conv1.weight in shape \[3\], not \[16, 3, 3, 3\]"),
        (torch.zeros([1] * 60), r"conv1.weight in shape \[1, 1, .*…, not"),
        (torch.zeros(()), r"in shape \[\], not"),
        (torch.zeros(16, 3, 3, 3, dtype=torch.int64), "as torch.int64, not torch.float32"),
        (torch.zeros(16, 3, 3, 3, dtype=torch.complex64), "as torch.complex64"),
        ("text", "has no tensor as (backbone.)?conv1.weight"),
        ([1], "has no tensor as"),
        (None, "has no tensor as"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, value, sentence):
    state = state_of()
    state = state_of(method={**state["method"], NAME: value})
    torch.save(state, tmp_path / "x.pt")
    for layer in ("backbone", "head"):
        with pytest.raises(UserError, match=sentence):
            open_model(tmp_path / "x.pt", CPU, layer=layer)
    torch.save(
        state_of(method={**state_of()["method"], NAME + "\x1b[2J": value}), tmp_path / "y.pt"
    )
    with pytest.raises(UserError, match=r"has conv1.weight\\x1b\[2J besides$"):
        open_model(tmp_path / "y.pt", CPU)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is no file"):
            tensors.from_torch(path)
        with pytest.raises(UserError, match="is no file"):
            tensors.is_safe(path)


def test_what_torch_reads_stays_within_the_bounds_as_they_are(tmp_path):
    """Of an old file STRUCTURE bytes are read as pickles; of any file, MOST values are taken."""
    path = tmp_path / "x.pt"
    for length, refused in ((tensors.STRUCTURE - 99, False), (tensors.STRUCTURE, True)):
        path.write_bytes(OLD + pickle.dumps("a" * length, 2) + pickle.dumps([], 2))
        if refused:
            with pytest.raises(UserError, match="its structure takes over 4,194,304 bytes"):
                tensors.from_torch(path)
        else:
            assert tensors.from_torch(path) == "a" * length
    for count, refused in ((199_999, False), (200_000, True)):
        torch.save([None] * count, path)
        if refused:
            with pytest.raises(UserError, match="it holds over 200,000 values"):
                tensors.from_torch(path)
        else:
            assert len(tensors.from_torch(path)) == count


def test_a_large_archives_end_is_bounded_too(tmp_path):
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, 1, 1, 2**40, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, 4, 1)
    record = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 2**32 - 1, 0, 0)
    (tmp_path / "x.pt").write_bytes(b"PK\3\4" + end + locator + record)
    assert "its list of entries takes 1,099,511,627,776 bytes" in read(tmp_path / "x.pt")


def test_the_checksum_of_a_state_stays_what_it_was():
    state = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "b": {0: torch.ones(2, dtype=torch.bfloat16), "c": [1, 2.5, None, True, "text"]},
        "d": torch.tensor(3), "e": OrderedDict(x=()), "f": (torch.zeros(0), -0.0),
    }  # fmt: skip
    expected = "ffedc6d0a84bc3ad44b666ff4f23d3a5597c168efd623be8200cc7bc88a6eba0"
    assert checkpoint.digest(state) == expected
