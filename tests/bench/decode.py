"""What a step of the default model takes on a CPU: the native backend against the modules in torch, in one run.

Every request of a decode step has the same number of positions behind it; a prompt is one request's, from its first
token on. Both ways take turns, so that a busy machine is busy for both, and their logits are compared first. Run it
from the repository root, with both cores to itself if they can be had:

    python -m tests.bench.decode --out docs/results/decode-cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from motet.adapters.lease import Lease
from motet.server.engine.types import Plan
from motet.server.model.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from motet.server.model.runner import ModelRunner
from tests.bench.cpu_usage import CpuMeter
from tests.bench.machine import Machine
from tests.bench.make_adapters import make_adapters
from tests.bench.steps import BLOCK_SIZE, CONTEXT, TURN_S, Times, decode_plan, fill_contexts, span, time_steps
from tests.support.harness import Harness
from tests.support.models import load_dense

BATCHES = (1, 8, 32)
ADAPTERS = (0, 1, 8, 32)
PROMPTS = (128, 512)
RANKS = (8, 16)


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
    torch: Times | None
    speedup: float | None
    deviation: float | None


class Way:
    """The model served in one of the two ways."""

    def __init__(
        self, folder: Path, adapters: Sequence[Path], *, native: bool, threads: int, int8: bool = False
    ) -> None:
        model = load_dense(folder, torch.bfloat16)
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
        fill_contexts(self._runner, max(BATCHES))

    def plan(self, kind: str, rows: int, adapters: int) -> Plan:
        """Requests with their adapters, those of one adapter next to each other."""
        if kind == "prefill":
            return Plan((span(0, self._leases[adapters - 1] if adapters else None, rows, 0),))
        if not adapters:
            return decode_plan([None] * rows)
        return decode_plan([self._leases[adapter] for adapter in sorted(row % adapters for row in range(rows))])

    def time(self, plan: Plan, limit_s: float) -> list[float]:
        """Milliseconds of steps, one after the other, for about this time and at least once."""
        torch.set_num_threads(self._threads)
        return time_steps(self._runner, [plan], limit_s)

    def logits(self, plan: Plan) -> torch.Tensor:
        """[requests, V] float32."""
        self.harness.runner.recorded.clear()
        self.harness.runner.run(plan)
        return torch.stack([self.harness.runner.recorded[span.generation][0] for span in plan.spans])


def measure(ways: Sequence[Way], kind: str, rows: int, adapters: int, rounds: int) -> StepCost:
    """The first way is the native one; the second, where it is there, torch's."""
    plans = [way.plan(kind, rows, adapters) for way in ways]
    logits = [way.logits(plan) for way, plan in zip(ways, plans, strict=True)]
    taken: list[list[float]] = [[] for _ in ways]
    for round_number in range(rounds + 1):
        for way, plan, times_ms in zip(ways, plans, taken, strict=True):
            latest = way.time(plan, TURN_S)
            times_ms += latest if round_number else []
    native, *others = map(Times.of, taken)
    if not others:
        return StepCost(kind, rows, adapters, native, None, None, None)
    deviation = float((logits[0] - logits[1]).square().mean().sqrt() / logits[1].std())
    return StepCost(
        kind, rows, adapters, native, others[0], round(others[0].median_ms / native.median_ms, 2), round(deviation, 4)
    )


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
        kinds = (True,) if options.native_only else (True, False)
        ways = [Way(folder, paths, native=native, threads=options.threads) for native in kinds]
        cases = [("decode", rows, adapters) for rows in BATCHES for adapters in ADAPTERS if adapters <= rows]
        cases += [("prefill", rows, adapters) for rows in PROMPTS for adapters in (0, 1)]
        costs = []
        for case in cases:
            costs.append(measure(ways, *case, options.rounds))
            print(*asdict(costs[-1]).values(), flush=True)
    assert ways[0].harness.runner.rows.keys() == {"native"}
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
