"""What many processes read, in memory that they share."""

import pickle
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch

from mocokit.data.batch import free_shared_memory

T = TypeVar("T")

_ALIGNMENT = 64


class Packed(Generic[T]):
    """An object to send to many processes, which then share the memory of its arrays.

    A million file names are 50 MB: too much for a copy in each of 16 processes.
    """

    def __init__(self, content: T) -> None:
        buffers: list[pickle.PickleBuffer] = []
        self._body = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
        sizes = [buffer.raw().nbytes for buffer in buffers]
        starts = np.cumsum([0] + [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]).tolist()
        self._parts = [(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._memory = torch.empty(starts[-1], dtype=torch.uint8)
        for (first, last), buffer in zip(self._parts, buffers, strict=True):
            self._memory.numpy()[first:last] = np.frombuffer(buffer.raw(), np.uint8)
        if 0 < 2 * self._memory.nbytes < free_shared_memory():
            self._memory.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def needs_main(self) -> bool:
        """Whether the user's script defines a class of the content."""
        return b"__main__" in self._body

    @cached_property
    def content(self) -> T:
        memory = memoryview(self._memory.numpy())  # type: ignore[arg-type]
        content: T = pickle.loads(self._body, buffers=[memory[a:b] for a, b in self._parts])
        return content
