"""One step's sparse work on Triton: for either effect a table of row tiles, moved to the device once for all targets.

Must not know: what the kernels compute (`sparse`).

Shapes: K tiles, C targets, S segments, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import triton
from motet.kernels.segments import TargetShape
from motet.kernels.sparse import INDEX_BYTES, SparseSegments
from motet.kernels.triton.sparse import gather, scatter
from motet.kernels.triton.tiles import row_tiles, tile_rows

# The blocks of the low-rank kernels, whose inner loops these are; not yet tuned here.
_LARGEST_INDEX_BLOCK = 64
_IN_BLOCK = 64
_OUT_BLOCK = 128


class _Tables:
    """The tiles and the operands of one effect, on the device; see `sparse` for their columns."""

    def __init__(self, segments: SparseSegments, arena_NU: torch.Tensor) -> None:
        live_S = segments.count.any(axis=0)
        self.n_segments = len(segments)
        self.largest_count: list[int] = segments.count.max(axis=1, initial=0).tolist()
        self.block_t = tile_rows((segments.row_stop - segments.row_start)[live_S])
        largest = max(self.largest_count, default=0)
        self.block_s = min(_LARGEST_INDEX_BLOCK, max(16, triton.next_power_of_2(largest)))
        tiles_K4 = row_tiles(segments.row_start, segments.row_stop, np.flatnonzero(live_S), self.block_t)
        unit = arena_NU.shape[1]
        count = segments.count.astype(np.int64)
        index_first = segments.index_first.astype(np.int64) * (unit * arena_NU.itemsize // INDEX_BYTES)
        operands_CS4 = np.stack([count, segments.first.astype(np.int64) * unit, index_first, 0 * count], axis=2)
        tables = torch.from_numpy(np.concatenate([tiles_K4, operands_CS4.reshape(-1, 4)]))
        tables = tables.to(arena_NU.device, non_blocking=True)
        self.n_tiles = len(tiles_K4)
        self.tiles_K4 = tables[: self.n_tiles]
        self.operands = tables[self.n_tiles :]


class TritonSparsePlan:
    """See `motet.kernels.ops.SparsePlan`; reads operands and index lists at each call.

    Note: where a row has both effects, the scatter reads what the gather wrote, so calls must be ordered on one stream.
    """

    backend = "triton"

    def __init__(
        self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], columns: SparseSegments, rows: SparseSegments
    ) -> None:
        self._arena_NU = arena_NU
        self._index = arena_NU.view(torch.int32)
        self._shapes = shapes
        self._columns = _Tables(columns, arena_NU)
        self._rows = _Tables(rows, arena_NU)

    def touches(self, target: int) -> bool:
        """See `motet.kernels.ops.SparsePlan.touches`."""
        return self._columns.largest_count[target] > 0 or self._rows.largest_count[target] > 0

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.SparsePlan.add_`."""
        if not self.touches(target):
            return
        assert x_TI.is_contiguous(), f"x has strides {x_TI.stride()}; the kernels read whole rows"
        assert y_TO.is_contiguous(), f"y has strides {y_TO.stride()}; the kernels read whole rows"
        shape, columns, rows = self._shapes[target], self._columns, self._rows
        if columns.largest_count[target] > 0:
            gather[columns.n_tiles, triton.cdiv(shape.out_width, _OUT_BLOCK)](
                x_TI,
                self._arena_NU,
                self._index,
                y_TO,
                columns.tiles_K4,
                columns.operands,
                target,
                columns.n_segments,
                shape.in_width,
                shape.out_width,
                BLOCK_T=columns.block_t,
                BLOCK_S=columns.block_s,
                BLOCK_O=_OUT_BLOCK,
                num_warps=4,
                num_stages=1,  # the loop of expand, onto the same accumulator: see `plan`
                enable_fp_fusion=True,
            )
        if rows.largest_count[target] > 0:
            scatter[rows.n_tiles, triton.cdiv(rows.largest_count[target], rows.block_s)](
                x_TI,
                self._arena_NU,
                self._index,
                y_TO,
                rows.tiles_K4,
                rows.operands,
                target,
                rows.n_segments,
                shape.in_width,
                shape.out_width,
                BLOCK_T=rows.block_t,
                BLOCK_S=rows.block_s,
                BLOCK_I=_IN_BLOCK,
                num_warps=4,
                num_stages=2,
                enable_fp_fusion=True,
            )
