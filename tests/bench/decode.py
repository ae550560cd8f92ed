"""What a step of the default model takes on a CPU: native, native with int8, and by the modules in torch, in one run.

Every request of a decode step has the same number of positions behind it; a prompt is one request's, from its first
token on. The ways take turns, so that a busy machine is busy for all, and torch's logits are compared first. Run it
from the repository root, with both cores to itself if they can be had:

    python -m tests.bench.decode --out docs/results/decode-cpu.jsonl
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from motet.adapters.lease import Lease
from motet.server.engine.types import Plan
from motet.server.model.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from motet.server.model.runner import ModelRunner
from tests.bench.cpu_usage import CpuMeter
from tests.bench.lines import append, surroundings
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
    int8: Times
    torch: Times | None
    speedup: float | None
    deviation: float | None


class Way:
    """The model served in one way."""

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


def measure(ways: Mapping[str, Way], kind: str, rows: int, adapters: int, rounds: int) -> StepCost:
    """Of the ways "native" and "int8", and "torch" where it is there."""
    plans = {name: way.plan(kind, rows, adapters) for name, way in ways.items()}
    logits = {name: way.logits(plans[name]) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            latest = way.time(plans[name], TURN_S)
            taken[name] += latest if round_number else []
    times = {name: Times.of(one) for name, one in taken.items()}
    native, int8, modules = times["native"], times["int8"], times.get("torch")
    if modules is None:
        return StepCost(kind, rows, adapters, native, int8, None, None, None)
    deviation = float((logits["native"] - logits["torch"]).square().mean().sqrt() / logits["torch"].std())
    speedup = round(modules.median_ms / native.median_ms, 2)
    return StepCost(kind, rows, adapters, native, int8, modules, speedup, round(deviation, 4))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--native-only", action="store_true")
    parser.add_argument("--label", default="")
    options = parser.parse_args(arguments)
    folder = ensure_default_model()
    head, meter = surroundings("torch", "transformers"), CpuMeter(os.getpid())
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
        **head,
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
        append(options.out, line)


if __name__ == "__main__":
    main()
