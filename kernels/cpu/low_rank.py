"""The low-rank product without a GPU: per block two dense products and a mask, in plain torch.

Must not know: adapters, requests, what a block costs (`blocks` decides that).

Shapes: T batch rows (of a block, below `add_`), I/O a target's in/out widths, L rank rows of a block, C targets of a
group, S segments, R the largest rank, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from motet.kernels.arena_rows import ArenaRows, arena_rows
from motet.kernels.cpu.blocks import Block, CostModel, cost_model, cut
from motet.kernels.segments import Segments, TargetShape


@dataclass(frozen=True, slots=True, eq=False)
class _DenseBlock:
    """Some rows of the batch and all the rank rows they read.

    Attributes:
        rows: of the batch.
        a_LI: [L, I] per target.
        b_LO: [L, O] per target.
        foreign_TL: [T, L] bool, true where the rank row belongs to another adapter; None when none does.
        gate_TL: [T, L] float32, the factor of each own rank row; None when all are 1.
    """

    rows: slice
    a_LI: ArenaRows
    b_LO: ArenaRows
    foreign_TL: torch.Tensor | None
    gate_TL: torch.Tensor | None


class CpuPlan:
    """See `motet.kernels.ops.LowRankPlan`; rounds the rank-r intermediate to the arena's dtype.

    Note: preparing costs per group of targets that share widths, ranks and gates, so a gate that differs by target
    costs more to prepare than one that does not.
    """

    backend = "cpu"

    def __init__(self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: Segments) -> None:
        cost = cost_model(arena_NU.dtype)
        self._work: list[tuple[list[_DenseBlock], int]] = [([], 0)] * len(shapes)
        for group in _groups(shapes, segments):
            blocks = _prepare(arena_NU, shapes[group[0]], segments, group, cost)
            for position, target in enumerate(group):
                self._work[target] = (blocks, position)

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.LowRankPlan.add_`."""
        blocks, position = self._work[target]
        for block in blocks:
            s_TL = torch.mm(x_TI[block.rows], block.a_LI.read(position).T)
            if block.foreign_TL is not None:
                s_TL.masked_fill_(block.foreign_TL, 0)  # not a product with 0: the foreign value may have overflowed
            if block.gate_TL is not None:
                s_TL.mul_(block.gate_TL)
            y_TO[block.rows].addmm_(s_TL, block.b_LO.read(position))


def _groups(shapes: Sequence[TargetShape], segments: Segments) -> list[list[int]]:
    """Live targets that differ only in where their operands lie."""
    groups: dict[tuple[int, int, bytes, bytes], list[int]] = {}
    for target in np.flatnonzero(segments.rank.any(axis=1)).tolist():
        shape = shapes[target]
        gate = b"" if segments.gates is None else segments.gates.factor[target].tobytes()
        key = (shape.in_width, shape.out_width, segments.rank[target].tobytes(), gate)
        groups.setdefault(key, []).append(target)
    return list(groups.values())


def _prepare(
    arena_NU: torch.Tensor, shape: TargetShape, segments: Segments, group: list[int], cost: CostModel
) -> list[_DenseBlock]:
    a_first_CS, b_first_CS, rank_S = segments.a_first[group], segments.b_first[group], segments.rank[group[0]]
    # Two segments read the same operand when they do so on every target of the group.
    reads_S = np.concatenate([a_first_CS, b_first_CS, rank_S[None]]).T.copy()
    numbers: dict[bytes, int] = {}
    operand = [numbers.setdefault(reads.tobytes(), len(numbers)) for reads in reads_S]
    dense = []
    for block in cut(segments.row_start, segments.row_stop, rank_S, operand, shape.in_width + shape.out_width, cost):
        readers = list(block.operands.values())
        foreign_TL, gate_TL = _masks(block, segments, group[0], operand)
        dense.append(
            _DenseBlock(
                rows=slice(block.row_start, block.row_stop),
                a_LI=arena_rows(arena_NU, a_first_CS[:, readers], rank_S[readers], shape.in_width),
                b_LO=arena_rows(arena_NU, b_first_CS[:, readers], rank_S[readers], shape.out_width),
                foreign_TL=None if foreign_TL is None else torch.from_numpy(foreign_TL),
                gate_TL=None if gate_TL is None else torch.from_numpy(gate_TL),
            )
        )
    return dense


def _masks(
    block: Block, segments: Segments, target: int, operand: list[int]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(foreign, gate), each [T, L] or None where it would change nothing."""
    rank_S = segments.rank[target]
    readers = list(block.operands.values())
    begins = np.cumsum(rank_S[readers]) - rank_S[readers]
    columns = {o: slice(b, b + rank_S[s]) for (o, s), b in zip(block.operands.items(), begins, strict=True)}
    foreign_TL = np.ones((block.row_stop - block.row_start, block.n_ranks), dtype=np.bool_)
    gate_TL = np.ones(foreign_TL.shape, dtype=np.float32)
    for s in block.segments:
        rows = slice(segments.row_start[s] - block.row_start, segments.row_stop[s] - block.row_start)
        foreign_TL[rows, columns[operand[s]]] = False
        if (gates := segments.gates) is not None:
            of_rows = gates.of_row[segments.row_start[s] : segments.row_stop[s]]
            gate_TL[rows, columns[operand[s]]] = gates.factor[target, of_rows, : rank_S[s]]
    return (foreign_TL if foreign_TL.any() else None), (gate_TL if (gate_TL != 1).any() else None)
