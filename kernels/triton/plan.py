"""One step's low-rank work on Triton: a table of row tiles, moved to the device once and read by every target.

Must not know: what the kernels compute (`low_rank`).

Shapes: K tiles, C targets, S segments, T batch rows, G gates, R rank, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

import triton
from motet.kernels.segments import Segments, TargetShape
from motet.kernels.triton.low_rank import expand, shrink
from motet.kernels.triton.tiles import row_tiles, tile_rows

# These follow the tiles of vLLM and SGLang, read and not yet tuned here.
_LARGEST_RANK_BLOCK = 64
_IN_BLOCK = 64
_OUT_BLOCK = 128
# Multiply-adds are fused on purpose (`enable_fp_fusion`): they round once, and Triton's default differs by version.


class TritonPlan:
    """See `motet.kernels.ops.LowRankPlan`; rounds the rank-r intermediate to the arena's dtype.

    Note: all targets share one intermediate, so calls must be ordered on one stream, on the arena's device.
    """

    backend = "triton"

    def __init__(self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: Segments) -> None:
        rows_S = segments.row_stop - segments.row_start
        live_S = segments.rank.any(axis=0)
        self._arena_NU = arena_NU
        self._shapes = shapes
        self._largest_rank: list[int] = segments.rank.max(axis=1, initial=0).tolist()
        self._n_segments = len(segments)
        self._block_t = tile_rows(rows_S[live_S])
        self._block_r = min(_LARGEST_RANK_BLOCK, max(16, triton.next_power_of_2(max(self._largest_rank, default=0))))

        tiles_K4 = row_tiles(segments.row_start, segments.row_stop, np.flatnonzero(live_S), self._block_t)
        operands_CS4, n_intermediate = _operands(segments, rows_S, arena_NU.shape[1])
        self._n_tiles = len(tiles_K4)
        tables = torch.from_numpy(np.concatenate([tiles_K4, operands_CS4.reshape(-1, 4)]))
        tables = tables.to(arena_NU.device, non_blocking=True)
        self._tiles_K4 = tables[: self._n_tiles]
        self._operands = tables[self._n_tiles :]
        self._gate_CGR = self._gate_of_row_T = None
        if (gates := segments.gates) is not None:
            self._gate_CGR, self._gate_of_row_T = (
                torch.from_numpy(table).to(arena_NU.device, non_blocking=True).contiguous()
                for table in (gates.factor, gates.of_row)
            )
        self._s = torch.empty(n_intermediate, dtype=arena_NU.dtype, device=arena_NU.device)

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.LowRankPlan.add_`."""
        largest_rank = self._largest_rank[target]
        if largest_rank == 0:
            return
        assert x_TI.is_contiguous(), f"x has strides {x_TI.stride()}; the kernels read whole rows"
        assert y_TO.is_contiguous(), f"y has strides {y_TO.stride()}; the kernels read whole rows"
        shape = self._shapes[target]
        shrink[self._n_tiles, triton.cdiv(largest_rank, self._block_r)](
            x_TI,
            self._arena_NU,
            self._s,
            self._gate_CGR,
            self._gate_of_row_T,
            self._tiles_K4,
            self._operands,
            target,
            self._n_segments,
            *(0, 0) if self._gate_CGR is None else self._gate_CGR.shape[1:],
            shape.in_width,
            BLOCK_T=self._block_t,
            BLOCK_R=self._block_r,
            BLOCK_I=_IN_BLOCK,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
        expand[self._n_tiles, triton.cdiv(shape.out_width, _OUT_BLOCK)](
            self._s,
            self._arena_NU,
            y_TO,
            self._tiles_K4,
            self._operands,
            target,
            self._n_segments,
            shape.out_width,
            BLOCK_T=self._block_t,
            BLOCK_R=self._block_r,
            BLOCK_O=_OUT_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
            num_stages=1,  # vLLM's expand does the same on SM90: ptxas before 13.3 miscompiles the pipelined loop
        )


def _operands(segments: Segments, rows_S: npt.NDArray[np.int32], unit: int) -> tuple[npt.NDArray[np.int64], int]:
    """[C, S, 4] what each segment reads of each target, see `low_rank`; elements of the largest intermediate."""
    rank_CS = segments.rank.astype(np.int64)
    s_elements_CS = rank_CS * rows_S
    s_stop_CS = np.cumsum(s_elements_CS, axis=1)
    columns = (
        rank_CS,
        segments.a_first.astype(np.int64) * unit,
        segments.b_first.astype(np.int64) * unit,
        s_stop_CS - s_elements_CS,
    )
    return np.stack(columns, axis=2), int(s_stop_CS.max(initial=0))
