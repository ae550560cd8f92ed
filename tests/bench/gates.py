"""What a gate costs on a CPU or GPU: low-rank work with and without a factor for each rank row of each request.

Every request has its own gate, as users of iLoRA have, so the rows of one adapter lie in as many segments as there are
requests; without gates they are one. Run it from the repository root, alone on a core if it can be had:

    OMP_NUM_THREADS=1 python -m tests.bench.gates --out docs/results/gates-cpu.jsonl

Shapes: T batch rows, W the width (in and out), R rank, N units in the arena, U elements per unit (here W).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch

from motet.kernels.dispatch import Backend, default_backend, low_rank_plan
from motet.kernels.ops import LowRankPlan
from motet.kernels.segments import Segments, TargetShape
from tests.bench.machine import Machine
from tests.support.tolerances import TOLERANCES

WIDTHS = (576, 2048, 4096)
CASES = ((1, 1, 8), (8, 1, 8), (32, 1, 8), (256, 8, 8), (32, 8, 8), (32, 1, 64), (256, 1, 64))
"""(requests, adapters, rank); each request has one row, and each adapter has as many neighbouring requests."""
WARM_UPS, ROUNDS = 3, 41
TARGETS = 30
LARGEST_RATIO = 1.05


@dataclass(frozen=True)
class Cost:
    """One batch.

    Attributes:
        plain_us, gated_us: medians of a product of one target, without and with gates.
        ratio: median over rounds of gated over plain, taken turn by turn.
    """

    width: int
    dtype: str
    requests: int
    adapters: int
    rank: int
    plain_us: float
    gated_us: float
    ratio: float


def measure(
    backend: Backend, device: torch.device, width: int, dtype: torch.dtype, case: tuple[int, int, int], rounds: int
) -> Cost:
    """Both ways in turn, after comparing the gated product with the reference's."""
    requests, adapters, rank = case
    random = torch.Generator().manual_seed(0)
    arena_NU = torch.randn(TARGETS * adapters * 2 * rank, width, generator=random).div(rank**0.5).to(device, dtype)
    x_TW = torch.randn(requests, width, generator=random).to(device, dtype)
    y_TW = torch.zeros_like(x_TW)
    shapes = [TargetShape(width, width)] * TARGETS
    gate_SG = np.random.default_rng(0).dirichlet(np.ones(4), requests).astype(np.float32)
    plain = low_rank_plan(backend, arena_NU, shapes, _segments(case, None), requests)
    segments = _segments(case, gate_SG)
    gated = low_rank_plan(backend, arena_NU, shapes, segments, requests)
    for target in (0, TARGETS - 1):
        actual_TW = torch.zeros_like(y_TW)
        gated.add_(target, actual_TW, x_TW)
        expected_TW, magnitude_TW = _expected(arena_NU, x_TW, segments, target)
        TOLERANCES["low_rank", dtype].assert_close(actual_TW, expected_TW, magnitude=magnitude_TW)
    plain_us, gated_us = [], []
    for round_ in range(WARM_UPS + rounds):
        ways = [(plain, plain_us), (gated, gated_us)]
        for plan, times in ways if round_ % 2 else reversed(ways):
            times.append(_once_us(partial(_step, plan, y_TW, x_TW), device) / TARGETS)
    ratios = [one / other for one, other in zip(gated_us[WARM_UPS:], plain_us[WARM_UPS:], strict=True)]
    medians = (round(median(times[WARM_UPS:]), 2) for times in (plain_us, gated_us))
    return Cost(width, str(dtype).removeprefix("torch."), *case, *medians, round(median(ratios), 4))


def _segments(case: tuple[int, int, int], gate_SG: np.ndarray | None) -> Segments:
    """One segment an adapter without gates, one a request with them."""
    requests, adapters, rank = case
    count = adapters if gate_SG is None else requests
    bounds = np.arange(count + 1, dtype=np.int32) * np.int32(requests // count)
    adapter_S = np.arange(count) * adapters // count
    first = (np.arange(TARGETS)[:, None] * adapters + adapter_S[None]) * 2 * rank
    ranks = np.full((TARGETS, count), rank, dtype=np.int32)
    gate = None
    if gate_SG is not None:
        gate = np.repeat(gate_SG, rank // gate_SG.shape[1], axis=1)[None].repeat(TARGETS, axis=0)
    return Segments(bounds[:-1], bounds[1:], first.astype(np.int32), (first + rank).astype(np.int32), ranks, gate)


def _expected(
    arena_NU: torch.Tensor, x_TW: torch.Tensor, segments: Segments, target: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, request by request, and what may be rounded on the way to each element."""
    assert segments.gate is not None
    rows, sizes = [], []
    for s in range(len(segments)):
        a, b, rank = (int(table[target, s]) for table in (segments.a_first, segments.b_first, segments.rank))
        gate_R = torch.from_numpy(segments.gate[target, s, :rank]).to(x_TW.device).double()
        hidden_R = arena_NU[a : a + rank].double() @ x_TW[s].double() * gate_R
        rows.append(hidden_R @ arena_NU[b : b + rank].double())
        sizes.append(rows[-1].abs() + hidden_R.abs() @ arena_NU[b : b + rank].double().abs())
    return torch.stack(rows), torch.stack(sizes)


def _step(plan: LowRankPlan, y_TW: torch.Tensor, x_TW: torch.Tensor) -> None:
    for target in range(TARGETS):
        plan.add_(target, y_TW, x_TW)


def _once_us(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began_ns = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - began_ns) / 1000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    backend = default_backend(device)
    for dtype in (torch.bfloat16, torch.float32):
        for width in WIDTHS:
            load_before = os.getloadavg()
            costs = [measure(backend, device, width, dtype, case, options.rounds) for case in CASES]
            line = {
                "utc": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": asdict(Machine.here()),
                "versions": {"torch": version("torch")},
                "load_before": load_before,
                "arguments": {"backend": backend, "device": device.type, "threads": 1, "rounds": options.rounds},
                "costs": [asdict(cost) for cost in costs],
            }
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for cost in costs:
                print(*asdict(cost).values(), flush=True)


if __name__ == "__main__":
    main()
