"""Each row's own output scale and bias, against a loop over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from motet.kernels.epilogue import RowVectorPlan, RowVectors
from tests.support.tolerances import TOLERANCES

UNIT = 192
WIDTHS = [576, 192, 576]
# Rows 0–1 and 5 belong to nobody; one segment is long enough to stand alone.
ROW_START = np.array([2, 3, 6, 7, 60], dtype=np.int32)
ROW_STOP = np.array([3, 5, 7, 60, 63], dtype=np.int32)
N_ROWS = 64
PRESENT = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]], dtype=np.bool_)


def _vectors(dtype: torch.dtype) -> tuple[torch.Tensor, RowVectors, list[torch.Tensor]]:
    """(arena, NaN outside the vectors; who has which; [C] the dense float32 [T, O], 0 where a row has none)."""
    random = torch.Generator().manual_seed(1)
    arena_NU = torch.full((200, UNIT), torch.nan, dtype=dtype)
    first = np.full(PRESENT.shape, 10**9, dtype=np.int32)
    dense = [torch.zeros(N_ROWS, width) for width in WIDTHS]
    unit = 3
    for c, s in zip(*np.nonzero(PRESENT), strict=True):
        vector = (torch.randn(WIDTHS[c], generator=random) / 8).to(dtype)
        n_units = WIDTHS[c] // UNIT
        arena_NU[unit : unit + n_units] = vector.view(-1, UNIT)
        first[c, s] = unit
        dense[c][ROW_START[s] : ROW_STOP[s]] = vector.float()
        unit += n_units + 1
    return arena_NU, RowVectors(ROW_START, ROW_STOP, first, PRESENT), dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scale_then_bias(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    arena_NU, vectors, dense = _vectors(dtype)
    plan = RowVectorPlan(arena_NU.to(device), WIDTHS, vectors, N_ROWS)
    for c, width in enumerate(WIDTHS):
        y_TO = torch.randn(N_ROWS, width, generator=torch.Generator().manual_seed(c)).to(dtype)
        expected_TO = y_TO.float() * (1 + dense[c]) + dense[c]
        actual_TO = y_TO.to(device)
        plan.scale_(c, actual_TO)
        plan.add_(c, actual_TO)
        actual_TO = actual_TO.cpu()
        TOLERANCES["epilogue", dtype].assert_close(actual_TO, expected_TO)
        touched = dense[c].any(dim=1)
        assert torch.equal(actual_TO[~touched], y_TO[~touched])


def test_untouched_target_costs_nothing() -> None:
    arena_NU, vectors, _ = _vectors(torch.float32)
    plan = RowVectorPlan(arena_NU, WIDTHS, vectors, N_ROWS)
    assert [plan.touches(c) for c in range(3)] == [True, False, True]
    plan.scale_(1, None)  # type: ignore[arg-type]
    plan.add_(1, None)  # type: ignore[arg-type]


def test_a_scale_near_one_keeps_its_digits_in_bfloat16() -> None:
    """Stored as itself, 1.001 would become 1 in bfloat16 and DoRA would lose its magnitudes."""
    scale = 1.001
    arena_NU = torch.full((1, 64), scale - 1, dtype=torch.bfloat16)
    one = np.array([1], dtype=np.int32)
    vectors = RowVectors(one - 1, one, (one - 1)[None], np.array([[True]]))
    y_TO = torch.full((1, 64), 1024.0)
    RowVectorPlan(arena_NU.float(), [64], vectors, 1).scale_(0, y_TO)
    assert y_TO[0, 0].item() == pytest.approx(1024 * scale, rel=1e-5)
