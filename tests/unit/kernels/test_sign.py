"""Every backend computes what `reference` computes, and `reference` what dense signs compute."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch

from motet.kernels.dispatch import Backend, sign_plan
from motet.kernels.errors import BackendUnavailableError
from motet.kernels.segments import TargetShape
from motet.kernels.sign import SignSegments
from tests.support.low_rank import Run
from tests.support.sign import SignCase, make_sign_case
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
BACKENDS: list[Backend] = ["reference", "cpu", "triton"]

# A width that is no multiple of 32 among them. By adapter and target; adapter 3 touches nothing.
UNIT = 36
SHAPES = [(72, 108), (180, 36), (36, 72)]
HAS = [[True, False, True], [True, True, True], [False, True, False], [False] * 3]
BATCHES = {
    "decode": [Run(0, 1), Run(1, 1), Run(2, 1), Run(None, 1), Run(0, 1), Run(3, 1)],
    "prefill": [Run(1, 37), Run(0, 67)],
    "prefill and decode": [Run(2, 1), Run(0, 45), Run(1, 1), Run(None, 5), Run(2, 1)],
    "base only": [Run(None, 5)],
    "adapter that touches nothing": [Run(3, 3)],
}
NOTHING = SignSegments(*(np.zeros(0, np.int32),) * 2, *(np.zeros((1, 0), kind) for kind in ("i4", "f4", "?")))


def _case(batch: str, dtype: torch.dtype, device: str = "cpu") -> SignCase:
    return make_sign_case(BATCHES[batch], HAS, SHAPES, unit=UNIT, dtype=dtype, device=device)


def check_against_reference(case: SignCase, backend: Backend) -> None:
    for c, (actual, expected) in enumerate(zip(case.run(backend), case.run("reference"), strict=True)):
        TOLERANCES["sign", actual.dtype].assert_close(actual, expected, case.magnitude_TO[c])


def _skip_unless_runnable(device: str, backend: Backend) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if device == "cpu" and backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a CUDA device is here, so the kernels are compiled for it, not interpreted")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_reference_equals_dense_signs(dtype: torch.dtype, batch: str) -> None:
    case = _case(batch, dtype)
    for c, (actual, expected) in enumerate(zip(case.run("reference"), case.expected_TO, strict=True)):
        TOLERANCES["sign", dtype].assert_close(actual, expected, case.magnitude_TO[c])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("device", "backend", "dtype"), EVERYWHERE, ids=str)
def test_backend_equals_reference(device: str, backend: Backend, dtype: torch.dtype, batch: str) -> None:
    _skip_unless_runnable(device, backend)
    check_against_reference(_case(batch, dtype, device), backend)


@pytest.mark.parametrize(("device", "backend", "dtype"), EVERYWHERE, ids=str)
def test_wide_targets(device: str, backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops over in and out blocks go round, those over the batch's tiles, and the CPU's over unpacked blocks."""
    _skip_unless_runnable(device, backend)
    monkeypatch.setattr("motet.kernels.cpu.sign.BLOCK_ELEMENTS", 1 << 17)
    runs, shapes = [Run(0, 1), Run(1, 90)], [(1536, 576), (576, 1536)]
    case = make_sign_case(runs, [[True, True]] * 2, shapes, unit=192, dtype=dtype, device=device)
    check_against_reference(case, backend)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_rows_without_signs_keep_their_bits_and_others_change(backend: Backend, dtype: torch.dtype, batch: str) -> None:
    case = _case(batch, dtype)
    for actual, before, live_T in zip(case.run(backend), case.y_TO, case.live_T, strict=True):
        assert torch.equal(actual[~live_T].view(torch.uint8), before[~live_T].view(torch.uint8))
        assert (actual != before)[live_T].float().mean().nan_to_num(1) > 0.95  # a small term may round away


@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_rows_do_not_depend_on_their_neighbours(backend: Backend, dtype: torch.dtype) -> None:
    """A request's answer must not change with who else is in the batch."""
    case = _case("decode", dtype)
    together = case.run(backend)
    for s, row in enumerate(case.segments.row_start.tolist()):
        one = slice(s, s + 1)
        alone = dataclasses.replace(
            case,
            segments=SignSegments(
                np.zeros(1, np.int32),
                np.ones(1, np.int32),
                case.segments.first[:, one],
                case.segments.alpha[:, one],
                case.segments.present[:, one],
            ),
            x_TI=[x[row : row + 1] for x in case.x_TI],
            y_TO=[y[row : row + 1] for y in case.y_TO],
        )
        for c, expected in enumerate(alone.run(backend)):
            TOLERANCES["sign", dtype].assert_close(
                together[c][row : row + 1], expected, case.magnitude_TO[c][row : row + 1]
            )


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("backend", "dtype"), ALL, ids=str)
def test_a_poisoned_row_poisons_no_other(backend: Backend, dtype: torch.dtype, poison: float) -> None:
    case = _case("prefill", dtype)
    before = case.run(backend)
    for tensor in (*case.x_TI, *case.y_TO):
        tensor[3] = poison
    others = [row for row in range(case.n_rows) if row != 3]
    for c, actual in enumerate(case.run(backend)):
        assert not actual[3].isfinite().all()
        TOLERANCES["sign", dtype].assert_close(actual[others], before[c][others], case.magnitude_TO[c][others])


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bit_a_weight(backend: Backend) -> None:
    """The arena holds nothing but the words, so no backend can have read more."""
    word_N = torch.randint(-(2**31), 2**31 - 1, (64 * 2,), dtype=torch.int32)
    arena_NU = word_N.view(torch.float32).view(-1, 64)
    assert arena_NU.numel() * 32 == 64 * 64
    rows, ones = (np.array([value], np.int32) for value in (0, 1))
    segments = SignSegments(rows, ones, np.zeros((1, 1), np.int32), np.full((1, 1), 2, np.float32), ones[None] > 0)
    y_TO = torch.zeros(1, 64)
    plan = sign_plan(backend, arena_NU, [TargetShape(64, 64)], segments, 1)
    plan.add_(0, y_TO, torch.nn.functional.one_hot(torch.tensor([37]), 64).float())
    assert y_TO[0].tolist() == [2.0 if word_N[2 * o + 1] >> 5 & 1 else -2.0 for o in range(64)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_touches(backend: Backend) -> None:
    """By a segment of the batch, not by any adapter that could be in it; the others are not even looked at."""
    case = _case("adapter that touches nothing", FP32)
    plan = case.plan(backend)
    plan.add_(0, None, None)  # type: ignore[arg-type]
    assert [plan.touches(c) for c in range(3)] == [False] * 3
    assert [_case("decode", FP32).plan(backend).touches(c) for c in range(3)] == [True] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_step_is_a_plan_too(backend: Backend) -> None:
    plan = sign_plan(backend, torch.zeros(4, 64), [TargetShape(64, 64)], NOTHING, n_rows=0)
    plan.add_(0, torch.zeros(0, 64), torch.zeros(0, 64))
    assert plan.backend == backend
    assert not plan.touches(0)


def test_cpu_unpacks_shared_signs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_sign_case(
        [Run(0, 2), Run(None, 1), Run(0, 3), Run(1, 1)], [[True]] * 2, [(72, 36)], unit=36, dtype=FP32
    )
    calls, embedding = [], torch.nn.functional.embedding
    monkeypatch.setattr("torch.nn.functional.embedding", lambda *a: calls.append(len(a[0])) or embedding(*a))
    case.run("cpu")
    assert calls == [36 * 6] * 2  # three words of two halves for each of 36 outputs


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"row_stop": np.array([1, 2], np.int32)}, "empty run"),
        ({"row_stop": np.array([2, 5], np.int32)}, "leave the batch of 4 rows"),
        ({"first": np.array([[2, 10**6]], np.int32)}, "signs outside the arena"),
        ({"first": np.array([[-1, 2]], np.int32)}, "signs outside the arena"),
        ({"first": np.array([[2]], np.int32)}, r"first \(1, 1\), not \(1, 2\)"),
        ({"alpha": np.array([[1, np.nan]], np.float32)}, "not finite"),
    ],
)
def test_malformed_segments_are_caught(broken: dict[str, np.ndarray], message: str) -> None:
    case = make_sign_case([Run(0, 2), Run(1, 2)], [[True]] * 2, [(72, 36)], unit=36, dtype=FP32)
    with pytest.raises(AssertionError, match=message):
        dataclasses.replace(case, segments=dataclasses.replace(case.segments, **broken)).plan("reference")


def test_the_last_unit_of_the_arena_may_be_used_and_no_more() -> None:
    case = make_sign_case([Run(0, 1)], [[True]], [(72, 36)], unit=36, dtype=FP32)
    assert case.segments.first.item() + 3 == len(case.arena_NU) - 1  # 36 rows of three words in units of 36
    dataclasses.replace(case, arena_NU=case.arena_NU[:-1]).plan("reference")
    with pytest.raises(AssertionError, match="outside the arena"):
        dataclasses.replace(case, arena_NU=case.arena_NU[:-2].contiguous()).plan("reference")


def test_units_must_hold_whole_words() -> None:
    arena_NU = torch.zeros(4, 3, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="units of 6 bytes hold no whole number of int32 words"):
        sign_plan("cpu", arena_NU, [TargetShape(3, 3)], NOTHING, 0)


def test_cpu_refuses_an_arena_elsewhere() -> None:
    with pytest.raises(BackendUnavailableError, match="needs the arena on the CPU, not on meta"):
        sign_plan("cpu", torch.zeros(4, 64, device="meta"), [TargetShape(64, 64)], NOTHING, 0)


def test_triton_refuses_the_cpu_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.kernels.triton.low_rank.INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET"):
        sign_plan("triton", torch.zeros(4, 64), [TargetShape(64, 64)], NOTHING, 0)
