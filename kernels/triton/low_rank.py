# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# Triton reads a kernel's annotations itself, so only its compile-time arguments carry one.
"""The two Triton kernels of the low-rank product: shrink (x → rank) and expand (rank → y).

Must not know: how a step is cut into tiles (`plan`).

Both work on row tiles of one segment each. The intermediate s is ragged: segment after segment, [T_s, R_s] each, in
the arena's dtype. No atomics, every element is summed by one program in a fixed order: results are deterministic.

Tables (int64, rows of four, so that every row is aligned alike and nothing is re-specialised):
    tiles [K, 4]: segment, row_start, row_stop, the tile's first row within its segment.
    operands [C, S, 4]: rank, A's first element, Bᵀ's first element (both in the arena), s's first element.

Shapes: K tiles, C targets, S segments, T rows of a tile, R rank rows of a tile, I/O in/out widths.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels below run under Triton's interpreter, which is settled when they are decorated."""


@triton.jit(do_not_specialize=["target", "n_segments", "n_gates", "gate_width"])
def shrink(
    x_ptr,
    arena_ptr,
    s_ptr,
    gate_ptr,
    gate_of_row_ptr,
    tiles_ptr,
    operands_ptr,
    target,
    n_segments,
    n_gates,
    gate_width,
    in_width,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """s_TR = g_TR ⊙ (x_TI · A_RIᵀ) for one row tile and one block of rank rows.

    The gates are gate_ptr [C, G, gate_width] float32, gate_of_row_ptr int32 says which a batch row has; both are None
    where all are 1.
    """
    tile = tiles_ptr + tl.program_id(0) * 4
    segment = tl.load(tile)
    row_start = tl.load(tile + 1)
    row_stop = tl.load(tile + 2)
    row_in_segment = tl.load(tile + 3)
    target_segment = target * n_segments + segment
    operand = operands_ptr + target_segment * 4
    rank = tl.load(operand)
    a_first = tl.load(operand + 1)
    s_first = tl.load(operand + 3)
    if tl.program_id(1) * BLOCK_R >= rank:
        return

    t = tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_live = row_start + t < row_stop
    r_live = r < rank
    x_row = x_ptr + (row_start + t)[:, None] * in_width
    a_row = arena_ptr + a_first + r[None, :].to(tl.int64) * in_width
    s_TR = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for i_start in range(0, in_width, BLOCK_I):
        i = i_start + tl.arange(0, BLOCK_I)
        i_live = i < in_width
        x_TI = tl.load(x_row + i[None, :], mask=t_live[:, None] & i_live[None, :], other=0.0)
        a_IR = tl.load(a_row + i[:, None], mask=i_live[:, None] & r_live[None, :], other=0.0)
        s_TR = tl.dot(x_TI, a_IR, acc=s_TR, input_precision="ieee")
    if gate_ptr is not None:
        gate_T = target * n_gates + tl.load(gate_of_row_ptr + row_start + t, mask=t_live, other=0)
        gate_row = gate_ptr + gate_T[:, None].to(tl.int64) * gate_width
        s_TR *= tl.load(gate_row + r[None, :], mask=t_live[:, None] & r_live[None, :], other=0.0)
    s_out = s_ptr + s_first + (row_in_segment + t)[:, None] * rank + r[None, :]
    tl.store(s_out, s_TR.to(s_ptr.dtype.element_ty), mask=t_live[:, None] & r_live[None, :])


@triton.jit(do_not_specialize=["target", "n_segments"])
def expand(
    s_ptr,
    arena_ptr,
    y_ptr,
    tiles_ptr,
    operands_ptr,
    target,
    n_segments,
    out_width,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y_TO += s_TR · Bᵀ_RO for one row tile and one block of outputs; summed in float32, rounded once."""
    tile = tiles_ptr + tl.program_id(0) * 4
    segment = tl.load(tile)
    row_start = tl.load(tile + 1)
    row_stop = tl.load(tile + 2)
    row_in_segment = tl.load(tile + 3)
    operand = operands_ptr + (target * n_segments + segment) * 4
    rank = tl.load(operand)
    b_first = tl.load(operand + 2)
    s_first = tl.load(operand + 3)
    if rank == 0:
        return

    t = tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_live = row_start + t < row_stop
    o_live = o < out_width
    live = t_live[:, None] & o_live[None, :]
    y_out = y_ptr + (row_start + t)[:, None] * out_width + o[None, :]
    y_TO = tl.load(y_out, mask=live, other=0.0).to(tl.float32)
    s_row = s_ptr + s_first + (row_in_segment + t)[:, None] * rank
    for r_start in range(0, rank, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        r_live = r < rank
        s_TR = tl.load(s_row + r[None, :], mask=t_live[:, None] & r_live[None, :], other=0.0)
        b_row = arena_ptr + b_first + r[:, None].to(tl.int64) * out_width
        b_RO = tl.load(b_row + o[None, :], mask=r_live[:, None] & o_live[None, :], other=0.0)
        y_TO = tl.dot(s_TR, b_RO, acc=y_TO, input_precision="ieee")
    tl.store(y_out, y_TO.to(y_ptr.dtype.element_ty), mask=live)
