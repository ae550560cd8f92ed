"""Every backend computes what `reference` computes, and `reference` what dense matrices compute."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from motet.kernels.dispatch import LowRankBackend, low_rank_plan
from motet.kernels.segments import Gates, Segments
from tests.support.low_rank import Case, Gate, Run, make_case
from tests.support.native import native_engine
from tests.support.tolerances import TOLERANCES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAST: list[tuple[LowRankBackend, torch.dtype]] = [
    ("cpu", FP32),
    ("cpu", BF16),
    ("native", FP32),
    ("native", BF16),
    ("triton", FP32),
    ("triton", FP16),
]
ALL: list[tuple[LowRankBackend, torch.dtype]] = [("reference", FP32), ("reference", BF16), ("reference", FP16), *FAST]

# None of the widths is a power of two. The first and the last target are alike, so that they are prepared together.
UNIT = 96
SHAPES = [(96, 192), (192, 96), (96, 192)]
RANKS = [[16, 3, 16], [0, 40, 0], [40, 1, 40], [3, 0, 3], [0, 0, 0]]
BATCHES = {
    "decode": [Run(0, 1), Run(1, 1), Run(2, 1), Run(3, 1), Run(0, 1), Run(4, 1), Run(2, 1)],
    "decode among base rows": [Run(None, 2), Run(0, 1), Run(None, 1), Run(2, 1), Run(1, 1), Run(None, 3)],
    "prefill": [Run(1, 37), Run(0, 67)],
    "prefill and decode": [Run(2, 1), Run(3, 1), Run(0, 45), Run(1, 1), Run(None, 5), Run(2, 1)],
    "one adapter, many requests": [Run(2, 1), Run(2, 2), Run(None, 1), Run(2, 1)],
    "base only": [Run(None, 5)],
    "adapter that touches nothing": [Run(4, 3)],
}
CASES: list[tuple[str, Gate]] = [
    *((batch, "none") for batch in BATCHES),
    *((batch, gate) for batch in ("decode", "one adapter, many requests") for gate in ("random", "zero", "one-hot")),
    ("prefill", "random"),
]


@pytest.mark.parametrize(("batch", "gate"), CASES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_reference_equals_dense_products(dtype: torch.dtype, batch: str, gate: Gate) -> None:
    case = make_case(BATCHES[batch], RANKS, SHAPES, unit=UNIT, dtype=dtype, gate=gate)
    for actual, expected in zip(case.run("reference"), case.expected_TO, strict=True):
        TOLERANCES["low_rank reference", dtype].assert_close(actual, expected)


@pytest.mark.parametrize(("batch", "gate"), CASES)
@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=str)
def test_backend_equals_reference(backend: LowRankBackend, dtype: torch.dtype, batch: str, gate: Gate) -> None:
    check_against_reference(make_case(BATCHES[batch], RANKS, SHAPES, unit=UNIT, dtype=dtype, gate=gate), backend)


@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=str)
def test_wide_targets(backend: LowRankBackend, dtype: torch.dtype) -> None:
    """The loops over in, out and rank blocks all go round."""
    runs = [Run(0, 1), Run(1, 2)]
    case = make_case(runs, [[3, 70], [16, 1]], [(1536, 576), (576, 1536)], unit=192, dtype=dtype)
    check_against_reference(case, backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("batch", "gate"), CASES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_triton_equals_reference_on_cuda(dtype: torch.dtype, batch: str, gate: Gate) -> None:
    case = make_case(BATCHES[batch], RANKS, SHAPES, unit=UNIT, dtype=dtype, gate=gate, device="cuda")
    check_against_reference(case, "triton")


def check_against_reference(case: Case, backend: LowRankBackend) -> None:
    for c, (actual, expected) in enumerate(zip(case.run(backend), case.run("reference"), strict=True)):
        TOLERANCES["low_rank", actual.dtype].assert_close(actual, expected, case.magnitude_TO[c])


@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_rows_without_adapter_keep_their_value(backend: LowRankBackend, dtype: torch.dtype) -> None:
    runs = BATCHES["prefill and decode"]
    case = make_case(runs, RANKS, SHAPES, unit=UNIT, dtype=dtype)
    base = torch.tensor([run.adapter is None for run in runs for _ in range(run.n_rows)])
    for actual, before in zip(case.run(backend), case.y_TO, strict=True):
        assert torch.equal(actual[base], before[base])


@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_rows_do_not_depend_on_their_neighbours(backend: LowRankBackend, dtype: torch.dtype) -> None:
    """A request's answer must not change with who else is in the batch."""
    batch = make_case(BATCHES["decode"], RANKS, SHAPES, unit=UNIT, dtype=dtype, gate="random")
    together = batch.run(backend)
    for s in range(len(batch.segments)):
        alone = dataclasses.replace(
            batch,
            segments=_segment(batch.segments, s),
            x_TI=[x[s : s + 1] for x in batch.x_TI],
            y_TO=[y[s : s + 1] for y in batch.y_TO],
        )
        for c, expected in enumerate(alone.run(backend)):
            magnitude_TO = batch.magnitude_TO[c][s : s + 1]
            TOLERANCES["low_rank", dtype].assert_close(together[c][s : s + 1], expected, magnitude_TO)


def _segment(segments: Segments, s: int) -> Segments:
    """One segment, its row the first of a batch."""
    assert segments.gates is not None
    start = segments.row_start[s]
    one = slice(s, s + 1)
    return Segments(
        row_start=segments.row_start[one] - segments.row_start[s],
        row_stop=segments.row_stop[one] - segments.row_start[s],
        a_first=segments.a_first[:, one],
        b_first=segments.b_first[:, one],
        rank=segments.rank[:, one],
        gates=Gates(segments.gates.of_row[start : start + 1], segments.gates.factor),
    )


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_a_poisoned_row_poisons_no_other(backend: LowRankBackend, dtype: torch.dtype, poison: float) -> None:
    case = make_case(BATCHES["decode"], RANKS, SHAPES, unit=UNIT, dtype=dtype)
    before = case.run(backend)
    for x_TI in case.x_TI:
        x_TI[3] = poison
    _check_all_but_row_3(case, backend, before)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize(("backend", "dtype"), [*ALL, ("cpu", FP16)], ids=str)
def test_an_overflowing_adapter_poisons_no_other(backend: LowRankBackend, dtype: torch.dtype) -> None:
    """Its A is finite, as the contract asks, but A x is not."""
    case = make_case(BATCHES["decode"], RANKS, SHAPES, unit=UNIT, dtype=dtype)
    before = case.run(backend)
    for c, shape in enumerate(case.shapes):
        first, rank = case.segments.a_first[c, 3], case.segments.rank[c, 3]
        case.arena_NU[first : first + rank * shape.in_width // UNIT] = torch.finfo(dtype).max
    _check_all_but_row_3(case, backend, before)


def _check_all_but_row_3(case: Case, backend: LowRankBackend, before: list[torch.Tensor]) -> None:
    """Only row 3 reads adapter 3."""
    others = [0, 1, 2, 4, 5, 6]
    for c, actual in enumerate(case.run(backend)):
        TOLERANCES["low_rank", actual.dtype].assert_close(
            actual[others], before[c][others], case.magnitude_TO[c][others]
        )


@pytest.mark.parametrize("backend", ["cpu", "native", "triton"])
def test_no_live_adapter_costs_nothing(backend: LowRankBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Target 0 of adapter 1 has rank 0: its tensors are not even looked at, and no kernel is launched."""
    for kernel in ("shrink", "expand"):
        monkeypatch.setattr(f"motet.kernels.triton.plan.{kernel}", None)
    case = make_case([Run(1, 4), Run(None, 2)], RANKS, SHAPES, unit=UNIT, dtype=FP32)
    plan = low_rank_plan(backend, case.arena_NU, case.shapes, case.segments, case.n_rows, native_engine())
    plan.add_(0, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=str)
def test_results_repeat_bit_for_bit(backend: LowRankBackend, dtype: torch.dtype) -> None:
    case = make_case(BATCHES["prefill and decode"], RANKS, SHAPES, unit=UNIT, dtype=dtype, gate="random")
    for first, second in zip(case.run(backend), case.run(backend), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("of_row", "factor"),
    [([0, 1, 0], (1, 2, 3)), ([0, 1, 0, 2], (1, 2, 3)), ([0, 1, 0, 1], (2, 2, 3)), ([0, 1, 0, 1], (1, 2, 2))],
    ids=["rows without a gate", "no such gate", "other targets", "narrower than the rank"],
)
def test_malformed_gates_are_caught(of_row: list[int], factor: tuple[int, int, int]) -> None:
    case = make_case([Run(0, 2), Run(1, 2)], [[3], [3]], [(64, 64)], unit=64, dtype=FP32)
    gates = Gates(np.array(of_row, dtype=np.int32), np.ones(factor, dtype=np.float32))
    segments = dataclasses.replace(case.segments, gates=gates)
    with pytest.raises(AssertionError):
        low_rank_plan("reference", case.arena_NU, case.shapes, segments, case.n_rows)


@pytest.mark.parametrize(
    "broken",
    [
        {"row_stop": np.array([2, 3], dtype=np.int32)},
        {"row_start": np.array([0, 1], dtype=np.int32)},
        {"row_stop": np.array([2, 5], dtype=np.int32)},
        {"a_first": np.array([[2, 10**6]], dtype=np.int32)},
        {"rank": np.array([[-1, 3]], dtype=np.int32)},
    ],
    ids=["empty", "overlapping", "beyond the batch", "outside the arena", "negative rank"],
)
def test_malformed_segments_are_caught(broken: dict[str, np.ndarray]) -> None:
    case = make_case([Run(0, 2), Run(1, 2)], [[3], [3]], [(64, 64)], unit=64, dtype=FP32)
    segments = dataclasses.replace(case.segments, **broken)
    if "row_stop" in broken:
        segments = dataclasses.replace(segments, row_start=np.array([0, 3], dtype=np.int32))
    with pytest.raises(AssertionError):
        low_rank_plan("reference", case.arena_NU, case.shapes, segments, case.n_rows)
