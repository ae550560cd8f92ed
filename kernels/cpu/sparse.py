"""The two sparse products without a GPU: per block one dense product, in plain torch.

Must not know: adapters, requests, what a block costs (`blocks` decides that).

Gathering k inputs is the product with a one-hot A that no one need store, so a batch is cut into blocks as for the
low-rank product: neighbouring segments are multiplied together and what is not theirs is masked.

Shapes: T batch rows (of a block, below `add_`), I/O a target's in/out widths, L indices of a block's operands, K own
(row, index) pairs of a block, S segments, C targets, N units in the arena, U elements per unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from motet.kernels.cpu.blocks import Block, CostModel, cost_model, cut
from motet.kernels.segments import TargetShape
from motet.kernels.sparse import INDEX_BYTES, SparseSegments


@dataclass(frozen=True, slots=True, eq=False)
class _GatherBlock:
    """Some rows of the batch and the inputs they read.

    Attributes:
        rows: of the batch.
        index_L: int32, which inputs.
        v_LO: Vᵀ.
        foreign_TL: bool, true where the index belongs to another adapter; None when none does.
    """

    rows: slice
    index_L: torch.Tensor
    v_LO: torch.Tensor
    foreign_TL: torch.Tensor | None

    def add_(self, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add to the block's rows of the whole batch."""
        s_TL = x_TI[self.rows].index_select(1, self.index_L)
        if self.foreign_TL is not None:
            s_TL.masked_fill_(self.foreign_TL, 0)  # not a product with 0: an input need not be finite
        y_TO[self.rows].addmm_(s_TL, self.v_LO)


@dataclass(frozen=True, slots=True, eq=False)
class _ScatterBlock:
    """Some rows of the batch, all of one operand.

    Attributes:
        rows: of the batch.
        index_L: int64, which outputs; distinct.
        v_LI: V.
    """

    rows: slice
    index_L: torch.Tensor
    v_LI: torch.Tensor

    def add_(self, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add to the block's rows of the whole batch."""
        s_TL = torch.mm(x_TI[self.rows], self.v_LI.T)
        y_rows = y_TO[self.rows]
        # index_add_ walks the batch once per index: 585 µs where these two take 50 (512 rows, 46 of 4096, torch 2.13).
        y_rows.index_copy_(1, self.index_L, s_TL.add_(y_rows.index_select(1, self.index_L)))


@dataclass(frozen=True, slots=True, eq=False)
class _SharedScatterBlock:
    """Some rows of the batch, of several operands: few, or they would not share a block.

    Attributes:
        rows: of the batch.
        own_K: int64, which elements of the product [T, L] a row has asked for.
        into_K: int64, which elements of the batch's y they belong to; distinct.
        v_LI: V.
    """

    rows: slice
    own_K: torch.Tensor
    into_K: torch.Tensor
    v_LI: torch.Tensor

    def add_(self, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """Add to the block's rows of the whole batch."""
        s_TL = torch.mm(x_TI[self.rows], self.v_LI.T)
        y_TO.put_(self.into_K, s_TL.take(self.own_K), accumulate=True)


_Work = list[_GatherBlock | _ScatterBlock | _SharedScatterBlock]


class CpuSparsePlan:
    """See `motet.kernels.ops.SparsePlan`; rounds what it scatters to the arena's dtype before it adds it.

    Note: a target is prepared at its first call. From then on the plan keeps a copy of the operands that share a block
    with another (a lone one is read in place), so a plan used for many steps copies them once. `cut` lets operands
    share a block only while they are small.
    """

    backend = "cpu"

    def __init__(
        self, arena_NU: torch.Tensor, shapes: Sequence[TargetShape], columns: SparseSegments, rows: SparseSegments
    ) -> None:
        cost = cost_model(arena_NU.dtype)
        self._shapes = shapes
        self._columns = _Operands(arena_NU, columns, cost)
        self._rows = _Operands(arena_NU, rows, cost)
        self._touched: list[bool] = np.logical_or(columns.count.any(axis=1), rows.count.any(axis=1)).tolist()
        self._work: list[_Work | None] = [None if touched else [] for touched in self._touched]

    def touches(self, target: int) -> bool:
        """See `motet.kernels.ops.SparsePlan.touches`."""
        return self._touched[target]

    def add_(self, target: int, y_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
        """See `motet.kernels.ops.SparsePlan.add_`."""
        work = self._work[target]
        if work is None:
            work = self._work[target] = self._prepare(target)
        for block in work:
            block.add_(y_TO, x_TI)

    def _prepare(self, target: int) -> _Work:
        shape = self._shapes[target]
        gather, scatter = self._columns, self._rows
        work: _Work = [_gather_block(gather, target, shape, block) for block in gather.cut(target, shape.out_width)]
        work += [_scatter_block(scatter, target, shape, block) for block in scatter.cut(target, shape.in_width)]
        return work


class _Operands:
    """What the segments of one effect read, target by target."""

    def __init__(self, arena_NU: torch.Tensor, segments: SparseSegments, cost: CostModel) -> None:
        unit = arena_NU.shape[1]
        self._flat = arena_NU.view(-1)
        self._flat_int32 = arena_NU.view(torch.int32).view(-1).numpy()
        self._first_CS = segments.first.astype(np.int64) * unit
        self._index_first_CS = segments.index_first.astype(np.int64) * (unit * arena_NU.itemsize // INDEX_BYTES)
        self._segments = segments
        self._rows: list[tuple[int, int]] = list(
            zip(segments.row_start.tolist(), segments.row_stop.tolist(), strict=True)
        )
        self._operand_S = segments.operands()
        self._cost = cost

    def cut(self, target: int, width: int) -> list[Block]:
        """The blocks of a target whose operands have rows of `width` elements."""
        segments = self._segments
        return cut(segments.row_start, segments.row_stop, segments.count[target], self._operand_S, width, self._cost)

    def read(
        self, target: int, block: Block, width: int
    ) -> tuple[torch.Tensor, npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """What a block multiplies, one operand after the other; views of the arena where there is only one.

        Returns:
            V [L, width]; indices [L]; [T, L] true where a row of the block reads the index.
        """
        readers = list(block.operands.values())
        counts: list[int] = self._segments.count[target, readers].tolist()
        firsts: list[int] = self._first_CS[target, readers].tolist()
        index_firsts: list[int] = self._index_first_CS[target, readers].tolist()
        v = [
            self._flat.as_strided((count, width), (width, 1), first)
            for count, first in zip(counts, firsts, strict=True)
        ]
        index = [self._flat_int32[first : first + count] for count, first in zip(counts, index_firsts, strict=True)]
        columns = {o: slice(b - n, b) for o, n, b in zip(block.operands, counts, accumulate(counts), strict=True)}
        own_TL = np.zeros((block.row_stop - block.row_start, block.n_ranks), dtype=np.bool_)
        for s in block.segments:
            start, stop = self._rows[s]
            own_TL[start - block.row_start : stop - block.row_start, columns[self._operand_S[s]]] = True
        return (v[0], index[0], own_TL) if len(v) == 1 else (torch.cat(v), np.concatenate(index), own_TL)


def _gather_block(columns: _Operands, target: int, shape: TargetShape, block: Block) -> _GatherBlock:
    v_LO, index_L, own_TL = columns.read(target, block, shape.out_width)
    foreign_TL = None if own_TL.all() else torch.from_numpy(~own_TL)
    return _GatherBlock(slice(block.row_start, block.row_stop), torch.from_numpy(index_L), v_LO, foreign_TL)


def _scatter_block(
    rows: _Operands, target: int, shape: TargetShape, block: Block
) -> _ScatterBlock | _SharedScatterBlock:
    v_LI, index_L, own_TL = rows.read(target, block, shape.in_width)
    if own_TL.all():
        return _ScatterBlock(slice(block.row_start, block.row_stop), torch.from_numpy(index_L).long(), v_LI)
    t_K, l_K = np.nonzero(own_TL)
    return _SharedScatterBlock(
        rows=slice(block.row_start, block.row_stop),
        own_K=torch.from_numpy(t_K * own_TL.shape[1] + l_K),
        into_K=torch.from_numpy((t_K + block.row_start) * shape.out_width + index_L[l_K]),
        v_LI=v_LI,
    )
