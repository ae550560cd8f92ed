"""What the scheduler promises, one readable example each; any traffic is in tests/property/test_scheduler.py."""

from __future__ import annotations

import pytest

from motet.server.engine.types import (
    MOST_WANTED,
    FinishReason,
    GenerationId,
    SpanResult,
)
from tests.support.fake_memory import FakeMemory
from tests.support.fake_runner import logprobs_at, version_of
from tests.unit.server.engine.steps import commit, generation, scheduler, spans, step


def test_first_come_first_served() -> None:
    s = scheduler(generations=2)
    for id in range(3):
        s.add(generation(id, [id, 1, 2], max_tokens=2))
    assert step(s) == [(0, 0, 3), (1, 0, 3)]
    assert (s.running, s.waiting) == (2, 1)
    assert step(s) == [(0, 3, 1), (1, 3, 1)]
    assert step(s) == [(2, 0, 3)]


def test_a_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    s = scheduler(rows=5)
    s.add(generation(0, [1, 2]))
    s.add(generation(1, list(range(10))))
    plan = s.plan()
    assert spans(plan) == [(0, 0, 2), (1, 0, 3)]
    assert [span.draw for span in plan.spans] == [True, False]
    commit(s, plan)
    assert step(s) == [(0, 2, 1), (1, 3, 4)]
    plan = s.plan()
    assert spans(plan) == [(0, 3, 1), (1, 7, 3)]
    assert [span.draw for span in plan.spans] == [True, True]


def test_a_later_prompt_waits_until_the_budget_of_rows_has_room() -> None:
    s = scheduler(rows=4)
    s.add(generation(0, list(range(8))))
    s.add(generation(1, [1]))
    assert step(s) == [(0, 0, 4)]
    assert step(s) == [(0, 4, 4)]
    assert step(s) == [(0, 8, 1), (1, 0, 1)]


def test_the_latest_is_preempted_when_blocks_run_out() -> None:
    s = scheduler(blocks=4)
    first, second = generation(0, [1, 1, 1, 1], max_tokens=12), generation(1, [2, 2, 2, 2], max_tokens=12)
    s.add(first)
    s.add(second)
    for _ in range(5):
        assert len(step(s)) == 2
    assert (s.preemptions, s.blocks.spare) == (0, 0)
    assert step(s) == [(0, 8, 1)]
    assert (s.preemptions, s.running, s.waiting) == (1, 1, 1)
    assert not second.blocks
    while first.drawn < 12:
        assert [id for id, _, _ in step(s)] == [0]
    assert second.drawn == 5, "what was drawn is kept"
    assert step(s) == [(1, 0, 9)], "its blocks were needed meanwhile"
    assert second.drawn == 6


def test_a_preempted_generation_comes_back_from_the_prefix_cache() -> None:
    """And that is no cached prompt: the caller is told of the first admission."""
    s = scheduler(blocks=4)
    s.add(generation(0, [1, 1, 1, 1], max_tokens=6))
    s.add(generation(1, [2, 2, 2, 2], max_tokens=12))
    for _ in range(6):
        step(s)
    assert (s.preemptions, s.running, s.waiting) == (1, 0, 1)
    plan = s.plan()
    assert spans(plan) == [(1, 4, 5)]
    events, _ = commit(s, plan)
    assert [event.cached_tokens for event in events] == [0]


def test_admission_leaves_a_block_for_every_running_generation() -> None:
    """Otherwise it would be preempted in the next step."""
    s = scheduler(blocks=3)
    s.add(generation(0, [1, 1, 1, 1]))
    s.add(generation(1, [2] * 8, max_tokens=4))
    assert step(s) == [(0, 0, 4)]
    assert (s.running, s.waiting) == (1, 1)


def test_a_shared_prefix_is_computed_once() -> None:
    s, prompt = scheduler(), list(range(10))
    s.add(generation(0, prompt))
    step(s)
    held = s.blocks.size - s.blocks.spare
    s.add(generation(1, [*prompt[:8], 77, 78]))
    plan = s.plan()
    assert spans(plan) == [(0, 10, 1), (1, 8, 2)]
    assert plan.spans[0].blocks[:2] == plan.spans[1].blocks[:2]
    assert s.blocks.size - s.blocks.spare == held + 1
    events, _ = commit(s, plan)
    assert [event.cached_tokens for event in events] == [0, 8]


def test_the_last_token_of_a_known_prompt_is_computed_again() -> None:
    """Its logits are needed, and they are not in the cache."""
    s, prompt = scheduler(), list(range(8))
    s.add(generation(0, prompt, max_tokens=1))
    step(s)
    s.add(generation(1, prompt))
    assert step(s) == [(1, 4, 4)]


def test_the_same_version_shares_after_the_first_has_ended() -> None:
    s, prompt = scheduler(), list(range(10))
    s.add(generation(0, prompt, max_tokens=1, adapter="fr"))
    step(s)
    assert s.blocks.spare == s.blocks.size
    s.add(generation(1, prompt, adapter="fr"))
    assert step(s) == [(1, 8, 2)]


def test_spans_of_one_version_are_neighbours() -> None:
    s = scheduler()
    for id, adapter in enumerate(["b", "a", None, "b", "a"]):
        s.add(generation(id, [id], adapter=adapter))
    assert [id for id, _, _ in step(s)] == [2, 1, 4, 0, 3]


def test_prompt_logprobs_are_asked_for_once_per_position() -> None:
    s = scheduler(rows=3)
    s.add(generation(0, [5, 6, 7, 8], prompt_logprobs=0))
    plan = s.plan()
    assert plan.spans[0].prompt_targets == (6, 7, 8)
    events, _ = commit(s, plan)
    assert events[0].token is None
    assert events[0].prompt_logprobs == (logprobs_at(6, 1), logprobs_at(7, 2), logprobs_at(8, 3))
    plan = s.plan()
    assert plan.spans[0].prompt_targets == ()
    events, _ = commit(s, plan)
    assert (events[0].token, events[0].prompt_logprobs) == (9, ())
    assert s.plan().spans[0].prompt_targets == ()


def test_prompt_logprobs_need_every_position_computed() -> None:
    s, prompt = scheduler(), list(range(10))
    s.add(generation(0, prompt, max_tokens=1))
    step(s)
    s.add(generation(1, prompt, prompt_logprobs=0))
    assert step(s) == [(1, 0, 10)]


def test_history_is_given_only_where_it_matters() -> None:
    s = scheduler()
    s.add(generation(0, [1, 2]))
    s.add(generation(1, [3, 4], presence_penalty=0.5))
    step(s)
    assert [span.history for span in s.plan().spans] == [(), (3, 4, 9)]


ENDS = {
    "length": ({"max_tokens": 2}, [1, 1], FinishReason.LENGTH),
    "stop": ({"stop_token_ids": frozenset({7})}, [1, 7], FinishReason.STOP),
    "stop at the last": ({"max_tokens": 2, "stop_token_ids": frozenset({7})}, [1, 7], FinishReason.STOP),
    "stop before min_tokens": (
        {"max_tokens": 4, "min_tokens": 3, "stop_token_ids": frozenset({7})},
        [7, 7, 7],
        FinishReason.STOP,
    ),
    "no stop within min_tokens": (
        {"max_tokens": 3, "min_tokens": 3, "stop_token_ids": frozenset({7})},
        [7, 7, 1],
        FinishReason.LENGTH,
    ),
}


@pytest.mark.parametrize(("options", "tokens", "reason"), ENDS.values(), ids=ENDS.keys())
def test_ends(options: dict[str, object], tokens: list[int], reason: FinishReason) -> None:
    s = scheduler()
    s.add(generation(0, [1, 2, 3], **options))  # type: ignore[arg-type]
    for i, token in enumerate(tokens):
        events, ended = commit(s, s.plan(), token)
        last = i == len(tokens) - 1
        assert [(event.token, event.finish) for event in events] == [(token, reason if last else None)]
        assert len(ended) == last
    assert not s.plan().spans
    assert s.blocks.spare == s.blocks.size


def test_result_of_a_generation_that_was_cancelled_meanwhile_is_dropped() -> None:
    s = scheduler()
    s.add(generation(0, [1]))
    s.add(generation(1, [2]))
    plan = s.plan()
    assert s.remove(GenerationId(0)) is not None
    events, ended = commit(s, plan)
    assert ([event.generation for event in events], ended) == ([1], [])


def test_failed_span_ends_its_generation_alone_and_shares_nothing() -> None:
    s, prompt = scheduler(), list(range(10))
    s.add(generation(0, prompt, adapter="fr"))
    s.add(generation(1, [1], adapter="fr"))
    plan = s.plan()
    events, ended = s.commit(plan, [SpanResult(None, error="not finite"), SpanResult(9)])
    assert [(event.generation, event.token, event.finish, event.error) for event in events] == [
        (0, None, FinishReason.ERROR, "not finite"),
        (1, 9, None, None),
    ]
    assert [generation.id for generation in ended] == [0]
    s.add(generation(2, prompt, adapter="fr"))
    assert step(s) == [(1, 1, 1), (2, 0, 10)]


def test_drain_gives_everything_back() -> None:
    s = scheduler(generations=1)
    for id in range(2):
        s.add(generation(id, [1, 2, 3], adapter="fr"))
    step(s)
    assert (s.running, s.waiting, s.waiting_adapters) == (1, 1, {"fr"})
    assert [dropped.id for dropped in s.drain()] == [0, 1]
    assert (s.running, s.waiting, s.waiting_adapters) == (0, 0, frozenset())
    assert s.blocks.spare == s.blocks.size


def test_a_generation_that_never_fits_is_a_bug_of_the_caller() -> None:
    s = scheduler(blocks=2)
    s.add(generation(0, [1], max_tokens=7))
    with pytest.raises(AssertionError):
        s.add(generation(1, [1], max_tokens=8))


# ------------------------------------------------------------------------------------------- adapters not on the device


def test_one_whose_adapter_is_not_there_is_passed_over() -> None:
    memory = FakeMemory()
    memory.absent.add(version_of("cold"))
    waiting = scheduler(memory=memory)
    for id, adapter in enumerate(["cold", "warm", None]):
        waiting.add(generation(id, [1, 2], adapter=adapter))
    assert step(waiting) == [(2, 0, 2), (1, 0, 2)]
    assert memory.wanted == [version_of("cold")]
    memory.absent.clear()
    assert step(waiting)[-1] == (1, 2, 1)
    assert (waiting.waiting, memory.wanted) == (0, [])
    assert sorted(lease.version.name for lease in memory.held) == ["cold", "warm"]


def test_the_queue_is_wanted_in_its_order_and_no_more_than_so_many() -> None:
    memory = FakeMemory()
    waiting = scheduler(generations=1, memory=memory)
    waiting.add(generation(0, [1]))
    for id in range(1, MOST_WANTED + 5):
        waiting.add(generation(id, [1], adapter=f"a{id}"))
    step(waiting)
    assert memory.wanted == [version_of(f"a{id}") for id in range(1, MOST_WANTED + 1)]


def test_generations_of_the_base_never_touch_the_memory() -> None:
    memory = FakeMemory()
    base = scheduler(generations=1, memory=memory)
    base.add(generation(0, [1], max_tokens=1))
    base.add(generation(1, [1], max_tokens=1))
    step(base)
    step(base)
    assert (base.running, base.waiting, memory.wants) == (0, 0, 0)


def test_one_whose_adapter_cannot_be_brought_is_dropped_with_the_reason() -> None:
    memory = FakeMemory()
    memory.absent.add(version_of("gone"))
    memory.failures[version_of("gone")] = "its source changed"
    waiting = scheduler(memory=memory)
    waiting.add(generation(0, [1], adapter="gone"))
    waiting.add(generation(1, [1], adapter="there"))
    assert step(waiting) == [(1, 0, 1)]
    assert [(one.id, why) for one, why in waiting.take_failed()] == [(0, "its source changed")]
    assert (waiting.take_failed(), waiting.waiting) == ([], 0)


def test_what_cannot_run_for_lack_of_blocks_holds_nothing() -> None:
    memory = FakeMemory()
    full = scheduler(blocks=4, memory=memory)
    full.add(generation(0, [1] * 12, max_tokens=4, adapter="a"))
    full.add(generation(1, [1] * 8, adapter="b"))
    step(full)
    assert [lease.version.name for lease in memory.held] == ["a"]
    full.drain()
    assert not memory.held
