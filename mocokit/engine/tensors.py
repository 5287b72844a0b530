"""Files of tensors that anybody may have written, read within bounds: torch's own and safetensors.

Nothing in a file is run: what would need unpickling of code is refused. What a small file can claim
is bounded: the bytes that pickled structure may take, its depth and the number of its values, each
counted as often as it is referred to, and the bytes that its tensors span.
"""

import io
import os
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mocokit.errors import UserError
from mocokit.files import brief, reason_of, show

# A tensor takes some 200 bytes of structure, so this is room for 20,000.
STRUCTURE = 2**22  # bytes of pickle, or of a safetensors header
ENTRIES = 2**24  # bytes of a zip archive's list of entries
MOST = 200_000  # values in all
DEEPEST = 50  # containers in one another
REPEATED = 16  # times a file's own size that its tensors, counted by reference, may span

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_CODE = re.compile(r"(?:GLOBAL|class) '?([\w.]+)")


def is_safe(path: Path) -> bool:
    """Whether a file is of safetensors, by its first bytes. Raises UserError if it is no file."""
    with _opened(path) as file:
        head, size = file.read(9), os.fstat(file.fileno()).st_size
    # A header's length may begin as a pickle does.
    is_length = int.from_bytes(head[:8], "little") <= size
    return head[8:] == b"{" and (is_length or not head.startswith((_ZIP, _PICKLE)))


def from_torch(path: Path, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote, with all of it plain: dicts, lists, numbers, texts, dense tensors.

    Raises UserError for all else, and for any damage.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4)
        try:
            if head == _ZIP:
                _check_archive(file, size)
            elif head[:1] != _PICKLE:
                raise _Refused("it begins as no file of torch does")
            file.seek(0)
            # Opened, because of a path torch looks at the ending. Pickles are of torch before 1.6.
            source: Any = file if head == _ZIP else _Metered(file)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of layouts that are refused below
                content = torch.load(source, map_location=device, weights_only=True)
            _check_plain(content, size)
        except Exception as error:  # whatever torch raises on what strangers wrote
            raise UserError(_sentence(path, error)) from None
    return content


def from_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file. Raises UserError."""
    from safetensors import safe_open

    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        header = int.from_bytes(head, "little")
        try:
            if len(head) < 8 or header > size - 8:
                raise _Refused("its header is cut short")
            if header > STRUCTURE:
                raise _Refused(f"its header takes {header:,} bytes")
            with safe_open(str(path), framework="pt") as opened:
                metadata = opened.metadata() or {}
                names = opened.keys()
                tensors = {name: opened.get_tensor(name) for name in names}
            _check_plain(tensors, size)
        except Exception as error:
            raise UserError(f"{show(path)} is damaged: {_reason(error)}") from None
    return metadata, tensors


class _Refused(Exception):
    """What is not taken, and why."""


def _opened(path: Path) -> IO[bytes]:
    """A regular file, opened; a pipe or a device is not waited for."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise UserError(f"{show(path)} is no file")
        return os.fdopen(number, "rb")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint at {show(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {show(path)}: {reason_of(error)}") from None


def _check_archive(file: IO[bytes], size: int) -> None:
    """Refuse what torch never writes: compression, entries that share bytes, endless structure."""
    end = 22  # bytes of the record that ends an archive without a comment, as torch writes it
    file.seek(max(0, size - end - 20))
    tail = file.read()
    record = tail[-end:]
    if record[:4] != b"PK\x05\x06":
        raise _Refused("its end is missing")
    length = int.from_bytes(record[12:16], "little")
    if tail[:4] == b"PK\x06\x07":  # of a large archive
        place = size - end - 20 - 56  # where zipfile reads it, whatever is said
        if struct.unpack_from("<Q", tail, 8)[0] != place:
            raise _Refused("its end in 64 bits lies elsewhere than it says")
        file.seek(place)
        length = max(length % (2**32 - 1), int.from_bytes(file.read(48)[40:], "little"))
    if length > ENTRIES:
        raise _Refused(f"its list of entries takes {length:,} bytes")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_size != entry.file_size for entry in entries):
        raise _Refused("it is compressed, as torch writes no file")
    if sum(entry.file_size for entry in entries) > size:
        raise _Refused("its entries are larger than the file")
    if any(e.file_size > STRUCTURE for e in entries if e.filename.endswith(".pkl")):
        raise _Refused(f"its structure takes over {STRUCTURE:,} bytes")


class _Metered(io.RawIOBase):
    """A file for torch's reader of old files, which bounds what is read as pickles.

    Pickles are read by `read` and `readline`, tensors by `readinto`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Any = file
        self._left = STRUCTURE

    def read(self, size: int = -1) -> bytes:
        most = self._left + 1
        return self._counted(self._file.read(most if size is None or size < 0 else min(size, most)))

    def readline(self, size: int | None = -1) -> bytes:
        return self._counted(self._file.readline(self._left + 1))

    def _counted(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            raise _Refused(f"its structure takes over {STRUCTURE:,} bytes")
        return content

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        place: int = self._file.seek(offset, whence)
        return place

    def tell(self) -> int:
        place: int = self._file.tell()
        return place

    def seekable(self) -> bool:
        return True


def _check_plain(tree: Any, size: int) -> None:
    """Raise _Refused unless a tree from a file of `size` bytes is plain and within the bounds."""
    count, room = 0, REPEATED * size + 2**20
    waiting = [(tree, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if isinstance(value, Tensor):
            room -= _bytes_of(value)
        elif type(value).__name__ in _CONTAINERS and isinstance(value, (dict, list, tuple)):
            if depth > DEEPEST:
                raise _Refused(f"it is nested over {DEEPEST} deep")
            if count + len(waiting) + len(value) > MOST:  # before they are listed
                raise _Refused(f"it holds over {MOST:,} values")
            if isinstance(value, Mapping):
                room -= sum(map(_length_of, value))
                value = value.values()
            waiting += [(branch, depth + 1) for branch in value]
        else:
            room -= _length_of(value)
        if room < 0:
            raise _Refused("what it refers to is far larger than the file")


_CONTAINERS = frozenset({"dict", "OrderedDict", "defaultdict", "Counter", "list", "tuple", "Size"})


_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
})  # fmt: skip


def _bytes_of(tensor: Tensor) -> int:
    """What a tensor takes when it is copied."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise _Refused(f"it holds a tensor of another class, {brief(type(tensor).__name__)}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        raise _Refused("it holds a tensor that is sparse, nested or without content")
    if tensor.dtype not in _DTYPES or tensor.is_conj() or tensor.is_neg():
        raise _Refused(f"it holds a tensor of another kind of numbers, {tensor.dtype}")
    return tensor.numel() * tensor.element_size()


def _length_of(value: Any) -> int:
    """What a number or a text takes when it is written out."""
    if value is None or isinstance(value, (bool, float, complex, torch.dtype, torch.device)):
        return 0
    if isinstance(value, int) and value.bit_length() <= 4096:  # Python refuses to write longer ones
        return 0
    if isinstance(value, (str, bytes)):
        return len(value)
    raise _Refused(f"it holds a value of another kind, {brief(type(value).__name__)}")


def _sentence(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        found = _CODE.search(str(error))
        what = (
            f"holds a Python object ({brief(found[1])})" if found else "is damaged, or holds more"
        )
        return (
            f"{show(path)} cannot be read as tensors: its pickle {what}; unpickling Python objects "
            "could run any code, so it is refused; a file of the network's state_dict() alone is "
            "taken"
        )
    return f"{show(path)} cannot be read as tensors ({_reason(error)})"


def _reason(error: Exception) -> str:
    """Why, without the advice that torch adds after its first sentence."""
    if "TorchScript" in str(error):
        return "it is a program of TorchScript"
    return reason_of(error).split(". ")[0]
