"""What a gate costs on a CPU or GPU: a decode step, and the low-rank product alone, with and without gates.

Every request has its own gate, as users of iLoRA have. A step is that of SmolLM2-135M in bfloat16 with adapters on all
seven linears. Run it from the repository root, alone on a core if it can be had; `--backend` chooses another than the
device's own:

    OMP_NUM_THREADS=1 python -m tests.bench.gates --out docs/results/gates-cpu.jsonl

Shapes: T batch rows, W the width (in and out), R rank, N units in the arena, U elements per unit (here W).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from motet.kernels.dispatch import Backend, default_backend, low_rank_plan
from motet.kernels.ops import LowRankPlan
from motet.kernels.segments import Gates, Segments, TargetShape
from motet.server.engine.types import Applied, BlockId, GenerationId, Plan, Sampling, Span
from tests.bench.lines import append, surroundings
from tests.bench.make_adapters import make_adapters
from tests.support.harness import Harness
from tests.support.tolerances import TOLERANCES

WIDTHS = (576, 2048, 4096)
CASES = ((1, 1, 8), (8, 1, 8), (32, 1, 8), (256, 8, 8), (32, 8, 8), (32, 1, 64), (256, 1, 64))
"""(requests, adapters, rank); each request has one row, and each adapter has as many neighbouring requests."""
WARM_UPS, ROUNDS = 3, 41
TARGETS = 30
STEP_CASES = ((1, 1), (8, 8), (32, 8), (32, 1))
"""(requests, adapters) of a decode step."""
STEP_RANK, PROMPT_TOKENS, BLOCK_SIZE = 8, 64, 16
STEPS = 8
"""Steps that one form takes before it is the other's turn; the first, which prepares what the rest reuse, is apart."""


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
    gate_TG = np.random.default_rng(0).dirichlet(np.ones(4), requests).astype(np.float32)
    plain = low_rank_plan(backend, arena_NU, shapes, _segments(case, None), requests)
    segments = _segments(case, gate_TG)
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


def _segments(case: tuple[int, int, int], gate_TG: np.ndarray | None) -> Segments:
    """One segment an adapter, with a gate for each row or without."""
    requests, adapters, rank = case
    bounds = np.arange(adapters + 1, dtype=np.int32) * np.int32(requests // adapters)
    first = (np.arange(TARGETS)[:, None] * adapters + np.arange(adapters)[None]) * 2 * rank
    ranks = np.full((TARGETS, adapters), rank, dtype=np.int32)
    gates = None
    if gate_TG is not None:
        factor_TR = np.repeat(gate_TG, rank // gate_TG.shape[1], axis=1)
        gates = Gates(np.arange(requests, dtype=np.int32), np.broadcast_to(factor_TR, (TARGETS, *factor_TR.shape)))
    return Segments(bounds[:-1], bounds[1:], first.astype(np.int32), (first + rank).astype(np.int32), ranks, gates)


def _expected(
    arena_NU: torch.Tensor, x_TW: torch.Tensor, segments: Segments, target: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, request by request, and what may be rounded on the way to each element."""
    assert segments.gates is not None
    rows, sizes = [], []
    for s in range(len(segments)):
        a, b, rank = (int(table[target, s]) for table in (segments.a_first, segments.b_first, segments.rank))
        for t in range(segments.row_start[s], segments.row_stop[s]):
            gate_R = torch.from_numpy(segments.gates.factor[target, t, :rank]).to(x_TW.device).double()
            hidden_R = arena_NU[a : a + rank].double() @ x_TW[t].double() * gate_R
            rows.append(hidden_R @ arena_NU[b : b + rank].double())
            sizes.append(rows[-1].abs() + hidden_R.abs() @ arena_NU[b : b + rank].double().abs())
    return torch.stack(rows), torch.stack(sizes)


def _step(plan: LowRankPlan, y_TW: torch.Tensor, x_TW: torch.Tensor) -> None:
    for target in range(TARGETS):
        plan.add_(target, y_TW, x_TW)


@dataclass(frozen=True)
class StepCost:
    """A decode step of the whole model, each request with a row.

    Attributes:
        plain_ms, gated_ms: medians.
        ratio: median over rounds of gated over plain, taken turn by turn.
        first_ratio: the same of steps whose requests are not those of the step before.
    """

    requests: int
    adapters: int
    plain_ms: float
    gated_ms: float
    ratio: float
    first_ratio: float


def measure_steps(backend: Backend, model: Any, adapters: Path, rounds: int) -> list[StepCost]:
    """Both ways in turn, after seeing that a gate of 0 leaves the base's logits, bit for bit, and others do not."""
    most = max(requests for requests, _ in STEP_CASES)
    blocks = PROMPT_TOKENS // BLOCK_SIZE + 1
    harness = Harness(model, backend=backend, blocks=most * blocks, block_size=BLOCK_SIZE)
    folders = sorted(adapters.iterdir())
    for folder in folders:
        harness.load(folder.name, folder)
    factors = np.random.default_rng(0).uniform(0.5, 1.5, most).tolist()
    return [
        _measure_step(harness, [f.name for f in folders[:n]], factors[:requests], rounds) for requests, n in STEP_CASES
    ]


def _measure_step(harness: Harness, adapters: Sequence[str], factors: Sequence[float], rounds: int) -> StepCost:
    requests = len(factors)
    leases = [harness.registry.acquire(adapters[i * len(adapters) // requests]) for i in range(requests)]
    applied = {
        "base": [()] * requests,
        "off": [(Applied(lease, (0.0,)),) for lease in leases],
        "plain": [(Applied(lease),) for lease in leases],
        "gated": [(Applied(lease, (factor,)),) for lease, factor in zip(leases, factors, strict=True)],
    }
    for i in range(requests):
        harness.runner.run(Plan((_span(i, (), tuple(range(100, 100 + PROMPT_TOKENS)), 0),)))
    harness.runner.recorded.clear()
    plans = {
        form: Plan(tuple(_span(i, parts, (100 + i,), PROMPT_TOKENS) for i, parts in enumerate(every)))
        for form, every in applied.items()
    }
    logits = {}
    for form, plan in plans.items():
        harness.runner.run(plan)
        logits[form] = torch.stack([harness.runner.recorded.pop(GenerationId(i))[0] for i in range(requests)])
    assert torch.equal(logits["off"], logits["base"])
    assert not torch.equal(logits["gated"], logits["plain"])
    times: dict[str, list[float]] = {"plain": [], "gated": []}
    first: dict[str, list[float]] = {"plain": [], "gated": []}
    for round_ in range(WARM_UPS + rounds):
        for form in sorted(times, reverse=bool(round_ % 2)):
            taken = [_once_us(partial(harness.runner.run, plans[form]), harness.loaded.device) for _ in range(STEPS)]
            harness.runner.recorded.clear()
            if round_ >= WARM_UPS:
                first[form].append(taken[0])
                times[form].append(median(taken[1:]))
    for lease in leases:
        harness.registry.release(lease)
    plain_ms, gated_ms = (round(median(times[form]) / 1000, 3) for form in ("plain", "gated"))
    ratio, first_ratio = (
        round(median(one / other for one, other in zip(taken["gated"], taken["plain"], strict=True)), 4)
        for taken in (times, first)
    )
    return StepCost(requests, len(adapters), plain_ms, gated_ms, ratio, first_ratio)


def _span(number: int, applied: tuple[Applied, ...], tokens: tuple[int, ...], start: int) -> Span:
    count = PROMPT_TOKENS // BLOCK_SIZE + 1
    blocks = tuple(BlockId(number * count + block) for block in range(count))
    return Span(GenerationId(number), applied, tokens, start, blocks, True, Sampling(max_tokens=1, temperature=0), 0)


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
    parser.add_argument("--backend", choices=("reference", "cpu", "triton"))
    parser.add_argument("--model", type=Path, help="folder of the base model; by default the default model")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    backend = options.backend or default_backend(device)

    def record(kind: str, costs: Callable[[], Sequence[Any]]) -> None:
        head = surroundings("torch", "transformers")
        line = {
            "label": kind,
            **head,
            "arguments": {"backend": backend, "device": device.type, "threads": 1, "rounds": options.rounds},
            "costs": [asdict(cost) for cost in costs()],
        }
        append(options.out, line)
        for cost in line["costs"]:
            print(kind, *cost.values(), flush=True)

    if (model_folder := options.model) is None:
        from motet.server.model.default_model import ensure_default_model

        model_folder = ensure_default_model()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        adapters = Path(scratch)
        make_adapters(str(model_folder), adapters, max(n for _, n in STEP_CASES), [STEP_RANK], std=0.02)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).to(device).eval()
        record("step", partial(measure_steps, backend, model, adapters, options.rounds))
    for dtype in (torch.bfloat16, torch.float32):
        for width in WIDTHS:
            record(
                "product",
                lambda width=width, dtype=dtype: [  # type: ignore[misc]
                    measure(backend, device, width, dtype, case, options.rounds) for case in CASES
                ],
            )


if __name__ == "__main__":
    main()
