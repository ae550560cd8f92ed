"""Batches for the sparse kernels, with an oracle that shares no code with them.

The arena is NaN wherever no live operand or index list lies, so that a read outside shows.

Shapes: T batch rows, I/O a target's in/out widths, C targets, S segments (or, of an operand, its indices), N units in
the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from motet.kernels.dispatch import Backend, sparse_plan
from motet.kernels.ops import SparsePlan
from motet.kernels.segments import TargetShape
from motet.kernels.sparse import SparseSegments
from tests.support.low_rank import Run

Counts = Sequence[Sequence[int]]
"""[adapters][C] indices of each operand."""


@dataclass(frozen=True)
class SparseCase:
    """A batch and what it should become."""

    arena_NU: torch.Tensor
    shapes: list[TargetShape]
    columns: SparseSegments
    rows: SparseSegments
    x_TI: list[torch.Tensor]
    y_TO: list[torch.Tensor]
    expected_TO: list[torch.Tensor]
    """[C] float64, from dense deltas."""
    magnitude_TO: list[torch.Tensor]
    """[C] float64, |y| + |ΔW x| of either effect: what a backend may round on the way to each element."""
    live_TO: list[torch.Tensor]
    """[C] bool, false where neither effect may change y."""

    @property
    def n_rows(self) -> int:
        return len(self.y_TO[0])

    def plan(self, backend: Backend) -> SparsePlan:
        """Asserts that it is this backend's."""
        plan = sparse_plan(backend, self.arena_NU, self.shapes, self.columns, self.rows, self.n_rows)
        assert plan.backend == backend
        return plan

    def run(self, backend: Backend) -> list[torch.Tensor]:
        """[C] what the backend makes of y."""
        plan = self.plan(backend)
        outputs = []
        for target, (x_TI, y_TO) in enumerate(zip(self.x_TI, self.y_TO, strict=True)):
            out_TO = y_TO.clone()
            plan.add_(target, out_TO, x_TI)
            outputs.append(out_TO)
        return outputs


def make_sparse_case(
    runs: Sequence[Run],
    column_counts: Counts,
    row_counts: Counts,
    shapes: Sequence[tuple[int, int]],
    *,
    unit: int,
    dtype: torch.dtype,
    row_runs: Sequence[Run] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> SparseCase:
    """Random operands and rows of order 1; every operand that can names the first and the last element.

    Args:
        runs: the batch, row after row, for ColumnSparse.
        column_counts: [adapters][C] indices of each ColumnSparse operand.
        row_counts: [adapters][C] indices of each RowSparse operand.
        shapes: [C] (in, out) widths.
        unit: U.
        dtype: of the arena, x and y.
        row_runs: the same rows for RowSparse; None when they are cut alike.
        device: of the tensors.
        seed: of all that is random.
    """
    random = torch.Generator().manual_seed(seed)
    arena = _Arena(unit, dtype, random)
    n_rows = sum(run.n_rows for run in runs)
    x_TI = [torch.randn(n_rows, i, generator=random).to(dtype) for i, _ in shapes]
    y_TO = [torch.randn(n_rows, o, generator=random).to(dtype) for _, o in shapes]
    expected_TO = [y.double() for y in y_TO]
    magnitude_TO = [y.double().abs() for y in y_TO]
    live_TO = [torch.zeros_like(y, dtype=torch.bool) for y in y_TO]
    segments = []
    for effect, effect_runs, counts in (("column", runs, column_counts), ("row", row_runs or runs, row_counts)):
        taken, starts, stops = _taken(effect_runs)
        assert sum(run.n_rows for run in effect_runs) == n_rows
        table = {name: np.full((len(shapes), len(taken)), 10**9, dtype=np.int32) for name in ("first", "index", "n")}
        operands = {}
        for c, (i, o) in enumerate(shapes):
            width, indexed = (o, i) if effect == "column" else (i, o)
            for adapter, by_target in enumerate(counts):
                operands[c, adapter] = arena.add(by_target[c], width, indexed)
            for s, adapter in enumerate(taken):
                v_SW, index_S, table["first"][c, s], table["index"][c, s] = operands[c, adapter]
                table["n"][c, s] = len(index_S)
                delta_OI = torch.zeros(o, i, dtype=torch.float64)
                if effect == "column":
                    delta_OI[:, index_S] = v_SW.double().T
                else:
                    delta_OI[index_S] = v_SW.double()
                t = slice(starts[s], stops[s])
                product_TO = x_TI[c][t].double() @ delta_OI.T
                expected_TO[c][t] += product_TO
                magnitude_TO[c][t] += product_TO.abs()
                live_TO[c][t] |= (delta_OI != 0).any(dim=1)
        as_int32 = (np.array(bounds, dtype=np.int32) for bounds in (starts, stops))
        segments.append(SparseSegments(*as_int32, table["first"], table["index"], table["n"]))
    return SparseCase(
        arena_NU=arena.build().to(device),
        shapes=[TargetShape(i, o) for i, o in shapes],
        columns=segments[0],
        rows=segments[1],
        x_TI=[x.to(device) for x in x_TI],
        y_TO=[y.to(device) for y in y_TO],
        expected_TO=[y.to(device) for y in expected_TO],
        magnitude_TO=[y.to(device) for y in magnitude_TO],
        live_TO=[live.to(device) for live in live_TO],
    )


def _taken(runs: Sequence[Run]) -> tuple[list[int], list[int], list[int]]:
    """(adapter, first row, one past the last) of the runs that have one."""
    stops = np.cumsum([run.n_rows for run in runs]).tolist()
    bounds = [(run.adapter, stop - run.n_rows, stop) for run, stop in zip(runs, stops, strict=True)]
    live = [(adapter, start, stop) for adapter, start, stop in bounds if adapter is not None]
    return [a for a, _, _ in live], [start for _, start, _ in live], [stop for _, _, stop in live]


class _Arena:
    """Operands and index lists as they come, with NaN between them and in what an index list leaves of its unit."""

    def __init__(self, unit: int, dtype: torch.dtype, random: torch.Generator) -> None:
        self._unit, self._dtype, self._random = unit, dtype, random
        self._pieces: list[torch.Tensor] = []
        self._n_units = 0
        self._gap(2)

    def add(self, count: int, width: int, indexed: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """(V [count, width], indices [count], unit of V, unit of the indices); the units are far outside for none."""
        v_SW = (torch.randn(count, width, generator=self._random) / max(count, 1) ** 0.5).to(self._dtype)
        index_S = torch.randperm(indexed, generator=self._random)[:count]
        for position, edge in ((0, 0), (-1, indexed - 1)):
            if count > 1 and edge not in index_S:
                index_S[position] = edge
        if count == 0:
            return v_SW, index_S, 10**9, 10**9
        first = self._put(v_SW.reshape(-1, self._unit))
        per_unit = self._unit * self._dtype.itemsize // 4
        nan = torch.full((-(-count // per_unit), self._unit), torch.nan, dtype=self._dtype)
        nan.view(torch.int32).view(-1)[:count] = index_S.int()
        return v_SW, index_S, first, self._put(nan)

    def build(self) -> torch.Tensor:
        """[N, U]."""
        return torch.cat(self._pieces)

    def _put(self, units: torch.Tensor) -> int:
        first = self._n_units
        self._pieces.append(units)
        self._n_units += len(units)
        self._gap(1)
        return first

    def _gap(self, units: int) -> None:
        self._pieces.append(torch.full((units, self._unit), torch.nan, dtype=self._dtype))
        self._n_units += units
