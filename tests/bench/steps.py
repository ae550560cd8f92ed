"""Steps of a runner and what they take: every request at one context, its adapter as given. Knows no files."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from motet.adapters.lease import Lease
from motet.server.engine.types import Applied, BlockId, GenerationId, Plan, Runner, Sampling, Span

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

    @classmethod
    def of(cls, taken_ms: Sequence[float]) -> Times:
        return cls(round(median(taken_ms), 3), round(min(taken_ms), 3), len(taken_ms))


def span(index: int, lease: Lease | None, tokens: int, start: int) -> Span:
    """The next tokens of one request, which has blocks of its own."""
    per_request = max(CONTEXT, tokens) // BLOCK_SIZE
    return Span(
        generation=GenerationId(index),
        applied=() if lease is None else (Applied(lease),),
        tokens=tuple(1000 + (7 * index + i) % 9000 for i in range(tokens)),
        start=start,
        blocks=tuple(BlockId(index * per_request + i) for i in range(per_request)),
        draw=True,
        sampling=GREEDY,
        drawn=0,
    )


def decode_plan(leases: Sequence[Lease | None]) -> Plan:
    """A step of one token of as many requests, all at CONTEXT; None is the base."""
    return Plan(tuple(span(index, lease, 1, CONTEXT - 1) for index, lease in enumerate(leases)))


def fill_contexts(runner: Runner, requests: int) -> None:
    """Compute what is behind the requests: over an empty context, bfloat16 alone changes the logits."""
    for index in range(requests):
        runner.run(Plan((span(index, None, CONTEXT - 1, 0),)))


def time_steps(runner: Runner, plans: Sequence[Plan], limit_s: float) -> list[float]:
    """Milliseconds of steps, the plans in turn, for about this time and at least once."""
    times_ms: list[float] = []
    turns = itertools.cycle(plans)
    until_s = time.perf_counter() + limit_s
    while not times_ms or time.perf_counter() < until_s:
        plan = next(turns)
        began_ns = time.perf_counter_ns()
        runner.run(plan)
        times_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return times_ms
