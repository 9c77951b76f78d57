"""A safetensors file that is laid out in host memory once, and then filled again and again."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")
_ALIGNED = 8
_ITEM = 4  # bytes of a float32


class TensorFile:
    """Flat float32 tensors end to end, behind their header, as safetensors has them. Nothing is allocated later.

    The header says what the order and the lengths say, so it is written at once. The memory is touched at once too,
    or the first to fill it would meet a page fault every 4 KiB, which takes longer than the copy.

    Args:
        tensors: names and numbers of elements, in the order in which they lie.
        pinned: page-locked, so that a GPU can write to it while the host goes on.
    """

    def __init__(self, tensors: Sequence[tuple[str, int]], *, pinned: bool = False) -> None:
        header: dict[str, object] = {}
        end = 0
        for name, count in tensors:
            header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + count * _ITEM]}
            end += count * _ITEM
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        start = _LENGTH.size + len(text)
        self._bytes = torch.empty(start + end, dtype=torch.uint8, pin_memory=pinned).zero_()
        self.data = memoryview(self._bytes.numpy())  # type: ignore[arg-type]
        """The whole file."""
        self.data[:start] = _LENGTH.pack(len(text)) + text
        self.elements: Tensor = self._bytes[start:].view(torch.float32)
        """All tensors, end to end [sum of their elements]. What is written to it is in the file."""
