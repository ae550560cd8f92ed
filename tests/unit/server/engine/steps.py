"""A scheduler without an engine: generations by number, and steps that always draw the same token."""

from __future__ import annotations

from collections.abc import Sequence

from motet.server.engine.blocks import BlockPool
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.types import Generation, GenerationId, Plan, Sampling, SpanResult, TokenEvent
from tests.support.fake_memory import FakeMemory
from tests.support.fake_runner import applied, logprobs_at, version_of

BLOCK = 4


def scheduler(blocks: int = 16, rows: int = 64, generations: int = 8, memory: FakeMemory | None = None) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK), StepLimits(rows, generations), memory or FakeMemory())


def generation(
    id: int,
    prompt: Sequence[int],
    max_tokens: int = 8,
    adapter: str | None = None,
    digest: str = "0",
    gate: tuple[float, ...] | None = None,
    **sampling: object,
) -> Generation:
    use = ((version_of(adapter, digest), gate),) if adapter else ()
    options = Sampling(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Generation(GenerationId(id), list(prompt), len(prompt), options, applied(use))


def spans(plan: Plan) -> list[tuple[int, int, int]]:
    """(generation, first position, rows) of each span."""
    return [(span.generation, span.start, len(span.tokens)) for span in plan.spans]


def commit(scheduler: Scheduler, plan: Plan, token: int = 9) -> tuple[list[TokenEvent], list[Generation]]:
    """Every span that draws draws `token`, and prompt log-probabilities tell their position."""
    results = [
        SpanResult(
            token if span.draw else None,
            prompt_logprobs=tuple(logprobs_at(t, span.start + 1 + i) for i, t in enumerate(span.prompt_targets)),
        )
        for span in plan.spans
    ]
    return scheduler.commit(plan, results)


def step(scheduler: Scheduler, token: int = 9) -> list[tuple[int, int, int]]:
    plan = scheduler.plan()
    commit(scheduler, plan, token)
    return spans(plan)
