"""One step's sign work on Triton: a table of row tiles, moved to the device once and read by every target.

Must not know: what the kernel computes (`sign`).

Shapes: K tiles, C targets, S segments, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import triton
from motet.kernels.segments import TargetShape
from motet.kernels.sign import WORD_BYTES, SignSegments
from motet.kernels.triton.sign import add_signs
from motet.kernels.triton.tiles import row_tiles, tile_rows

# The blocks of the low-rank kernels; not yet tuned here.
_IN_BLOCK = 64
_OUT_BLOCK = 128


class TritonSignPlan:
    """See `motet.kernels.ops.SignPlan`."""

    backend = "triton"

    def __init__(self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: SignSegments) -> None:
        live_S = segments.present.any(axis=0)
        self._words = arena_NU.view(torch.int32)
        self._shapes = shapes
        self._touched = [bool(present_S.any()) for present_S in segments.present]
        self._n_segments = len(segments)
        self._block_t = tile_rows((segments.row_stop - segments.row_start)[live_S])
        tiles_K4 = row_tiles(segments.row_start, segments.row_stop, np.flatnonzero(live_S), self._block_t)
        present = segments.present.astype(np.int64)
        first = segments.first.astype(np.int64) * (arena_NU.shape[1] * arena_NU.itemsize // WORD_BYTES)
        operands_CS4 = np.stack([present, first, 0 * present, 0 * present], axis=2)
        self._n_tiles = len(tiles_K4)
        tables = torch.from_numpy(np.concatenate([tiles_K4, operands_CS4.reshape(-1, 4)]))
        tables = tables.to(arena_NU.device, non_blocking=True)
        self._tiles_K4 = tables[: self._n_tiles]
        self._operands = tables[self._n_tiles :]
        alpha_CS = np.ascontiguousarray(segments.alpha)
        self._alpha_CS = torch.from_numpy(alpha_CS).to(arena_NU.device, non_blocking=True)

    def touches(self, target: int) -> bool:
        """See `motet.kernels.ops.SignPlan.touches`."""
        return self._touched[target]

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.SignPlan.add_`."""
        if not self._touched[target]:
            return
        assert x_TI.is_contiguous(), f"x has strides {x_TI.stride()}; the kernels read whole rows"
        assert y_TO.is_contiguous(), f"y has strides {y_TO.stride()}; the kernels read whole rows"
        shape = self._shapes[target]
        add_signs[self._n_tiles, triton.cdiv(shape.out_width, _OUT_BLOCK)](
            x_TI,
            self._words,
            self._alpha_CS,
            y_TO,
            self._tiles_K4,
            self._operands,
            target,
            self._n_segments,
            shape.in_width,
            shape.out_width,
            BLOCK_T=self._block_t,
            BLOCK_I=_IN_BLOCK,
            BLOCK_O=_OUT_BLOCK,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
