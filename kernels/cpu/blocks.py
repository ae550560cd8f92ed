"""Where the CPU path cuts a batch: which neighbouring segments are multiplied together as one dense block.

Must not know: tensors, the arena. Decides only; `low_rank` acts.

A block multiplies all its rows with all its rank rows and masks what a row has no business with. That wastes
arithmetic, but one block costs a handful of torch calls however many segments it holds. So decode, where every row may
have another adapter, becomes few blocks, and each long prefill segment stays a block of its own, without waste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from motet.kernels.segments import Int32


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a block costs beside its useful arithmetic, in multiply-adds of the same machine and dtype."""

    block: int
    """Opening a block: its torch calls."""
    copied_element: int
    """Gathering one element of an operand."""


# Measured with torch 2.13 on two cores with AVX-512 and bf16 dot products, in/out widths 576 and 1536, rank 16: a
# block 35 µs (bf16), 13 µs (f32); a multiply-add 3.4 ps, 13 ps; a copied element 35 ps, and in f32 55 ps while it is in
# cache. Over whole steps, where it is not, 16 was the fastest of 4, 8 and 16 for f32 (8, 32 and 64 rows; ranks 16, 64).
_COSTS = {torch.bfloat16: CostModel(block=10_000_000, copied_element=10)}
_DEFAULT_COST = CostModel(block=1_000_000, copied_element=16)


def cost_model(dtype: torch.dtype) -> CostModel:
    """The measured costs of a dtype."""
    return _COSTS.get(dtype, _DEFAULT_COST)


@dataclass(slots=True)
class Block:
    """Neighbouring segments, multiplied together.

    Attributes:
        row_start: first row.
        row_stop: one past the last; rows in between without a segment are masked.
        segments: all segments in the block, ascending.
        operands: distinct operand → the first segment that reads it, in the order of their rank rows.
        n_ranks: rank rows of all distinct operands.
        useful: multiply-adds per width element that some row has asked for.
    """

    row_start: int
    row_stop: int
    segments: list[int] = field(default_factory=list)
    operands: dict[int, int] = field(default_factory=dict)
    n_ranks: int = 0
    useful: int = 0


def cut(
    row_start: Int32, row_stop: Int32, rank: Int32, operand: Sequence[int], width: int, cost: CostModel
) -> list[Block]:
    """Cut the live segments of one target into blocks.

    Semantics: walk the rows; a segment joins the current block while what the block then wastes, and the copy of the
    segment's operand, cost no more than opening another block. For n equal segments the waste grows with n², so
    stopping where it equals one block's cost makes the sum of both smallest.

    Args:
        row_start: [S] first row of each segment; ascending.
        row_stop: [S] one past the last.
        rank: [S] 0 where the segment does not touch the target; such segments are in no block.
        operand: [S] equal numbers read the same rank rows.
        width: elements per rank row, in and out together.
        cost: of this dtype.

    Returns:
        Blocks in row order; every live segment is in exactly one.
    """
    blocks: list[Block] = []
    for s, (start, stop, r) in enumerate(zip(row_start.tolist(), row_stop.tolist(), rank.tolist(), strict=True)):
        if r == 0:
            continue
        useful = (stop - start) * r
        if blocks:
            block = blocks[-1]
            new_ranks = 0 if operand[s] in block.operands else r
            n_ranks = block.n_ranks + new_ranks
            waste = (stop - block.row_start) * n_ranks - block.useful - useful
            if (waste + cost.copied_element * new_ranks) * width <= cost.block:
                _join(block, s, stop, operand[s], n_ranks, useful)
                continue
        blocks.append(Block(start, stop))
        _join(blocks[-1], s, stop, operand[s], r, useful)
    return blocks


def _join(block: Block, segment: int, row_stop: int, operand: int, n_ranks: int, useful: int) -> None:
    block.row_stop = row_stop
    block.segments.append(segment)
    block.operands.setdefault(operand, segment)
    block.n_ranks = n_ranks
    block.useful += useful
