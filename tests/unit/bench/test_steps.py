from __future__ import annotations

from collections.abc import Sequence

from motet.server.engine.types import Plan, SpanResult
from tests.bench.steps import BLOCK_SIZE, CONTEXT, Times, decode_plan, fill_contexts, time_steps


class Kept:
    """A runner that keeps the plans."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def run(self, plan: Plan) -> Sequence[SpanResult]:
        self.plans.append(plan)
        return ()


def test_plans_take_turns_until_the_time_is_over_and_run_once_at_least() -> None:
    plans = [decode_plan([None] * rows) for rows in (1, 2, 3)]
    runner = Kept()
    assert len(time_steps(runner, plans, 0)) == 1
    times_ms = time_steps(runner, plans, 0.02)
    assert len(runner.plans) == 1 + len(times_ms) > 4
    assert all(plan is plans[index % 3] for index, plan in enumerate(runner.plans[1:]))


def test_a_step_follows_the_context_of_the_same_request() -> None:
    runner = Kept()
    fill_contexts(runner, 3)
    for (context,), step in zip((plan.spans for plan in runner.plans), decode_plan([None] * 3).spans, strict=True):
        assert (context.generation, context.blocks) == (step.generation, step.blocks)
        assert len(context.tokens) == step.start == CONTEXT - 1
        assert len(step.blocks) * BLOCK_SIZE == CONTEXT
    blocks = [block for plan in runner.plans for block in plan.spans[0].blocks]
    assert len(set(blocks)) == len(blocks), "no request writes over another's context"


def test_times_are_of_all_steps() -> None:
    assert Times.of([3.0, 1.0, 2.0004]) == Times(2.0, 1.0, 3)
