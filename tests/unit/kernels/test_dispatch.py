"""An explicit choice of backend is honoured or refused, never quietly changed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from motet.kernels.dispatch import default_backend, low_rank_plan
from motet.kernels.errors import BackendUnavailableError
from motet.kernels.segments import Segments, TargetShape


def _nothing_to_do() -> tuple[list[TargetShape], Segments]:
    rows, operands = np.zeros(0, dtype=np.int32), np.zeros((1, 0), dtype=np.int32)
    return [TargetShape(64, 64)], Segments(rows, rows, operands, operands, operands)


def test_default_backend_follows_the_device() -> None:
    assert default_backend(torch.device("cuda")) == "triton"
    assert default_backend(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_empty_step_is_a_plan_too(backend) -> None:
    shapes, segments = _nothing_to_do()
    plan = low_rank_plan(backend, torch.zeros(4, 64), shapes, segments, n_rows=0)
    plan.add_(0, torch.zeros(0, 64), torch.zeros(0, 64))
    assert plan.backend == backend


def test_cpu_refuses_an_arena_elsewhere() -> None:
    with pytest.raises(BackendUnavailableError, match="needs the arena on the CPU, not on meta"):
        low_rank_plan("cpu", torch.zeros(4, 64, device="meta"), *_nothing_to_do(), n_rows=0)


def test_triton_refuses_the_cpu_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.kernels.triton.low_rank.INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET"):
        low_rank_plan("triton", torch.zeros(4, 64), *_nothing_to_do(), n_rows=0)


def test_missing_triton_is_an_error_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "motet.kernels.triton.low_rank", None)
    with pytest.raises(BackendUnavailableError, match="install triton or choose 'cpu'"):
        low_rank_plan("triton", torch.zeros(4, 64), *_nothing_to_do(), n_rows=0)
