"""Batches for the low-rank kernels, with an oracle that shares no code with them.

The arena is NaN wherever no live operand lies, so that a read outside shows.

Shapes: T batch rows, I/O a target's in/out widths, C targets, S segments, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from motet.kernels.cpu.compiled import Engine
from motet.kernels.dispatch import LowRankBackend, low_rank_plan
from motet.kernels.segments import Gates, Segments, TargetShape
from tests.support.native import native_engine

Gate = Literal["none", "random", "zero", "one-hot"]


@dataclass(frozen=True)
class Run:
    """Consecutive rows of the batch: of one adapter, or of none."""

    adapter: int | None
    n_rows: int


@dataclass(frozen=True)
class Case:
    """A batch and what it should become."""

    arena_NU: torch.Tensor
    shapes: list[TargetShape]
    segments: Segments
    x_TI: list[torch.Tensor]
    y_TO: list[torch.Tensor]
    expected_TO: list[torch.Tensor]
    """[C] float64, from dense products."""
    magnitude_TO: list[torch.Tensor]
    """[C] float64, |y| + Σ_r |g_r s_r Bᵀ_r|: what a backend may round on the way to each element."""

    @property
    def n_rows(self) -> int:
        return len(self.y_TO[0])

    def run(self, backend: LowRankBackend, engine: Engine | None = None) -> list[torch.Tensor]:
        """[C] what the backend makes of y; asserts that it was this backend.

        Args:
            engine: of the native backend; None is the fastest of this machine.
        """
        engine = native_engine() if engine is None and backend == "native" else engine
        plan = low_rank_plan(backend, self.arena_NU, self.shapes, self.segments, self.n_rows, engine)
        assert plan.backend == backend
        outputs = []
        for target, (x_TI, y_TO) in enumerate(zip(self.x_TI, self.y_TO, strict=True)):
            out_TO = y_TO.clone()
            plan.add_(target, out_TO, x_TI)
            outputs.append(out_TO)
        return outputs


def make_case(
    runs: Sequence[Run],
    ranks: Sequence[Sequence[int]],
    shapes: Sequence[tuple[int, int]],
    *,
    unit: int,
    dtype: torch.dtype,
    gate: Gate = "none",
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Random operands and rows of order 1.

    Args:
        runs: the batch, row after row.
        ranks: [adapters][C] true ranks.
        shapes: [C] (in, out) widths.
        unit: U.
        dtype: of the arena, x and y.
        gate: one random kind for each (target, run), or none; with gates, neighbouring runs of one adapter are one
            segment.
        device: of the tensors.
        seed: of all that is random.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random).to(dtype)

    # Operands lie in random order with NaN between them.
    operands = {}
    for adapter, by_target in enumerate(ranks):
        for c, ((i, o), rank) in enumerate(zip(shapes, by_target, strict=True)):
            operands[adapter, c, "a"] = normal(rank, i) / i**0.5
            operands[adapter, c, "b"] = normal(rank, o) / max(rank, 1) ** 0.5
    names = list(operands)
    pieces, first, n_units = [torch.full((2, unit), torch.nan, dtype=dtype)], {}, 2
    for k in torch.randperm(len(names), generator=random).tolist():
        units = operands[names[k]].reshape(-1, unit)
        first[names[k]] = n_units
        pieces += [units, torch.full((1, unit), torch.nan, dtype=dtype)]
        n_units += len(units) + 1
    arena_NU = torch.cat(pieces)

    stops = np.cumsum([run.n_rows for run in runs], dtype=np.int32)
    starts = stops - np.array([run.n_rows for run in runs], dtype=np.int32)
    taken = [s for s, run in enumerate(runs) if run.adapter is not None]
    adapters = [run.adapter for run in runs if run.adapter is not None]
    size = (len(shapes), len(taken))
    a_first, b_first, rank = (np.full(size, fill, dtype=np.int32) for fill in (10**9, 10**9, 0))
    largest = max((max(by_target) for by_target in ranks), default=0)
    factor_CGR = np.zeros((*size, largest), dtype=np.float32)
    x_TI = [normal(int(stops[-1]), i) for i, _ in shapes]
    y_TO = [normal(int(stops[-1]), o) for _, o in shapes]
    expected_TO = [y.double() for y in y_TO]
    magnitude_TO = [y.double().abs() for y in y_TO]
    for c in range(size[0]):
        for s, adapter in enumerate(adapters):
            a_RI, b_RO = operands[adapter, c, "a"].double(), operands[adapter, c, "b"].double()
            rank[c, s] = len(a_RI)
            g_R = _gate(gate, len(a_RI), random)
            factor_CGR[c, s, : len(a_RI)] = g_R
            if len(a_RI) > 0:
                a_first[c, s], b_first[c, s] = first[adapter, c, "a"], first[adapter, c, "b"]
            rows = slice(starts[taken[s]], stops[taken[s]])
            delta_OI = b_RO.T @ torch.diag(g_R.double()) @ a_RI
            expected_TO[c][rows] += x_TI[c][rows].double() @ delta_OI.T
            magnitude_TO[c][rows] += (x_TI[c][rows].double() @ a_RI.T * g_R).abs() @ b_RO.abs()
    segments = Segments(starts[taken], stops[taken], a_first, b_first, rank)
    if gate != "none" and taken:
        of_row = np.zeros(stops[-1], dtype=np.int32)
        for s, run in enumerate(taken):
            of_row[starts[run] : stops[run]] = s
        follows = [
            s > 0 and adapters[s] == adapters[s - 1] and stops[taken[s - 1]] == starts[taken[s]]
            for s in range(len(taken))
        ]
        firsts = [s for s, continued in enumerate(follows) if not continued]
        lasts = [*(s - 1 for s in firsts[1:]), len(taken) - 1]
        segments = Segments(
            segments.row_start[firsts],
            segments.row_stop[lasts],
            a_first[:, firsts],
            b_first[:, firsts],
            rank[:, firsts],
            Gates(of_row, factor_CGR),
        )
    return Case(
        arena_NU=arena_NU.to(device),
        shapes=[TargetShape(i, o) for i, o in shapes],
        segments=segments,
        x_TI=[x.to(device) for x in x_TI],
        y_TO=[y.to(device) for y in y_TO],
        expected_TO=[y.to(device) for y in expected_TO],
        magnitude_TO=[y.to(device) for y in magnitude_TO],
    )


def _gate(kind: Gate, rank: int, random: torch.Generator) -> torch.Tensor:
    """[rank] factors, float32."""
    match kind:
        case "none":
            return torch.ones(rank)
        case "random":
            return torch.randn(rank, generator=random)
        case "zero":
            return torch.zeros(rank)
        case "one-hot":
            return torch.nn.functional.one_hot(torch.tensor(rank // 2), max(rank, 1))[:rank].float()
