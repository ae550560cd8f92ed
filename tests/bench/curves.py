"""What a native decode step costs as a batch grows, and as what is not in the batch grows.

Every point is a batch of the default model at one context, beside registered adapters that are all in the arena. Those
of one kind are copies of one folder: each has a name of its own, and its own place in the arena. Those that
stand beside the batch of eight in their hundreds are of rank 8 on k_proj alone, 0.4 MB each, so that a thousand fit;
all others are on all seven linears. The points take turns, so that a busy machine is busy for all. Run it from the
repository root, in three minutes:

    python -m tests.bench.curves --out docs/results/curves-cpu.jsonl
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from motet.adapters.host import HostTier
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.adapters.tiers import Tiers
from motet.server.model.batch import PARTS, EffectsBuilder
from motet.server.model.default_model import DEFAULT_MODEL_NAME, ensure_default_model
from motet.server.model.loader import LoadedModel
from motet.server.model.runner import NATIVE, ModelRunner
from motet.server.serve import new_residency
from tests.bench.cpu_usage import CpuMeter
from tests.bench.lines import append, surroundings
from tests.bench.make_adapters import LLAMA_LINEARS, make_adapters
from tests.bench.steps import BLOCK_SIZE, CONTEXT, TURN_S, Times, decode_plan, fill_contexts, time_steps
from tests.support.harness import Harness
from tests.support.models import load_dense

LIVE_ROWS = (1, 2, 4, 8, 16, 24, 32)
RANKS = (8, 16)
BATCH, BATCH_RANK = 8, 8
REGISTERED = (8, 64, 256, 1000)
LARGEST_RANKS = (8, 16, 64, 128)
OF_LARGEST_RANK = 2
"""How many registered adapters have it."""
ARENA_BYTES = 1 << 29
"""Of each registry; the operating system gives what is written."""
THREADS = 2


@dataclass(frozen=True)
class Kind:
    """Copies of one folder."""

    rank: int
    targets: tuple[str, ...] = LLAMA_LINEARS


SMALL = Kind(BATCH_RANK, ("k_proj",))
Registered = tuple[tuple[Kind, int], ...]
"""Kinds of adapters, and how many of each."""
Member = tuple[int, int]
"""Which of the kinds, and which of its adapters."""
Batch = tuple[Member | None, ...]
"""A row's adapter; None is the base."""


@dataclass(frozen=True)
class Point:
    """One batch beside what is registered.

    Attributes:
        plot, series, x: where it belongs.
        batches: of as many rows and of the same adapters; the steps take them in turn.
    """

    plot: str
    series: str
    x: int
    registered: Registered
    batches: tuple[Batch, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What the results say of it; `rank_rows` is the sum of the ranks of the live rows."""
        ranks = [self.registered[member[0]][0].rank for member in self.batches[0] if member is not None]
        return {
            "plot": self.plot,
            "series": self.series,
            "x": self.x,
            "rows": len(self.batches[0]),
            "rank_rows": sum(ranks),
            "registered": sum(count for _, count in self.registered),
            "largest_rank": max(kind.rank for kind, count in self.registered if count),
            "orders": len(self.batches),
        }


def points() -> list[Point]:
    """All of both plots."""
    live = tuple((Kind(rank), max(LIVE_ROWS)) for rank in RANKS)
    found = [Point("live", "base", rows, live, ((None,) * rows,)) for rows in LIVE_ROWS]
    for kind, rank in enumerate(RANKS):
        series = f"an adapter of rank {rank} in each row"
        found += [Point("live", series, rows, live, (_members(kind, rows),)) for rows in LIVE_ROWS]

    batch = _members(0, BATCH)
    # effects of the latest PARTS batches are kept: one order more, and every step builds its own
    orders = tuple(batch[turn:] + batch[:turn] for turn in range(PARTS + 1))
    for count in REGISTERED:
        beside = ((Kind(BATCH_RANK), BATCH), (SMALL, count - BATCH))
        found.append(Point("registered", "the same step again and again", count, beside, (batch,)))
        found.append(Point("registered", "its rows in another order each step", count, beside, orders))
    for rank in LARGEST_RANKS:
        beside = ((Kind(BATCH_RANK), BATCH), (Kind(rank), OF_LARGEST_RANK))
        found.append(Point("largest rank", "in no row of the batch", rank, beside, (batch,)))
        found.append(Point("largest rank", "in one of its eight rows", rank, beside, ((*batch[:-1], (1, 0)),)))
    return found


def _members(kind: int, count: int) -> Batch:
    return tuple((kind, number) for number in range(count))


class Population:
    """A registry of its own over the one model, and a runner that serves from it."""

    def __init__(self, loaded: LoadedModel, registered: Registered, folders: Mapping[Kind, Path]) -> None:
        residency = new_residency(loaded, ARENA_BYTES)
        tiers = Tiers(residency, HostTier(0))  # no second copy of what is in the arena
        registry = Registry(loaded.base, residency, tiers=tiers)
        self._leases: dict[Member, Lease] = {}
        for number, (kind, count) in enumerate(registered):
            for index in range(count):
                name = f"{number}-{index}"
                registry.load(name, folders[kind])
                self._leases[number, index] = registry.acquire(name)
        assert len({lease.slot for lease in self._leases.values()}) == len(self._leases), "each is in the arena"
        self.arena_bytes = residency.used_bytes
        targets = list(loaded.base.targets.values())
        effects = EffectsBuilder(
            residency,
            targets,
            "cpu",
            embedding=loaded.embedding_path,
            head=loaded.head_path,
            engine=loaded.engine,
        )
        self.runner = ModelRunner(loaded, effects)

    def time(self, batches: Sequence[Batch], limit_s: float) -> list[float]:
        """Milliseconds of steps, the batches in turn."""
        plans = [decode_plan([None if one is None else self._leases[one] for one in batch]) for batch in batches]
        return time_steps(self.runner, plans, limit_s)


def measure(
    folder: Path, wanted: Sequence[Point], rounds: int, turn_s: float = TURN_S
) -> list[tuple[Point, int, Times]]:
    """Every point, the bytes that lie in the arena beside it, and its times; all take turns.

    Args:
        folder: of the model.
    """
    torch.set_num_threads(1)  # beside the native backend's
    blocks = max(LIVE_ROWS) * CONTEXT // BLOCK_SIZE
    loaded = Harness(load_dense(folder, torch.bfloat16), blocks=blocks, block_size=BLOCK_SIZE, threads=THREADS).loaded
    kinds = {kind for point in wanted for kind, _ in point.registered}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for number, kind in enumerate(kinds):
            into = Path(scratch) / str(number)
            (folders[kind],) = make_adapters(str(folder), into, 1, [kind.rank], kind.targets)
        of_all = {point.registered: None for point in wanted}
        populations = {registered: Population(loaded, registered, folders) for registered in of_all}
    fill_contexts(next(iter(populations.values())).runner, max(LIVE_ROWS))
    taken: dict[Point, list[float]] = {point: [] for point in wanted}
    for round_number in range(rounds + 1):
        # in another order each: no point stands where a disturbance that comes again and again always meets it
        for point in random.Random(round_number).sample(wanted, len(wanted)):
            latest = populations[point.registered].time(point.batches, turn_s)
            taken[point] += latest if round_number else []
    assert all(one.runner.rows.keys() <= {NATIVE} for one in populations.values())
    return [(point, populations[point.registered].arena_bytes, Times.of(taken[point])) for point in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="lines are added at its end")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--label", default="")
    options = parser.parse_args(arguments)
    head, meter = surroundings("torch", "transformers"), CpuMeter(os.getpid())
    measured = measure(ensure_default_model(), points(), options.rounds)
    run = {
        "label": options.label,
        **head,
        "cpu": asdict(meter.stop()),
        "arguments": {
            "model": DEFAULT_MODEL_NAME,
            "dtype": "bfloat16",
            "threads": THREADS,
            "context": CONTEXT,
            "rounds": options.rounds,
        },
    }
    lines = [
        {**run, "point": {**point.facts, "arena_bytes": arena_bytes}, "times": asdict(times)}
        for point, arena_bytes, times in measured
    ]
    for line in lines:
        print(*line["point"].values(), *line["times"].values())
    if options.out is not None:
        append(options.out, *lines)


if __name__ == "__main__":
    main()
