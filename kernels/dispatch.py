"""Which backend does the low-rank, sparse and sign work: the one place that chooses, the only import of each.

Must not know: adapters, requests, the model. A backend that was asked for and cannot run is an error, never a
quiet switch to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from motet.kernels.cpu.compiled import DTYPES, Engine
from motet.kernels.errors import BackendUnavailableError
from motet.kernels.ops import LowRankPlan, SignPlan, SparsePlan
from motet.kernels.segments import Segments, TargetShape
from motet.kernels.sign import SignSegments
from motet.kernels.sparse import SparseSegments

Backend = Literal["reference", "cpu", "triton"]
LowRankBackend = Backend | Literal["native"]
"""The native backend has the low-rank product alone, and whole decoders (`motet.kernels.cpu.compiled`)."""


def default_backend(device: torch.device) -> Backend:
    """The fast backend of a device: triton on CUDA, cpu elsewhere."""
    return "triton" if device.type == "cuda" else "cpu"


def low_rank_plan(
    backend: LowRankBackend,
    arena_NU: torch.Tensor,
    shapes: Sequence[TargetShape],
    segments: Segments,
    n_rows: int,
    engine: Engine | None = None,
) -> LowRankPlan:
    """Prepare one step's low-rank work for every target.

    Args:
        backend: who does it; see `default_backend`.
        arena_NU: [N, U], contiguous, float32, float16 or bfloat16.
        shapes: [C] the targets, in the order of the segments' first axis.
        segments: who reads what; segments that outlive a step may reuse its plan.
        n_rows: T, rows in the batch.
        engine: the native backend's threads; no other needs it.

    Returns:
        A plan whose `backend` is the one asked for.

    Raises:
        BackendUnavailableError: the backend cannot run here or on this arena.
    """
    assert arena_NU.is_contiguous(), f"the arena has strides {arena_NU.stride()}"
    segments.check(shapes, (arena_NU.shape[0], arena_NU.shape[1]), n_rows)
    match backend:
        case "native":
            from motet.kernels.cpu.native_low_rank import NativePlan

            _check_native(arena_NU, shapes)
            assert engine is not None, "the native backend computes with an engine's threads"
            return NativePlan(engine, arena_NU, shapes, segments)
        case "reference":
            from motet.kernels.reference.low_rank import ReferencePlan

            return ReferencePlan(arena_NU, shapes, segments)
        case "cpu":
            from motet.kernels.cpu.low_rank import CpuPlan

            _check_cpu(arena_NU)
            return CpuPlan(arena_NU, shapes, segments)
        case "triton":
            _check_triton(arena_NU)
            from motet.kernels.triton.plan import TritonPlan

            return TritonPlan(arena_NU, shapes, segments)


def sparse_plan(
    backend: Backend,
    arena_NU: torch.Tensor,
    shapes: Sequence[TargetShape],
    columns: SparseSegments,
    rows: SparseSegments,
    n_rows: int,
) -> SparsePlan:
    """Prepare one step's ColumnSparse and RowSparse work for every target.

    Args:
        backend: who does it; see `default_backend`.
        arena_NU: [N, U], contiguous, float32, float16 or bfloat16; a unit's bytes are a multiple of four.
        shapes: [C] the targets, in the order of the segments' first axis.
        columns: who gathers what; segments that outlive a step may reuse its plan.
        rows: who scatters what; need not be cut like `columns`.
        n_rows: T, rows in the batch.

    Returns:
        A plan whose `backend` is the one asked for.

    Raises:
        BackendUnavailableError: the backend cannot run here or on this arena.
    """
    assert arena_NU.is_contiguous(), f"the arena has strides {arena_NU.stride()}"
    arena_shape = (arena_NU.shape[0], arena_NU.shape[1])
    in_widths, out_widths = [shape.in_width for shape in shapes], [shape.out_width for shape in shapes]
    columns.check(out_widths, in_widths, arena_shape, arena_NU.itemsize, n_rows)
    rows.check(in_widths, out_widths, arena_shape, arena_NU.itemsize, n_rows)
    match backend:
        case "reference":
            from motet.kernels.reference.sparse import ReferenceSparsePlan

            return ReferenceSparsePlan(arena_NU, shapes, columns, rows)
        case "cpu":
            from motet.kernels.cpu.sparse import CpuSparsePlan

            _check_cpu(arena_NU)
            return CpuSparsePlan(arena_NU, shapes, columns, rows)
        case "triton":
            _check_triton(arena_NU)
            from motet.kernels.triton.sparse_plan import TritonSparsePlan

            return TritonSparsePlan(arena_NU, shapes, columns, rows)


def sign_plan(
    backend: Backend,
    arena_NU: torch.Tensor,
    shapes: Sequence[TargetShape],
    segments: SignSegments,
    n_rows: int,
) -> SignPlan:
    """Prepare one step's work with packed signs for every target.

    Args:
        backend: who does it; see `default_backend`.
        arena_NU: [N, U], contiguous, float32, float16 or bfloat16; a unit's bytes are a multiple of four.
        shapes: [C] the targets, in the order of the segments' first axis.
        segments: who reads what; segments that outlive a step may reuse its plan.
        n_rows: T, rows in the batch.

    Returns:
        A plan whose `backend` is the one asked for.

    Raises:
        BackendUnavailableError: the backend cannot run here or on this arena.
    """
    assert arena_NU.is_contiguous(), f"the arena has strides {arena_NU.stride()}"
    segments.check(shapes, (arena_NU.shape[0], arena_NU.shape[1]), arena_NU.itemsize, n_rows)
    match backend:
        case "reference":
            from motet.kernels.reference.sign import ReferenceSignPlan

            return ReferenceSignPlan(arena_NU, shapes, segments)
        case "cpu":
            from motet.kernels.cpu.sign import CpuSignPlan

            _check_cpu(arena_NU)
            return CpuSignPlan(arena_NU, shapes, segments)
        case "triton":
            _check_triton(arena_NU)
            from motet.kernels.triton.sign_plan import TritonSignPlan

            return TritonSignPlan(arena_NU, shapes, segments)


def _check_cpu(arena_NU: torch.Tensor) -> None:
    if arena_NU.device.type != "cpu":
        raise BackendUnavailableError(
            f"backend 'cpu' needs the arena on the CPU, not on {arena_NU.device}; choose 'triton'"
        )


def _check_native(arena_NU: torch.Tensor, shapes: Sequence[TargetShape]) -> None:
    _check_cpu(arena_NU)
    odd = [shape.in_width for shape in shapes if shape.in_width * arena_NU.itemsize % 4]
    if arena_NU.dtype not in DTYPES or odd:
        what = f"in widths such as {odd[0]}" if arena_NU.dtype in DTYPES else f"an arena of {arena_NU.dtype}"
        raise BackendUnavailableError(
            f"backend 'native' computes in float32, and in bfloat16 with even in widths; {what} needs backend 'cpu'"
        )


def _check_triton(arena_NU: torch.Tensor) -> None:
    try:
        from motet.kernels.triton.low_rank import INTERPRETED
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend 'triton' cannot be imported ({error}); install triton or choose 'cpu'"
        ) from error
    if arena_NU.device.type != "cuda" and not INTERPRETED:
        raise BackendUnavailableError(
            f"backend 'triton' needs the arena on CUDA, not on {arena_NU.device}; choose 'cpu', or set "
            "TRITON_INTERPRET=1 before triton is first imported to test the kernels without a GPU"
        )
