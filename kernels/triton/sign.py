# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
# Triton reads a kernel's annotations itself, so only its compile-time arguments carry one.
"""The Triton kernel of the sign product: signs are unpacked in registers and multiplied like any weight.

Must not know: how a step is cut into tiles (`sign_plan`).

It works on row tiles of one segment each and sums in float32 onto y, which one program reads, adds to and writes once
per element: no atomics are needed and results are deterministic.

Tables (int64, rows of four, so that every row is aligned alike and nothing is re-specialised):
    tiles [K, 4]: segment, row_start, row_stop, unused here.
    operands [C, S, 4]: 1 where the segment has signs on the target, else 0; the first int32 word; two unused.

Shapes: K tiles, C targets, S segments, T rows of a tile, I/O in/out widths, P words of a row of signs.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["target", "n_segments"])
def add_signs(
    x_ptr,
    word_ptr,
    alpha_ptr,
    y_ptr,
    tiles_ptr,
    operands_ptr,
    target,
    n_segments,
    in_width,
    out_width,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """y_TO += α (x_TI · sign_OIᵀ) for one row tile and one block of outputs; word_ptr is the arena as int32."""
    tile = tiles_ptr + tl.program_id(0) * 4
    segment = tl.load(tile)
    row_start = tl.load(tile + 1)
    row_stop = tl.load(tile + 2)
    target_segment = target * n_segments + segment
    operand = operands_ptr + target_segment * 4
    present = tl.load(operand)
    first = tl.load(operand + 1)
    if present == 0:
        return

    t = tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_live = row_start + t < row_stop
    o_live = o < out_width
    live = t_live[:, None] & o_live[None, :]
    x_row = x_ptr + (row_start + t)[:, None] * in_width
    word_row = word_ptr + first + o[None, :].to(tl.int64) * tl.cdiv(in_width, 32)
    sum_TO = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for i_start in range(0, in_width, BLOCK_I):
        i = i_start + tl.arange(0, BLOCK_I)
        i_live = i < in_width
        x_TI = tl.load(x_row + i[None, :], mask=t_live[:, None] & i_live[None, :], other=0.0)
        word_IO = tl.load(word_row + (i // 32)[:, None], mask=i_live[:, None] & o_live[None, :], other=0)
        sign_IO = ((word_IO >> (i % 32)[:, None]) & 1) * 2 - 1
        sum_TO = tl.dot(x_TI, sign_IO.to(x_TI.dtype), acc=sum_TO, input_precision="ieee")
    alpha = tl.load(alpha_ptr + target_segment)
    y_out = y_ptr + (row_start + t)[:, None] * out_width + o[None, :]
    y_TO = tl.load(y_out, mask=live, other=0.0).to(tl.float32) + alpha * sum_TO
    tl.store(y_out, y_TO.to(y_ptr.dtype.element_ty), mask=live)
