"""Every backend computes what `reference` computes, and `reference` what dense deltas compute."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from motet.kernels.dispatch import Backend
from motet.kernels.sparse import SparseSegments
from tests.support.low_rank import Run
from tests.support.sparse import SparseCase, make_sparse_case
from tests.support.tolerances import TOLERANCES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The interpreter multiplies the bit patterns of bfloat16, so Triton's is tested on CUDA alone.
FAST: list[tuple[Backend, torch.dtype]] = [
    *(("cpu", dtype) for dtype in (FP32, BF16, FP16)),
    *(("triton", dtype) for dtype in (FP32, FP16)),
]
ALL: list[tuple[Backend, torch.dtype]] = [*(("reference", dtype) for dtype in (FP32, BF16, FP16)), *FAST]
EVERYWHERE = [
    *(("cpu", *fast) for fast in FAST),
    *(pytest.param("cuda", "triton", dtype, marks=pytest.mark.gpu) for dtype in (FP32, BF16, FP16)),
]

# None of the widths is a power of two. By adapter and target; adapter 4 touches nothing, adapter 5 has one effect only.
UNIT = 96
SHAPES = [(96, 192), (192, 96), (96, 192)]
COLUMNS = [[16, 3, 16], [0, 40, 0], [40, 1, 96], [3, 0, 3], [0, 0, 0], [7, 0, 0]]
ROWS = [[5, 0, 0], [0, 32, 0], [1, 96, 192], [70, 0, 2], [0, 0, 0], [0, 0, 0]]
BATCHES = {
    "decode": [Run(0, 1), Run(1, 1), Run(2, 1), Run(3, 1), Run(0, 1), Run(4, 1), Run(2, 1), Run(5, 1)],
    "decode among base rows": [Run(None, 2), Run(0, 1), Run(None, 1), Run(2, 1), Run(1, 1), Run(None, 3)],
    "prefill": [Run(1, 37), Run(0, 67)],
    "prefill and decode": [Run(2, 1), Run(3, 1), Run(0, 45), Run(1, 1), Run(None, 5), Run(2, 1)],
    "one adapter, many requests": [Run(2, 1), Run(2, 2), Run(None, 1), Run(2, 1)],
    "base only": [Run(None, 5)],
    "adapter that touches nothing": [Run(4, 3)],
}


def _case(batch: str, dtype: torch.dtype, device: str = "cpu") -> SparseCase:
    return make_sparse_case(BATCHES[batch], COLUMNS, ROWS, SHAPES, unit=UNIT, dtype=dtype, device=device)


def check_against_reference(case: SparseCase, backend: Backend) -> None:
    for c, (actual, expected) in enumerate(zip(case.run(backend), case.run("reference"), strict=True)):
        TOLERANCES["sparse", actual.dtype].assert_close(actual, expected, case.magnitude_TO[c])


def _skip_unless_runnable(device: str, backend: Backend) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cpu" and backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a CUDA device is here, so the kernels are compiled for it, not interpreted")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_reference_equals_dense_deltas(dtype: torch.dtype, batch: str) -> None:
    case = _case(batch, dtype)
    for c, (actual, expected) in enumerate(zip(case.run("reference"), case.expected_TO, strict=True)):
        TOLERANCES["sparse reference", dtype].assert_close(actual, expected, case.magnitude_TO[c])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("device", "backend", "dtype"), EVERYWHERE, ids=str)
def test_backend_equals_reference(device: str, backend: Backend, dtype: torch.dtype, batch: str) -> None:
    _skip_unless_runnable(device, backend)
    check_against_reference(_case(batch, dtype, device), backend)


@pytest.mark.parametrize(("device", "backend", "dtype"), EVERYWHERE, ids=str)
def test_wide_targets(device: str, backend: Backend, dtype: torch.dtype) -> None:
    """The loops over in, out and index blocks all go round, and so do those over the batch's tiles."""
    _skip_unless_runnable(device, backend)
    runs, shapes = [Run(0, 1), Run(1, 90)], [(1536, 576), (576, 1536)]
    counts = [[3, 70], [128, 1]]
    case = make_sparse_case(runs, counts, counts, shapes, unit=192, dtype=dtype, device=device)
    check_against_reference(case, backend)


@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_the_two_effects_may_have_different_segments(backend: Backend, dtype: torch.dtype) -> None:
    runs, row_runs = [Run(0, 1), Run(None, 4), Run(2, 2)], [Run(None, 1), Run(3, 3), Run(2, 3)]
    case = make_sparse_case(runs, COLUMNS, ROWS, SHAPES, unit=UNIT, dtype=dtype, row_runs=row_runs)
    for c, (actual, expected) in enumerate(zip(case.run(backend), case.expected_TO, strict=True)):
        TOLERANCES["sparse", dtype].assert_close(actual, expected, case.magnitude_TO[c])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_what_no_effect_names_keeps_its_bits(backend: Backend, dtype: torch.dtype, batch: str) -> None:
    """Rows outside all segments, and the outputs beside the indices of a row that is only scattered to."""
    case = _case(batch, dtype)
    assert not all(live.all() for live in case.live_TO)
    for actual, before, live in zip(case.run(backend), case.y_TO, case.live_TO, strict=True):
        assert torch.equal(actual[~live].view(torch.uint8), before[~live].view(torch.uint8))


@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_an_effect_changes_every_element_it_names(backend: Backend, dtype: torch.dtype) -> None:
    """Or the test above would hold for a backend that does nothing."""
    case = _case("decode", dtype)
    for actual, before, live in zip(case.run(backend), case.y_TO, case.live_TO, strict=True):
        assert (actual != before)[live].float().mean() > 0.98  # a small term may round away


@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_rows_do_not_depend_on_their_neighbours(backend: Backend, dtype: torch.dtype) -> None:
    """A request's answer must not change with who else is in the batch."""
    batch = _case("decode", dtype)
    together = batch.run(backend)
    for s in range(len(batch.columns)):
        alone = dataclasses.replace(
            batch,
            columns=_segment(batch.columns, s),
            rows=_segment(batch.rows, s),
            x_TI=[x[s : s + 1] for x in batch.x_TI],
            y_TO=[y[s : s + 1] for y in batch.y_TO],
        )
        for c, expected in enumerate(alone.run(backend)):
            magnitude_TO = batch.magnitude_TO[c][s : s + 1]
            TOLERANCES["sparse", dtype].assert_close(together[c][s : s + 1], expected, magnitude_TO)


def _segment(segments: SparseSegments, s: int) -> SparseSegments:
    """One segment, its row the first of a batch."""
    one = slice(s, s + 1)
    return SparseSegments(
        row_start=segments.row_start[one] - segments.row_start[s],
        row_stop=segments.row_stop[one] - segments.row_start[s],
        first=segments.first[:, one],
        index_first=segments.index_first[:, one],
        count=segments.count[:, one],
    )


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_a_poisoned_row_poisons_no_other(backend: Backend, dtype: torch.dtype, poison: float) -> None:
    case = _case("decode", dtype)
    before = case.run(backend)
    for tensor in (*case.x_TI, *case.y_TO):
        tensor[3] = poison
    others = [row for row in range(case.n_rows) if row != 3]
    for c, actual in enumerate(case.run(backend)):
        assert not actual[3].isfinite().all()
        TOLERANCES["sparse", dtype].assert_close(actual[others], before[c][others], case.magnitude_TO[c][others])


@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=str)
def test_results_repeat_bit_for_bit(backend: Backend, dtype: torch.dtype) -> None:
    """Also from a plan that is used again, as in decode."""
    case = _case("prefill and decode", dtype)
    plan = case.plan(backend)
    for c, (x_TI, y_TO) in enumerate(zip(case.x_TI, case.y_TO, strict=True)):
        first_TO, again_TO = y_TO.clone(), y_TO.clone()
        plan.add_(c, first_TO, x_TI)
        plan.add_(c, again_TO, x_TI)
        assert torch.equal(first_TO, again_TO)
        assert torch.equal(first_TO, case.run(backend)[c])
