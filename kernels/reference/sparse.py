"""The specification of the two sparse products: float32 loops a reviewer can check by eye.

Must not know: how to be fast. Runs on any device.

Shapes: T batch rows, I/O a target's in/out widths, S one segment's indices, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from motet.kernels.segments import TargetShape
from motet.kernels.sparse import SparseSegments


class ReferenceSparsePlan:
    """See `motet.kernels.ops.SparsePlan`; asserts what the contract asks of the indices."""

    backend = "reference"

    def __init__(
        self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], columns: SparseSegments, rows: SparseSegments
    ) -> None:
        self._arena_NU = arena_NU
        self._shapes = shapes
        self._columns = columns
        self._rows = rows

    def touches(self, target: int) -> bool:
        """See `motet.kernels.ops.SparsePlan.touches`."""
        return bool(self._columns.count[target].any() or self._rows.count[target].any())

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.SparsePlan.add_`."""
        if not self.touches(target):
            return
        shape = self._shapes[target]
        sum_TO = y_TO.float()
        for s in range(len(self._columns)):
            if self._columns.count[target, s] > 0:
                v_SO = self._operand(self._columns, target, s, shape.out_width)
                index_S = self._index(self._columns, target, s, shape.in_width)
                t = slice(int(self._columns.row_start[s]), int(self._columns.row_stop[s]))
                sum_TO[t] += x_TI[t][:, index_S].float() @ v_SO
        for s in range(len(self._rows)):
            if self._rows.count[target, s] > 0:
                v_SI = self._operand(self._rows, target, s, shape.in_width)
                index_S = self._index(self._rows, target, s, shape.out_width)
                t = slice(int(self._rows.row_start[s]), int(self._rows.row_stop[s]))
                sum_TO[t, index_S] += x_TI[t].float() @ v_SI.T
        y_TO.copy_(sum_TO)

    def _operand(self, segments: SparseSegments, target: int, s: int, width: int) -> torch.Tensor:
        """[S, width] in float32, from the unit where it begins."""
        begin = int(segments.first[target, s]) * self._arena_NU.shape[1]
        count = int(segments.count[target, s])
        return self._arena_NU.view(-1)[begin : begin + count * width].view(count, width).float()

    def _index(self, segments: SparseSegments, target: int, s: int, width: int) -> torch.Tensor:
        """[S] int64, each below `width`."""
        first, count = int(segments.index_first[target, s]), int(segments.count[target, s])
        index_S = self._arena_NU[first:].view(torch.int32).reshape(-1)[:count].long()
        index = index_S.tolist()
        assert len(set(index)) == count, f"indices repeat: {index}"
        assert all(0 <= i < width for i in index), f"indices outside the width {width}: {index}"
        return index_S
