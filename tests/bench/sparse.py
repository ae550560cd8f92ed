"""What sparse adapters cost beside LoRA on a CPU: a linear's adapter work per batch, and writing one into the weight.

A sparse operand of S rows has the parameters of a LoRA pair of rank S/2 where the linear is square. Run it from the
repository root, alone on a core if it can be had; a line is appended for each dtype and width:

    OMP_NUM_THREADS=1 python -m tests.bench.sparse --out docs/results/sparse-cpu.jsonl

Shapes: T batch rows, W the width (in and out), S indices, R rank, N units in the arena, U elements per unit (here W).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from motet.kernels.dispatch import Backend, low_rank_plan, sparse_plan
from motet.kernels.ops import LowRankPlan, SparsePlan
from motet.kernels.segments import Segments, TargetShape
from motet.kernels.sparse import SparseSegments
from tests.bench.lines import append, surroundings
from tests.support.tolerances import TOLERANCES

WIDTHS = (576, 1024, 2048, 4096, 8192)
BATCHES = ((1, 1), (8, 1), (32, 1), (8, 8), (32, 8))
"""(rows, adapters): every adapter has as many neighbouring rows as the others."""
EFFECTS = (("column", 32), ("row", 32), ("lora", 16), ("lora", 32))
"""(effect, S or R)."""
WARM_UPS, ROUNDS = 2, 25
WORKING_SET_BYTES = 2**26
"""Of LoRA of rank 32; twice the 32 MiB of L3 here, since a forward reads the whole base between two uses."""


class Times(NamedTuple):
    """Of all rounds; the least tells what the work takes when nothing else runs."""

    median_us: float
    least_us: float


@dataclass(frozen=True)
class Work:
    """The adapter work of one linear on one batch.

    Attributes:
        operand_bytes: of all the batch's adapters, index lists included.
        step: a call of a plan in use, as decode has it.
        first_step: a call of a new plan, with its share of making it, as prefill has it.
    """

    effect: str
    rank: int
    rows: int
    adapters: int
    operand_bytes: int
    step: Times
    first_step: Times


@dataclass(frozen=True)
class Switch:
    """One adapter written into a dense weight, and taken out again.

    Attributes:
        restore_by: how it is taken out: "subtract" (inexact), or "copy" of what was there before (exact).
    """

    effect: str
    rank: int
    restore_by: str
    write: Times
    restore: Times


Plan = LowRankPlan | SparsePlan


@dataclass(frozen=True)
class _Load:
    """The operands of enough targets to leave the cache between two uses, and what to do with them.

    Attributes:
        plan: makes a plan of a backend.
        kept: one in use.
        step: calls a plan once for every target.
    """

    effect: str
    rank: int
    operand_bytes: int
    plan: Callable[[Backend], Plan]
    kept: Plan
    step: Callable[[Plan], None]


def measure_work(width: int, dtype: torch.dtype, rounds: int = ROUNDS) -> list[Work]:
    """All effects on all batches, at one width; the effects take turns, so that a busy machine is busy for all."""
    results = []
    for rows, adapters in BATCHES:
        n_targets = max(2, WORKING_SET_BYTES // (adapters * 2 * 32 * width * dtype.itemsize))
        loads = [_load(effect, rank, rows, adapters, n_targets, width, dtype) for effect, rank in EFFECTS]
        calls = [call for load in loads for call in (partial(load.step, load.kept), partial(_first_step, load))]
        times = _times(calls, rounds, per=n_targets)
        results += [
            Work(load.effect, load.rank, rows, adapters, load.operand_bytes, step, first_step)
            for load, step, first_step in zip(loads, times[::2], times[1::2], strict=True)
        ]
    return results


def _first_step(load: _Load) -> None:
    load.step(load.plan("cpu"))


def _load(effect: str, rank: int, rows: int, adapters: int, n_targets: int, width: int, dtype: torch.dtype) -> _Load:
    random = torch.Generator().manual_seed(0)
    n_operands = n_targets * adapters
    per_operand = 2 * rank if effect == "lora" else rank
    operands = torch.randn(n_operands * per_operand, width, generator=random).to(dtype) / rank**0.5
    first = (np.arange(n_operands, dtype=np.int32) * per_operand).reshape(n_targets, adapters)
    index_units = 0 if effect == "lora" else -(-rank * 4 // (width * dtype.itemsize))
    in_lists = (np.arange(n_operands, dtype=np.int32) * index_units).reshape(n_targets, adapters)
    index_first = in_lists + np.int32(len(operands))
    lists = torch.zeros(n_operands, index_units * width, dtype=dtype)
    for k in range(n_operands if index_units else 0):
        lists[k].view(torch.int32)[:rank] = torch.randperm(width, generator=random)[:rank].int()
    arena_NU = torch.cat([operands, lists.view(-1, width)])
    shapes = [TargetShape(width, width)] * n_targets
    bounds = np.arange(adapters + 1, dtype=np.int32) * np.int32(rows // adapters)
    count = np.full((n_targets, adapters), rank, dtype=np.int32)
    x_TI, y_TO = torch.randn(rows, width, generator=random).to(dtype), torch.zeros(rows, width, dtype=dtype)

    def plan(backend: Backend) -> Plan:
        if effect == "lora":
            segments = Segments(bounds[:-1], bounds[1:], first, first + np.int32(rank), count)
            return low_rank_plan(backend, arena_NU, shapes, segments, rows)
        sparse, none = SparseSegments(bounds[:-1], bounds[1:], first, index_first, count), _empty(n_targets)
        columns, row_segments = (sparse, none) if effect == "column" else (none, sparse)
        return sparse_plan(backend, arena_NU, shapes, columns, row_segments, rows)

    def step(plan: Plan) -> None:
        y_TO.zero_()
        for target in range(n_targets):
            plan.add_(target, y_TO, x_TI)

    kept = plan("cpu")
    if effect != "lora":
        _check(kept, plan("reference"), n_targets, x_TI, width)
    operand_bytes = adapters * (per_operand * width * dtype.itemsize + (rank * 4 if index_units else 0))
    return _Load(effect, rank, operand_bytes, plan, kept, step)


def _empty(n_targets: int) -> SparseSegments:
    rows, operands = np.zeros(0, dtype=np.int32), np.zeros((n_targets, 0), dtype=np.int32)
    return SparseSegments(rows, rows, operands, operands, operands)


def _check(plan: Plan, reference: Plan, n_targets: int, x_TI: torch.Tensor, width: int) -> None:
    """No figure without the right answer; on the first and the last target, onto zeros."""
    for target in (0, n_targets - 1):
        actual_TO, expected_TO = torch.zeros(2, len(x_TI), width, dtype=x_TI.dtype)
        plan.add_(target, actual_TO, x_TI)
        reference.add_(target, expected_TO, x_TI)
        TOLERANCES["sparse", x_TI.dtype].assert_close(actual_TO, expected_TO)
        assert expected_TO.any()


def measure_switches(width: int, dtype: torch.dtype, rounds: int = ROUNDS) -> list[Switch]:
    """Into a weight [width, width] and out again, every way; they take turns, each from the same weight."""
    random = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(width, width, generator=random).to(dtype)
    original_OI = weight_OI.clone()

    def copy_back() -> None:
        weight_OI.copy_(original_OI)

    ways: list[tuple[str, int, str]] = []
    calls: list[Callable[[], object]] = []
    for effect, rank in EFFECTS:
        v_SW = torch.randn(rank, width, generator=random).to(dtype)
        if effect == "lora":
            b_OR = torch.randn(width, rank, generator=random).to(dtype)
            merge, subtract = (partial(weight_OI.addmm_, b_OR, v_SW, alpha=sign) for sign in (1, -1))
            ways += [(effect, rank, "subtract"), (effect, rank, "copy")]
            calls += [merge, subtract, copy_back, merge, copy_back, copy_back]
        else:
            slices = _Slices(weight_OI, v_SW, effect, torch.randperm(width, generator=random)[:rank])
            slices.write()
            assert not torch.equal(weight_OI, original_OI)
            slices.restore()
            assert torch.equal(weight_OI, original_OI)
            ways.append((effect, rank, "copy"))
            calls += [slices.write, slices.restore, copy_back]
    times = _times(calls, rounds, per=1)
    return [Switch(*way, write, restore) for way, write, restore in zip(ways, times[::3], times[1::3], strict=True)]


class _Slices:
    """Writes V onto some columns or rows of a weight, and puts back what was there."""

    def __init__(self, weight_OI: torch.Tensor, v_SW: torch.Tensor, effect: str, index_S: torch.Tensor) -> None:
        self._weight_OI, self._index_S = weight_OI, index_S
        self._dim, self._v = (1, v_SW.T.contiguous()) if effect == "column" else (0, v_SW)
        self._saved = self._v

    def write(self) -> None:
        self._saved = self._weight_OI.index_select(self._dim, self._index_S)
        self._weight_OI.index_copy_(self._dim, self._index_S, self._saved + self._v)

    def restore(self) -> None:
        self._weight_OI.index_copy_(self._dim, self._index_S, self._saved)


def _times(calls: Sequence[Callable[[], object]], rounds: int, per: int) -> list[Times]:
    """Of each call, made in turn, divided by `per`."""
    times_us: list[list[float]] = [[] for _ in calls]
    for _ in range(WARM_UPS + rounds):
        for call, times in zip(calls, times_us, strict=True):
            times.append(_once_us(call) / per)
    return [Times(*(round(of(times[WARM_UPS:]), 2) for of in (median, min))) for times in times_us]


def _once_us(call: Callable[[], object]) -> float:
    began_ns = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began_ns) / 1000


def _plain(result: Work | Switch) -> dict[str, object]:
    fields = asdict(result)
    return {name: value._asdict() if isinstance(value, Times) else value for name, value in fields.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for width in options.widths:
            head = surroundings("torch")
            work = [_plain(work) for work in measure_work(width, dtype)]
            switches = [_plain(switch) for switch in measure_switches(width, dtype)]
            line = {
                **head,
                "arguments": {
                    "width": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "threads": 1,
                    "rounds": ROUNDS,
                    "working_set_bytes": WORKING_SET_BYTES,
                },
                "note": "medians and least; jobs that are no part of this share the machine",
                "work": work,
                "switch": switches,
            }
            append(options.out, line)
            print(f"{dtype} {width}")
            for result in (*work, *switches):
                print("  ", *result.values())


if __name__ == "__main__":
    main()
