"""What a step of the default model takes on a CPU: native, native with int8, and by the modules in torch, in one run.

Every request of a decode step has the same number of positions behind it; a prompt is one request's, from its first
token on. The ways take turns, so that a busy machine is busy for all, and torch's logits are compared first. Run it
from the repository root, with both cores to itself if they can be had:

    python -m tests.bench.decode --out docs/results/decode-cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from motet.adapters.lease import Lease
from motet.server.engine.types import Applied, BlockId, GenerationId, Plan, Sampling, Span
from motet.server.model.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from motet.server.model.runner import ModelRunner
from tests.bench.cpu_usage import CpuMeter
from tests.bench.machine import Machine
from tests.bench.make_adapters import make_adapters
from tests.support.harness import Harness

BATCHES = (1, 8, 32)
ADAPTERS = (0, 1, 8, 32)
PROMPTS = (128, 512)
RANKS = (8, 16)
CONTEXT, BLOCK_SIZE = 160, 16
TURN_S = 0.25
"""How long one way runs before it is the other's turn."""
GREEDY = Sampling(max_tokens=1, temperature=0)


@dataclass(frozen=True)
class Times:
    """Of all steps, in milliseconds; the least tells what a step takes when nothing else runs."""

    median_ms: float
    least_ms: float
    steps: int


@dataclass(frozen=True)
class StepCost:
    """One batch.

    Attributes:
        rows: requests of a decode step, or tokens of a prompt.
        adapters: different ones, dealt to the requests in turn; 0 is the base.
        speedup: median torch time over median native time.
        deviation: root mean square difference of the logits, in standard deviations of them.
    """

    kind: str
    rows: int
    adapters: int
    native: Times
    int8: Times
    torch: Times | None
    speedup: float | None
    deviation: float | None


class Way:
    """The model served in one way."""

    def __init__(
        self, folder: Path, adapters: Sequence[Path], *, native: bool, threads: int, int8: bool = False
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        blocks = 32 * (CONTEXT // BLOCK_SIZE + 1) + 512 // BLOCK_SIZE
        self.harness = Harness(
            model, blocks=blocks, block_size=BLOCK_SIZE, arena_bytes=1 << 29, native=native, int8=int8
        )
        self._runner = ModelRunner(self.harness.loaded, self.harness.effects)  # which copies no logits
        self._threads = 1 if native else threads
        self._leases: list[Lease] = []
        for path in adapters:
            self.harness.load(path.name, path)
            self._leases.append(self.harness.registry.acquire(path.name))

        for index in range(max(BATCHES)):  # real contexts: over an empty one, bfloat16 alone changes the logits
            self._runner.run(Plan((self._span(index, None, CONTEXT - 1, 0),)))

    def plan(self, kind: str, rows: int, adapters: int) -> Plan:
        """Requests with their adapters, those of one adapter next to each other."""
        if kind == "prefill":
            return Plan((self._span(0, adapters - 1 if adapters else None, rows, 0),))
        chosen = sorted(row % adapters if adapters else -1 for row in range(rows))
        return Plan(tuple(self._span(i, a if a >= 0 else None, 1, CONTEXT - 1) for i, a in enumerate(chosen)))

    def _span(self, index: int, adapter: int | None, tokens: int, start: int) -> Span:
        per_request = max(CONTEXT, tokens) // BLOCK_SIZE
        return Span(
            generation=GenerationId(index),
            applied=() if adapter is None else (Applied(self._leases[adapter]),),
            tokens=tuple(1000 + (7 * index + i) % 9000 for i in range(tokens)),
            start=start,
            blocks=tuple(BlockId(index * per_request + i) for i in range(per_request)),
            draw=True,
            sampling=GREEDY,
            drawn=0,
        )

    def time(self, plan: Plan, limit_s: float) -> list[float]:
        """Milliseconds of steps, one after the other, for about this time and at least once."""
        torch.set_num_threads(self._threads)
        times_ms: list[float] = []
        until_s = time.perf_counter() + limit_s
        while not times_ms or time.perf_counter() < until_s:
            began_ns = time.perf_counter_ns()
            self._runner.run(plan)
            times_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
        return times_ms

    def logits(self, plan: Plan) -> torch.Tensor:
        """[requests, V] float32."""
        self.harness.runner.recorded.clear()
        self.harness.runner.run(plan)
        return torch.stack([self.harness.runner.recorded[span.generation][0] for span in plan.spans])


def measure(ways: Mapping[str, Way], kind: str, rows: int, adapters: int, rounds: int) -> StepCost:
    """Of the ways "native" and "int8", and "torch" where it is there."""
    plans = {name: way.plan(kind, rows, adapters) for name, way in ways.items()}
    logits = {name: way.logits(plans[name]) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            latest = way.time(plans[name], TURN_S)
            taken[name] += latest if round_number else []
    times = {name: Times(round(median(one), 3), round(min(one), 3), len(one)) for name, one in taken.items()}
    native, int8, torch_ = times["native"], times["int8"], times.get("torch")
    if torch_ is None:
        return StepCost(kind, rows, adapters, native, int8, None, None, None)
    deviation = float((logits["native"] - logits["torch"]).square().mean().sqrt() / logits["torch"].std())
    speedup = round(torch_.median_ms / native.median_ms, 2)
    return StepCost(kind, rows, adapters, native, int8, torch_, speedup, round(deviation, 4))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--native-only", action="store_true")
    parser.add_argument("--label", default="")
    options = parser.parse_args(arguments)
    folder = ensure_default_model()
    load_before, meter = os.getloadavg(), CpuMeter(os.getpid())
    with tempfile.TemporaryDirectory() as scratch:
        paths = make_adapters(str(folder), Path(scratch), max(ADAPTERS), RANKS)
        ways = {
            "native": Way(folder, paths, native=True, threads=options.threads),
            "int8": Way(folder, paths, native=True, threads=options.threads, int8=True),
        }
        if not options.native_only:
            ways["torch"] = Way(folder, paths, native=False, threads=options.threads)
        cases = [("decode", rows, adapters) for rows in BATCHES for adapters in ADAPTERS if adapters <= rows]
        cases += [("prefill", rows, adapters) for rows in PROMPTS for adapters in (0, 1)]
        costs = []
        for case in cases:
            costs.append(measure(ways, *case, options.rounds))
            print(*asdict(costs[-1]).values(), flush=True)
    assert all(ways[name].harness.runner.rows.keys() == {"native"} for name in ("native", "int8"))
    line = {
        "label": options.label,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(Machine.here()),
        "versions": {"torch": version("torch"), "transformers": version("transformers")},
        "load_before": load_before,
        "cpu": asdict(meter.stop()),
        "arguments": {
            "model": DEFAULT_MODEL_NAME,
            "dtype": "bfloat16",
            "threads": options.threads,
            "context": CONTEXT,
            "ranks": RANKS,
            "rounds": options.rounds,
        },
        "note": "medians and least; jobs that are no part of this share the machine",
        "costs": [asdict(cost) for cost in costs],
    }
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
