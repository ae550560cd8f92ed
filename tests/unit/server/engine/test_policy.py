"""Turns and patience, one readable example each; any arrivals are in tests/property/test_fairness.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from motet.server.engine.blocks import BlockPool
from motet.server.engine.holding import PATIENCE_S
from motet.server.engine.policy import MOST_COUNTERS, Fair, Fcfs, Policy
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.types import Generation
from tests.support.fake_memory import FakeMemory
from tests.support.fake_runner import version_of
from tests.unit.server.engine.steps import BLOCK, generation, step


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def scheduler(policy: Policy, blocks: int = 16, generations: int = 8, memory: FakeMemory | None = None) -> Scheduler:
    return Scheduler(BlockPool(blocks, BLOCK), StepLimits(64, generations), memory or FakeMemory(), policy, Clock())


def ids(spans: list[tuple[int, int, int]]) -> list[int]:
    return sorted(id for id, _, _ in spans)


# ---------------------------------------------------------------------------------------------------------------- turns


def test_a_flood_does_not_hold_up_another_adapter() -> None:
    order: dict[type, list[int]] = {}
    for policy in (Fcfs, Fair):
        s = scheduler(policy(), generations=1)
        for id in range(4):
            s.add(generation(id, [id, 1, 2], max_tokens=1, adapter="flood"))
        s.add(generation(9, [9, 1, 2], max_tokens=1, adapter="other"))
        order[policy] = [id for _ in range(5) for id in ids(step(s))]
    assert order == {Fcfs: [0, 1, 2, 3, 9], Fair: [0, 9, 1, 2, 3]}


def test_a_drawn_token_costs_twice_a_prompt_token_and_a_cached_one_nothing() -> None:
    fair = Fair()
    s = scheduler(fair)
    s.add(generation(0, [1] * 9, max_tokens=3, adapter="a"))
    step(s)
    assert fair.counters == {"a": 9 + 2}
    step(s)
    step(s)
    assert fair.counters == {"a": 9 + 3 * 2}
    s.add(generation(1, [1] * 9, max_tokens=1, adapter="a"))
    step(s)
    assert fair.counters == {"a": 9 + 3 * 2 + 1 + 2}


def test_a_prompt_computed_again_is_not_charged_again() -> None:
    fair = Fair()
    s = scheduler(fair, blocks=4)
    s.add(generation(0, [1, 1, 1, 1], max_tokens=12, adapter="a"))
    s.add(generation(1, [2, 2, 2, 2], max_tokens=12, adapter="b"))
    while s.running or s.waiting:
        step(s)
    assert s.preemptions > 0
    assert fair.counters == {"a": 4 + 2 * 12, "b": 4 + 2 * 12}


def test_twice_the_weight_is_twice_the_turns() -> None:
    s = scheduler(Fair({"a": 2.0, "b": 1.0}.__getitem__), generations=1)
    for id in range(20):
        s.add(generation(id, [id, 1], max_tokens=1, adapter="a" if id < 10 else "b"))
    served = [id for _ in range(9) for id in ids(step(s))]
    assert sum(id < 10 for id in served) == 6


def test_shares_take_no_step_more() -> None:
    steps = []
    for policy in (Fcfs(), Fair()):
        s = scheduler(policy, blocks=64, generations=4)
        for id in range(80):
            s.add(generation(id, [id] * 4, max_tokens=16, adapter="a" if id < 64 else "b"))
        steps.append(0)
        while s.running or s.waiting:
            step(s)
            steps[-1] += 1
    assert steps == [80 // 4 * 16] * 2


def test_nobody_saves_up_turns() -> None:
    """While it was away the others were served; it begins where they are, and those it left behind catch up."""
    fair = Fair()
    s = scheduler(fair, generations=1)
    for id in range(8):
        s.add(generation(id, [id, 1], max_tokens=1, adapter="a"))
    for _ in range(4):
        step(s)
    for id in range(10, 14):
        s.add(generation(id, [id, 1], max_tokens=1, adapter="b"))
    assert [id for _ in range(4) for id in ids(step(s))] == [4, 10, 5, 11]
    assert fair.counters["b"] == fair.counters["a"]


def test_an_empty_queue_saves_up_no_turns_either() -> None:
    fair = Fair()
    s = scheduler(fair, generations=1)
    s.add(generation(0, [1] * 8, max_tokens=4, adapter="a"))
    for _ in range(3):
        step(s)
    s.add(generation(1, [2], adapter="b"))
    assert fair.counters == {"a": 8 + 3 * 2, "b": 8 + 3 * 2}


def test_the_counters_of_many_adapters_take_bounded_memory() -> None:
    fair = Fair()
    s = scheduler(fair, generations=1)
    for id in range(3 * MOST_COUNTERS):
        s.add(generation(id, [id], max_tokens=1, adapter=f"a{id}"))
        step(s)
    assert len(fair.counters) <= MOST_COUNTERS


def test_the_one_with_the_most_service_gives_way() -> None:
    """Even where it arrived first, and even where it had its rows of the step already."""
    s = scheduler(Fair({"a": 1.0, "b": 8.0}.__getitem__), blocks=4)
    greedy, modest = generation(0, [1], max_tokens=12, adapter="a"), generation(1, [2] * 4, adapter="b")
    s.add(greedy)
    step(s)
    s.add(modest)
    for _ in range(5):
        assert ids(step(s)) == [0, 1]
    assert s.blocks.spare == 0
    assert step(s) == [(1, 8, 1)]
    assert (s.preemptions, greedy.drawn, greedy.blocks) == (1, 6, [])
    assert s.blocks.spare == s.blocks.size - len(modest.blocks)


# ------------------------------------------------------------------------------------------------------------- patience


def crowded(policy: Policy) -> tuple[Scheduler, FakeMemory, Callable[[int, str | None], Generation]]:
    """Generation 0 of "cold", which is not on the device, waits; its patience has just begun to end."""
    memory = FakeMemory()
    memory.absent.add(version_of("cold"))
    s = scheduler(policy, memory=memory)

    def add(id: int, adapter: str | None) -> Generation:
        s.add(generation(id, [id], adapter=adapter))
        return next(one for one in s._waiting if one.id == id)

    add(0, "cold")
    step(s)
    return s, memory, add


@pytest.mark.parametrize("policy", [Fcfs, Fair])
def test_no_adapter_is_held_before_that_of_one_that_lost_patience(policy: Callable[[], Policy]) -> None:
    s, memory, add = crowded(policy())
    add(1, "hot")
    assert ids(step(s)) == [1]
    s._clock.now_s += PATIENCE_S  # type: ignore[attr-defined]
    add(2, "hot")
    add(3, None)
    assert ids(step(s)) == [1, 3], "the base needs no room among adapters"
    assert memory.wanted == [version_of("cold"), version_of("hot")]
    memory.absent.clear()
    assert ids(step(s)) == [0, 1, 2, 3]


def test_what_holds_others_up_is_wanted_before_them() -> None:
    """Otherwise the memory keeps for them the room that it needs, and they wait for it: for ever."""
    s, memory, add = crowded(Fair())
    s._clock.now_s += PATIENCE_S  # type: ignore[attr-defined]
    add(2, "hot")
    s._policy.drew(add(1, "cold"))
    assert next(s._waiting.heads()).id == 2, "by their shares it would come first"
    assert step(s) == []
    assert memory.wanted == [version_of("cold"), version_of("hot")]


def test_each_version_is_wanted_once() -> None:
    s, memory, add = crowded(Fcfs())
    for id in range(1, 50):
        add(id, "cold" if id % 2 else f"a{id}")
    memory.absent.update(version_of(f"a{id}") for id in range(50))
    step(s)
    assert len(memory.wanted) == len(set(memory.wanted)) == 1 + 24


def test_patience_ends_with_the_generation() -> None:
    s, _, add = crowded(Fcfs())
    s._clock.now_s += PATIENCE_S  # type: ignore[attr-defined]
    add(1, "hot")
    assert step(s) == []
    s.remove(next(iter(s._waiting)).id)
    assert ids(step(s)) == [1]
