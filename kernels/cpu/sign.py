"""The sign product without a GPU: signs are looked up sixteen at a time, then one dense product, in plain torch.

Must not know: adapters, requests. Half-words are read in the order of a little-endian machine, as torch's are.

Shapes: T batch rows, I/O a target's in/out widths, P words of a row, N units in the arena, U elements per unit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from motet.kernels.segments import TargetShape
from motet.kernels.sign import WORD_BITS, SignSegments, words

LOOKED_UP_BITS = 16
"""A table of 2^16 rows takes 2 MiB (bf16). 576 times 1536 signs took 135 µs with it, 227 with 2^8 rows, 325 by shifting
(torch 2.13, one core with AVX-512)."""
BLOCK_ELEMENTS = 1 << 22
"""Of unpacked signs that exist at once. Smaller blocks cost more calls: 282 instead of 218 µs with 2^17 (as above)."""


class CpuSignPlan:
    """See `motet.kernels.ops.SignPlan`; rounds y after each segment."""

    backend = "cpu"

    def __init__(self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: SignSegments) -> None:
        self._halves = arena_NU.view(torch.uint16).view(-1)
        self._first_CS = segments.first.astype(np.int64) * (arena_NU.shape[1] * arena_NU.itemsize // 2)
        self._table = _table(arena_NU.dtype)
        self._shapes = shapes
        self._segments = segments
        self._touched = [bool(present_S.any()) for present_S in segments.present]

    def touches(self, target: int) -> bool:
        """See `motet.kernels.ops.SignPlan.touches`."""
        return self._touched[target]

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.SignPlan.add_`."""
        if not self._touched[target]:
            return
        shape = self._shapes[target]
        halves = words(shape.in_width) * (WORD_BITS // LOOKED_UP_BITS)
        block_o = max(1, BLOCK_ELEMENTS // (halves * LOOKED_UP_BITS))
        for first, segments in self._readers(target).items():
            for o_start in range(0, shape.out_width, block_o):
                o_stop = min(o_start + block_o, shape.out_width)
                index = self._halves[first + o_start * halves : first + o_stop * halves].int()
                sign_OI = F.embedding(index, self._table).view(o_stop - o_start, -1)[:, : shape.in_width]
                for rows, alpha in segments:
                    y_TO[rows, o_start:o_stop].addmm_(x_TI[rows], sign_OI.T, alpha=alpha)

    def _readers(self, target: int) -> dict[int, list[tuple[slice, float]]]:
        """First half-word → (rows, α) of the segments that read it: signs are unpacked once for all of them."""
        found: dict[int, list[tuple[slice, float]]] = {}
        segments = self._segments
        for s in np.flatnonzero(segments.present[target]).tolist():
            rows = slice(int(segments.row_start[s]), int(segments.row_stop[s]))
            found.setdefault(int(self._first_CS[target, s]), []).append((rows, float(segments.alpha[target, s])))
        return found


@functools.cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """[2^16, 16]: the signs of every half-word, the lowest bit first."""
    half, place = torch.arange(1 << LOOKED_UP_BITS)[:, None], torch.arange(LOOKED_UP_BITS)
    return ((half >> place & 1) * 2 - 1).to(dtype)
