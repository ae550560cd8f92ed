"""What a sparse plan is asked not to do: read beyond its operands, work for nothing, gather twice, accept nonsense."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from motet.kernels.dispatch import Backend, low_rank_plan, sparse_plan
from motet.kernels.errors import BackendUnavailableError
from motet.kernels.segments import Segments, TargetShape
from motet.kernels.sparse import SparseSegments
from tests.support.low_rank import Run
from tests.support.sparse import SparseCase, make_sparse_case
from tests.support.tolerances import TOLERANCES

BACKENDS: list[Backend] = ["reference", "cpu", "triton"]
UNIT, F32 = 64, torch.float32
NOTHING = SparseSegments(*(np.zeros(0, dtype=np.int32) for _ in range(2)), *(np.zeros((1, 0), np.int32),) * 3)


def _one_adapter(first: int, index_first: int, count: int, n_rows: int) -> SparseSegments:
    rows = (np.array([0], dtype=np.int32), np.array([n_rows], dtype=np.int32))
    return SparseSegments(*rows, *(np.array([[value]], dtype=np.int32) for value in (first, index_first, count)))


def _index_units(index: list[int], dtype: torch.dtype) -> torch.Tensor:
    n_units = -(-len(index) * 4 // (UNIT * dtype.itemsize))
    units_NU = torch.zeros((n_units, UNIT), dtype=dtype)
    units_NU.view(torch.int32).view(-1)[: len(index)] = torch.tensor(index, dtype=torch.int32)
    return units_NU


@pytest.mark.parametrize("effect", ["column", "row"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_the_bytes_of_low_rank(backend: Backend, effect: str) -> None:
    """S rows of one width and S indices do what LoRA of rank S needs S rows of both widths for.

    Either arena holds nothing else, so neither backend can have read more.
    """
    n_rows, n_indices, width, dtype = 3, 20, 256, torch.float32
    random = torch.Generator().manual_seed(0)
    index = torch.randperm(width, generator=random)[:n_indices].tolist()
    v_SW = torch.randn(n_indices, width, generator=random) / n_indices**0.5
    one_hot_SW = torch.nn.functional.one_hot(torch.tensor(index), width).float()
    x_TI, y_TO = torch.randn(2, n_rows, width, generator=random)

    sparse_NU = torch.cat([v_SW.view(-1, UNIT), _index_units(index, dtype)])
    segments = _one_adapter(0, v_SW.numel() // UNIT, n_indices, n_rows)
    columns, rows = (segments, NOTHING) if effect == "column" else (NOTHING, segments)
    shapes = [TargetShape(width, width)]
    a_SI, b_SO = (one_hot_SW, v_SW) if effect == "column" else (v_SW, one_hot_SW)
    low_rank_NU = torch.cat([a_SI.view(-1, UNIT), b_SO.view(-1, UNIT)])
    firsts = (np.array([[first]], dtype=np.int32) for first in (0, a_SI.numel() // UNIT))
    lora = Segments(segments.row_start, segments.row_stop, *firsts, segments.count)

    as_sparse_TO, as_low_rank_TO = y_TO.clone(), y_TO.clone()
    sparse_plan(backend, sparse_NU, shapes, columns, rows, n_rows).add_(0, as_sparse_TO, x_TI)
    low_rank_plan(backend, low_rank_NU, shapes, lora, n_rows).add_(0, as_low_rank_TO, x_TI)
    TOLERANCES["sparse", dtype].assert_close(as_sparse_TO, as_low_rank_TO)
    assert not torch.equal(as_sparse_TO, y_TO)
    assert low_rank_NU.numel() == n_indices * 2 * width
    assert sparse_NU.numel() == n_indices * width + UNIT  # 20 indices in one unit of 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_index_list_has_four_bytes_an_index_in_every_dtype(dtype: torch.dtype) -> None:
    """The last index of a full unit, and the first of the next, are read from where they are."""
    per_unit = UNIT * dtype.itemsize // 4
    for n_indices, n_units in ((per_unit, 1), (per_unit + 1, 2)):
        index = list(range(255, 255 - n_indices, -1))
        arena_NU = torch.cat([torch.ones(n_indices * 4, UNIT, dtype=dtype), _index_units(index, dtype)])
        assert len(arena_NU) == n_indices * 4 + n_units
        segments = _one_adapter(0, n_indices * 4, n_indices, 1)
        for backend in BACKENDS:
            if backend == "triton" and dtype == torch.bfloat16:
                continue  # the interpreter multiplies the bit patterns of bfloat16
            y_TO = torch.zeros(1, 256, dtype=dtype)
            x_TI = torch.full((1, 256), 1 / 256, dtype=dtype)
            plan = sparse_plan(backend, arena_NU, [TargetShape(256, 256)], NOTHING, segments, 1)
            plan.add_(0, y_TO, x_TI)
            assert y_TO[0].nonzero().flatten().tolist() == sorted(index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_touches(backend: Backend) -> None:
    """By a segment of the batch, not by any adapter that could be in it."""
    runs, shapes = [Run(0, 1), Run(1, 2)], [(64, 64)] * 4
    case = make_sparse_case(
        runs, [[3, 0, 0, 0], [0, 0, 0, 0], [9] * 4], [[0, 0, 0, 0], [0, 3, 0, 0], [9] * 4], shapes, unit=UNIT, dtype=F32
    )
    plan = case.plan(backend)
    assert [plan.touches(c) for c in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_untouched_target_costs_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are not even looked at, nothing is prepared and no kernel is launched."""
    case = make_sparse_case([Run(0, 2)], [[0, 4]], [[0, 4]], [(64, 64)] * 2, unit=UNIT, dtype=F32)
    monkeypatch.setattr("motet.kernels.cpu.sparse.cut", None)
    case.plan(backend).add_(0, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathering_reads_no_input_beside_its_indices(backend: Backend) -> None:
    """Not even where a neighbour in the same block reads it: an infinite input there would poison the row."""
    case = make_sparse_case([Run(0, 1), Run(1, 1)], [[4], [5]], [[0], [0]], [(64, 64)], unit=UNIT, dtype=F32)
    before_TO = case.run(backend)[0]
    for s in range(2):
        first, count = case.columns.index_first[0, s], case.columns.count[0, s]
        index_S = case.arena_NU[first].view(torch.int32)[:count].long()
        others = torch.ones(64, dtype=torch.bool).index_fill(0, index_S, False)
        case.x_TI[0][s, others] = torch.inf
    assert torch.equal(case.run(backend)[0], before_TO)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_step_is_a_plan_too(backend: Backend) -> None:
    plan = sparse_plan(backend, torch.zeros(4, UNIT), [TargetShape(64, 64)], NOTHING, NOTHING, n_rows=0)
    plan.add_(0, torch.zeros(0, 64), torch.zeros(0, 64))
    assert plan.backend == backend
    assert not plan.touches(0)


def test_cpu_gathers_shared_operands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan serves many decode steps."""
    case = make_sparse_case([Run(0, 1), Run(1, 1)], [[4], [5]], [[4], [5]], [(64, 64)], unit=UNIT, dtype=F32)
    plan = case.plan("cpu")
    calls = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors: calls.append(len(tensors)) or cat(tensors))
    for _ in range(3):
        plan.add_(0, case.y_TO[0].clone(), case.x_TI[0])
    assert calls == [2, 2]  # two operands of either effect


def test_cpu_reads_a_lone_operand_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_sparse_case([Run(0, 2), Run(0, 40)], [[4]], [[5]], [(64, 64)], unit=UNIT, dtype=F32)
    plan = case.plan("cpu")
    monkeypatch.setattr(torch, "cat", None)
    plan.add_(0, case.y_TO[0].clone(), case.x_TI[0])


def _malformed() -> SparseCase:
    return make_sparse_case([Run(0, 2), Run(1, 2)], [[3], [3]], [[3], [3]], [(64, 128)], unit=UNIT, dtype=F32)


@pytest.mark.parametrize("effect", ["columns", "rows"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"row_stop": [1, 2]}, "empty run"),
        ({"row_start": [0, 1]}, "overlap"),
        ({"row_stop": [2, 5]}, "leave the batch of 4 rows"),
        ({"first": [[2, 10**6]]}, "outside the arena"),
        ({"index_first": [[2, 10**6]]}, "outside the arena"),
        ({"index_first": [[2]]}, r"index_first \(1, 1\), not \(1, 2\)"),
        ({"count": [[-1, 3]]}, "negative count"),
        ({"count": [[129, 3]]}, "more indices than"),
    ],
)
def test_malformed_segments_are_caught(effect: str, broken: dict[str, list], message: str) -> None:
    case = _malformed()
    arrays = {name: np.array(values, dtype=np.int32) for name, values in broken.items()}
    case = dataclasses.replace(case, **{effect: dataclasses.replace(getattr(case, effect), **arrays)})
    with pytest.raises(AssertionError, match=message):
        case.plan("reference")


def test_the_last_unit_of_the_arena_may_be_used_and_no_more() -> None:
    case = _malformed()
    n_units = len(case.arena_NU)
    last = dataclasses.replace(case.columns, index_first=np.full((1, 2), n_units - 1, dtype=np.int32))
    dataclasses.replace(case, columns=last).plan("reference")
    beyond = dataclasses.replace(case.columns, index_first=np.full((1, 2), n_units, dtype=np.int32))
    with pytest.raises(AssertionError, match="outside the arena"):
        dataclasses.replace(case, columns=beyond).plan("reference")


@pytest.mark.parametrize(("index", "message"), [([1, 1], "repeat"), ([0, 64], "outside"), ([0, -1], "outside")])
@pytest.mark.parametrize("effect", ["column", "row"])
def test_reference_asserts_what_the_contract_asks_of_indices(effect: str, index: list[int], message: str) -> None:
    arena_NU = torch.cat([torch.ones(2, UNIT), _index_units(index, F32)])
    segments = _one_adapter(0, 2, 2, 1)
    columns, rows = (segments, NOTHING) if effect == "column" else (NOTHING, segments)
    plan = sparse_plan("reference", arena_NU, [TargetShape(64, 64)], columns, rows, 1)
    with pytest.raises(AssertionError, match=message):
        plan.add_(0, torch.zeros(1, 64), torch.zeros(1, 64))


def test_units_must_hold_whole_indices() -> None:
    arena_NU = torch.zeros(4, 3, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="units of 6 bytes hold no whole number of int32 indices"):
        sparse_plan("cpu", arena_NU, [TargetShape(3, 3)], NOTHING, NOTHING, 0)


def test_cpu_refuses_an_arena_elsewhere() -> None:
    arena_NU = torch.zeros(4, UNIT, device="meta")
    with pytest.raises(BackendUnavailableError, match="needs the arena on the CPU, not on meta"):
        sparse_plan("cpu", arena_NU, [TargetShape(64, 64)], NOTHING, NOTHING, 0)


def test_triton_refuses_the_cpu_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.kernels.triton.low_rank.INTERPRETED", False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET"):
        sparse_plan("triton", torch.zeros(4, UNIT), [TargetShape(64, 64)], NOTHING, NOTHING, 0)
