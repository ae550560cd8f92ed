"""The low-rank product by the native backend: the step's segments as it reads them.

Must not know: adapters, requests.

Shapes: T batch rows, I/O a target's in/out widths, C targets, S segments, N units in the arena, U elements per unit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from motet.kernels.cpu.compiled import Effects, Engine, Linear, LowRank, address
from motet.kernels.segments import Segments, TargetShape


class NativePlan:
    """See `motet.kernels.ops.LowRankPlan`; rounds the rank-r intermediate to the arena's dtype, after its gate.

    Attributes:
        low_rank: the segments, for whoever gives them to a whole step.
        arena_NU: what their addresses mean.
        n_targets: C.
    """

    backend = "native"

    def __init__(
        self, engine: Engine, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: Segments
    ) -> None:
        self._engine, self._shapes = engine, shapes
        self._live = frozenset(np.flatnonzero(segments.rank.any(axis=1)).tolist())
        self.arena_NU, self.n_targets = arena_NU, len(shapes)
        names = ("row_start", "row_stop", "a_first", "b_first", "rank")
        tables = {name: np.ascontiguousarray(getattr(segments, name), dtype=np.int32) for name in names}
        self._kept: list[np.ndarray] = [*tables.values()]
        self.low_rank = LowRank(segments=len(segments), **{name: address(table) for name, table in tables.items()})
        if (gates := segments.gates) is not None:
            of_row = np.ascontiguousarray(gates.of_row, dtype=np.int32)
            factor = np.ascontiguousarray(gates.factor, dtype=np.float32)
            self._kept += [of_row, factor]
            self.low_rank.gate_of_row, self.low_rank.gate_factor = address(of_row), address(factor)
            self.low_rank.gates, self.low_rank.gate_width = factor.shape[1:]
        self._effects = Effects(
            arena=address(arena_NU),
            unit=arena_NU.shape[1],
            targets=len(shapes),
            low_rank=ctypes.pointer(self.low_rank),
            n_low_rank=1,
        )

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.LowRankPlan.add_`."""
        if target not in self._live:
            return
        shape = self._shapes[target]
        linear = Linear(in_=shape.in_width, out=shape.out_width, target=target)
        self._engine.low_rank(self._effects, linear, y_TO, x_TI)
