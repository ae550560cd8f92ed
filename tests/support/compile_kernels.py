"""Compile the Triton kernels for an NVIDIA GPU; needs none. Run as a module, without TRITON_INTERPRET."""

from __future__ import annotations

from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from motet.kernels.triton.low_rank import INTERPRETED, expand, shrink
from motet.kernels.triton.sign import add_signs
from motet.kernels.triton.sparse import gather, scatter

TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]


def compile_all() -> None:
    """Every kernel in both half precisions, the shrink with and without a gate."""
    assert not INTERPRETED
    blocks = {"BLOCK_T": 16, "BLOCK_R": 64}
    sparse_blocks = {"BLOCK_T": 16, "BLOCK_S": 64}
    integers = dict.fromkeys(["target", "n_segments", "n_gates", "gate_width", "in_width", "out_width"], "i32")
    tables = {"tiles_ptr": "*i64", "operands_ptr": "*i64", "index_ptr": "*i32"}
    signs = {"word_ptr": "*i32", "alpha_ptr": "*fp32"}
    for target, dtype in product(TARGETS, ["bf16", "fp16"]):
        types = dict.fromkeys(["x_ptr", "arena_ptr", "s_ptr", "y_ptr"], f"*{dtype}") | integers | tables | signs
        for kernel, constants in (
            (shrink, {**blocks, "BLOCK_I": 64}),
            (shrink, {**blocks, "BLOCK_I": 64, "gate_ptr": None, "gate_of_row_ptr": None}),
            (expand, {**blocks, "BLOCK_O": 128}),
            (gather, {**sparse_blocks, "BLOCK_O": 128}),
            (scatter, {**sparse_blocks, "BLOCK_I": 64}),
            (add_signs, {"BLOCK_T": 16, "BLOCK_I": 64, "BLOCK_O": 128}),
        ):
            every = types | {"gate_ptr": "*fp32", "gate_of_row_ptr": "*i32"} | dict.fromkeys(constants, "constexpr")
            signature = {name: every[name] for name in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            triton.compile(source, target=target, options={"enable_fp_fusion": True})
            print(f"{kernel.__name__} {dtype} sm_{target.arch}")


if __name__ == "__main__":
    compile_all()
