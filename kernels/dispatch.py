"""Which backend does the low-rank work: the one place that chooses, and the only import of each backend.

Must not know: adapters, requests, the model. A backend that was asked for and cannot run is an error, never a
quiet switch to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from motet.kernels.errors import BackendUnavailableError
from motet.kernels.ops import LowRankPlan
from motet.kernels.segments import Segments, TargetShape

Backend = Literal["reference", "cpu", "triton"]


def default_backend(device: torch.device) -> Backend:
    """The fast backend of a device: triton on CUDA, cpu elsewhere."""
    return "triton" if device.type == "cuda" else "cpu"


def low_rank_plan(
    backend: Backend,
    arena_NU: torch.Tensor,
    shapes: Sequence[TargetShape],
    segments: Segments,
    n_rows: int,
) -> LowRankPlan:
    """Prepare one step's low-rank work for every target.

    Args:
        backend: who does it; see `default_backend`.
        arena_NU: [N, U], contiguous, float32, float16 or bfloat16.
        shapes: [C] the targets, in the order of the segments' first axis.
        segments: who reads what; segments that outlive a step may reuse its plan.
        n_rows: T, rows in the batch.

    Returns:
        A plan whose `backend` is the one asked for.

    Raises:
        BackendUnavailableError: the backend cannot run here or on this arena.
    """
    assert arena_NU.is_contiguous(), f"the arena has strides {arena_NU.stride()}"
    segments.check(shapes, (arena_NU.shape[0], arena_NU.shape[1]), n_rows)
    match backend:
        case "reference":
            from motet.kernels.reference.low_rank import ReferencePlan

            return ReferencePlan(arena_NU, shapes, segments)
        case "cpu":
            from motet.kernels.cpu.low_rank import CpuPlan

            if arena_NU.device.type != "cpu":
                raise BackendUnavailableError(
                    f"backend 'cpu' needs the arena on the CPU, not on {arena_NU.device}; choose 'triton'"
                )
            return CpuPlan(arena_NU, shapes, segments)
        case "triton":
            return _triton_plan(arena_NU, shapes, segments)


def _triton_plan(arena_NU: torch.Tensor, shapes: Sequence[TargetShape], segments: Segments) -> LowRankPlan:
    try:
        from motet.kernels.triton.low_rank import INTERPRETED
        from motet.kernels.triton.plan import TritonPlan
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend 'triton' cannot be imported ({error}); install triton or choose 'cpu'"
        ) from error
    if arena_NU.device.type != "cuda" and not INTERPRETED:
        raise BackendUnavailableError(
            f"backend 'triton' needs the arena on CUDA, not on {arena_NU.device}; choose 'cpu', or set "
            "TRITON_INTERPRET=1 before triton is first imported to test the kernels without a GPU"
        )
    return TritonPlan(arena_NU, shapes, segments)
