# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# Triton reads a kernel's annotations itself, so only its compile-time arguments carry one.
"""The two Triton kernels of the sparse products: gather (chosen inputs → y) and scatter (x → chosen outputs).

Must not know: how a step is cut into tiles (`sparse_plan`).

Both work on row tiles of one segment each and sum in float32 onto y, which one program reads, adds to and writes once
per element: the indices of an operand are distinct, so no atomics are needed and results are deterministic.

Tables (int64, rows of four, so that every row is aligned alike and nothing is re-specialised):
    tiles [K, 4]: segment, row_start, row_stop, unused here.
    operands [C, S, 4]: count, the operand's first element, the index list's first int32 (both in the arena), unused.

Shapes: K tiles, C targets, S segments (of the tables) or indices (of a block), T rows of a tile, I/O in/out widths.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["target", "n_segments"])
def gather(
    x_ptr,
    arena_ptr,
    index_ptr,
    y_ptr,
    tiles_ptr,
    operands_ptr,
    target,
    n_segments,
    in_width,
    out_width,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y_TO += x[T, idx_S] · Vᵀ_SO for one row tile and one block of outputs; index_ptr is the arena as int32."""
    tile = tiles_ptr + tl.program_id(0) * 4
    segment = tl.load(tile)
    row_start = tl.load(tile + 1)
    row_stop = tl.load(tile + 2)
    operand = operands_ptr + (target * n_segments + segment) * 4
    count = tl.load(operand)
    v_first = tl.load(operand + 1)
    index_first = tl.load(operand + 2)
    if count == 0:
        return

    t = tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_live = row_start + t < row_stop
    o_live = o < out_width
    live = t_live[:, None] & o_live[None, :]
    y_out = y_ptr + (row_start + t)[:, None] * out_width + o[None, :]
    y_TO = tl.load(y_out, mask=live, other=0.0).to(tl.float32)
    x_row = x_ptr + (row_start + t)[:, None] * in_width
    for s_start in range(0, count, BLOCK_S):
        s = s_start + tl.arange(0, BLOCK_S)
        s_live = s < count
        index_S = tl.load(index_ptr + index_first + s, mask=s_live, other=0)
        x_TS = tl.load(x_row + index_S[None, :], mask=t_live[:, None] & s_live[None, :], other=0.0)
        v_row = arena_ptr + v_first + s[:, None].to(tl.int64) * out_width
        v_SO = tl.load(v_row + o[None, :], mask=s_live[:, None] & o_live[None, :], other=0.0)
        y_TO = tl.dot(x_TS, v_SO, acc=y_TO, input_precision="ieee")
    tl.store(y_out, y_TO.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["target", "n_segments"])
def scatter(
    x_ptr,
    arena_ptr,
    index_ptr,
    y_ptr,
    tiles_ptr,
    operands_ptr,
    target,
    n_segments,
    in_width,
    out_width,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """y[T, idx_S] += x_TI · V_SIᵀ for one row tile and one block of indices; index_ptr is the arena as int32."""
    tile = tiles_ptr + tl.program_id(0) * 4
    segment = tl.load(tile)
    row_start = tl.load(tile + 1)
    row_stop = tl.load(tile + 2)
    operand = operands_ptr + (target * n_segments + segment) * 4
    count = tl.load(operand)
    v_first = tl.load(operand + 1)
    index_first = tl.load(operand + 2)
    if tl.program_id(1) * BLOCK_S >= count:
        return

    t = tl.arange(0, BLOCK_T)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    t_live = row_start + t < row_stop
    s_live = s < count
    live = t_live[:, None] & s_live[None, :]
    index_S = tl.load(index_ptr + index_first + s, mask=s_live, other=0)
    y_out = y_ptr + (row_start + t)[:, None] * out_width + index_S[None, :]
    y_TS = tl.load(y_out, mask=live, other=0.0).to(tl.float32)
    x_row = x_ptr + (row_start + t)[:, None] * in_width
    v_row = arena_ptr + v_first + s[None, :].to(tl.int64) * in_width
    for i_start in range(0, in_width, BLOCK_I):
        i = i_start + tl.arange(0, BLOCK_I)
        i_live = i < in_width
        x_TI = tl.load(x_row + i[None, :], mask=t_live[:, None] & i_live[None, :], other=0.0)
        v_IS = tl.load(v_row + i[:, None], mask=i_live[:, None] & s_live[None, :], other=0.0)
        y_TS = tl.dot(x_TI, v_IS, acc=y_TS, input_precision="ieee")
    tl.store(y_out, y_TS.to(y_ptr.dtype.element_ty), mask=live)
