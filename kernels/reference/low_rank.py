"""The specification of the low-rank product: float32 loops a reviewer can check by eye.

Must not know: how to be fast. Runs on any device.

Shapes: C targets, T batch rows, I/O a target's in/out widths, R one segment's rank or the gates' width, N units in the
arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from motet.kernels.segments import Segments, TargetShape


class ReferencePlan:
    """See `motet.kernels.ops.LowRankPlan`."""

    backend = "reference"

    def __init__(self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: Segments) -> None:
        self._arena_NU = arena_NU
        self._shapes = shapes
        self._segments = segments
        self._gate_CTR = None
        if (gates := segments.gates) is not None:
            self._gate_CTR = torch.from_numpy(gates.factor[:, gates.of_row]).to(arena_NU.device)

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.LowRankPlan.add_`."""
        segments, shape = self._segments, self._shapes[target]
        for s in range(len(segments)):
            rank = int(segments.rank[target, s])
            a_RI = self._operand(int(segments.a_first[target, s]), rank, shape.in_width)
            b_RO = self._operand(int(segments.b_first[target, s]), rank, shape.out_width)
            rows = slice(int(segments.row_start[s]), int(segments.row_stop[s]))
            s_TR = x_TI[rows].float() @ a_RI.T
            if self._gate_CTR is not None:
                s_TR *= self._gate_CTR[target, rows, :rank]
            y_TO[rows] = (y_TO[rows].float() + s_TR @ b_RO).to(y_TO.dtype)

    def _operand(self, first: int, rank: int, width: int) -> torch.Tensor:
        """[rank, width] in float32, from the unit where it begins."""
        begin = first * self._arena_NU.shape[1]
        return self._arena_NU.view(-1)[begin : begin + rank * width].view(rank, width).float()
