"""Memory in large pages, where the system has them: for what every step reads from end to end.

Must not know: what is kept in it. Weights in pages of 4 KiB cost a step of eight rows a tenth of its time, in look-ups
of addresses. Nothing depends on getting large pages: the system is asked, and gives them as it can.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch

LARGE_BYTES = 2 << 20
"""Of a large page; a region may not begin at one."""
REGION_BYTES = 64 << 20
_ALIGNED_BYTES = 64


def in_large_pages(values: torch.Tensor) -> torch.Tensor:
    """The same tensor, whose pages the system now makes large as they are touched; best asked before any is."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and values.device.type == "cpu":
        first = -(-values.data_ptr() // LARGE_BYTES) * LARGE_BYTES
        size = (values.data_ptr() + values.nbytes - first) // LARGE_BYTES * LARGE_BYTES
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
    return values


class LargePages:
    """Tensors one behind the other in regions of large pages; a region is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of any values, on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._region):
            self._region = in_large_pages(torch.empty(max(size, REGION_BYTES), dtype=torch.uint8))
            self._used = 0
        taken = self._region[self._used : self._used + size]
        self._used += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return taken.view(dtype).view(*shape)
