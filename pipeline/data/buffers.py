"""Memory that is used again: a batch is megabytes, and new pages for each would cost more than filling them."""

from __future__ import annotations

from collections import deque
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_SMALLEST = 64 << 10  # bytes; below that the allocator has memory at hand
_KEPT = 8  # buffers of one size that nobody uses


class BufferPool:
    """Arrays whose memory comes back when nothing refers to it any more; safe in threads.

    Views, tensors made with `torch.from_numpy` and their own views all keep it.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[NDArray[np.uint8]]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array with any content, C order."""
        size = np.dtype(dtype).itemsize * prod(shape)
        if size < _SMALLEST:
            return np.empty(shape, dtype)
        free = self._free.setdefault(size, deque(maxlen=_KEPT))
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        return np.asarray(_Lent(memory, free)).view(dtype).reshape(shape)


class _Lent:
    """Stands between memory and the arrays that see it: numpy keeps it as long as one of them lives."""

    def __init__(self, memory: NDArray[np.uint8], free: deque[NDArray[np.uint8]]) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory, self._free = memory, free

    def __del__(self) -> None:
        # no lock: this may be called in the middle of anything
        self._free.append(self._memory)
