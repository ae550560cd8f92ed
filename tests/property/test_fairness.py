"""Shares under any arrivals: who always waits for more gets as much as the others; whatever waits has its turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from motet.server.engine.blocks import BlockPool
from motet.server.engine.holding import PATIENCE_S
from motet.server.engine.policy import Fair, Fcfs, Policy
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.types import Generation, GenerationId, Sampling
from tests.support.fake_memory import FakeMemory, SmallMemory
from tests.support.fake_runner import applied, version_of
from tests.unit.server.engine.steps import commit

BLOCK = 4
MOST_PROMPT = 12
MOST_TOKENS = 9
SECONDS_A_STEP = PATIENCE_S / 10
lengths = st.tuples(st.integers(1, MOST_PROMPT), st.integers(1, MOST_TOKENS))


@dataclass
class Lab:
    """A scheduler, and the service of every party as seen from outside."""

    policy: Policy
    generations: int = 3
    memory: FakeMemory = field(default_factory=FakeMemory)

    def __post_init__(self) -> None:
        blocks = self.generations * (MOST_PROMPT + MOST_TOKENS) // BLOCK
        self.now_s = 0.0
        limits = StepLimits(8, self.generations)
        self.scheduler = Scheduler(BlockPool(blocks, BLOCK), limits, self.memory, self.policy, lambda: self.now_s)
        self.open: dict[GenerationId, Generation] = {}
        self.service: dict[str, float] = {}
        self._read: set[GenerationId] = set()
        self._ids = map(GenerationId, itertools.count())

    def add(self, party: str, prompt: int, max_tokens: int) -> GenerationId:
        id = next(self._ids)
        tokens = [id] * prompt  # nobody shares a prefix
        use = ((version_of(party), None),) if party else ()
        self.open[id] = Generation(id, tokens, prompt, Sampling(max_tokens=max_tokens), applied(use))
        self.scheduler.add(self.open[id])
        return id

    def waiting(self, party: str) -> int:
        return sum(one.party == party and not one.blocks for one in self.open.values())

    def step(self) -> None:
        plan = self.scheduler.plan()
        for span in plan.spans:
            if span.generation not in self._read:
                self._serve(span.generation, self.open[span.generation].prompt_length)
        self._read |= {span.generation for span in plan.spans}
        events, _ = commit(self.scheduler, plan)
        for event in events:
            self._serve(event.generation, 2)
            if event.finish is not None:
                del self.open[event.generation]
        self.now_s += SECONDS_A_STEP
        if isinstance(self.memory, SmallMemory):
            self.memory.tick()

    def _serve(self, id: GenerationId, cost: float) -> None:
        party = self.open[id].party
        self.service[party] = self.service.get(party, 0.0) + cost


def bound(generations: int, weight: float) -> float:
    """By which counters of parties that wait may differ.

    When a party's generation is admitted, its counter is the smallest. Until its next admission it is charged that
    prompt, and what the generations that run may still draw.
    """
    return (MOST_PROMPT + 2 * generations * MOST_TOKENS) / weight


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", ""]), lengths), max_size=60),
    flood=lengths,
    trickle=lengths,
    late=st.integers(0, 40),
    weight=st.sampled_from([1.0, 2.0, 0.5]),
    generations=st.integers(1, 4),
)
def test_two_that_always_wait_are_served_alike(
    arrivals: list[tuple[str, tuple[int, int]]],
    flood: tuple[int, int],
    trickle: tuple[int, int],
    late: int,
    weight: float,
    generations: int,
) -> None:
    """One from the start, the other from some later step on; others come as they like."""
    weights: Mapping[str, float] = {"a": 1.0, "b": weight}
    lab = Lab(Fair(lambda party: weights.get(party, 1.0)), generations)
    others = iter(arrivals)
    begun: dict[str, float] = {}
    for at in range(160):
        for party, length in {"a": flood, **({"b": trickle} if at >= late else {})}.items():
            while lab.waiting(party) < 2:
                lab.add(party, *length)
        if at == late:
            begun = {"a": lab.service.get("a", 0.0), "b": lab.service.get("b", 0.0)}
        if (other := next(others, None)) is not None:
            lab.add(other[0], *other[1])
        lab.step()
        if begun:
            a, b = ((lab.service.get(party, 0.0) - begun[party]) / weights[party] for party in "ab")
            assert abs(a - b) <= 2 * bound(generations, min(1.0, weight))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(hot=st.lists(lengths, min_size=1, max_size=4), cold=lengths, late=st.integers(0, 30), capacity=st.integers(1, 3))
@pytest.mark.parametrize("policy", [Fcfs, Fair])
def test_what_needs_the_room_of_others_has_its_turn(
    policy: Callable[[], Policy], hot: list[tuple[int, int]], cold: tuple[int, int], late: int, capacity: int
) -> None:
    """As many hot adapters as there is room for, each of which always waits; and one request for another."""
    lab = Lab(policy(), memory=SmallMemory(capacity))
    wait = round(PATIENCE_S / SECONDS_A_STEP)
    id = None
    for at in range(late + 1 + 5 * wait + 30 * MOST_TOKENS):
        for number in range(capacity):
            while lab.waiting(f"hot-{number}") < 2:
                lab.add(f"hot-{number}", *hot[number % len(hot)])
        if at == late:
            id = lab.add("cold", *cold)
        lab.step()
        if id is not None and id not in lab.open:
            return
    raise AssertionError("it starves")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(arrivals=st.lists(st.tuples(st.integers(0, 9), lengths), min_size=1, max_size=60), capacity=st.integers(1, 3))
@pytest.mark.parametrize("policy", [Fcfs, Fair])
def test_more_adapters_than_there_is_room_for(
    policy: Callable[[], Policy], arrivals: list[tuple[int, tuple[int, int]]], capacity: int
) -> None:
    """Everything ends, one adapter after the other, and nothing stays held."""
    lab = Lab(policy(), memory=SmallMemory(capacity))
    for number, length in arrivals:
        lab.add(f"a{number}", *length)
    for _ in range(sum(sum(length) + 2 + 2 * round(PATIENCE_S / SECONDS_A_STEP) for _, length in arrivals)):
        if lab.open:
            lab.step()
    assert not lab.open, "some starve"
    assert not lab.memory.held
    assert lab.scheduler.blocks.spare == lab.scheduler.blocks.size


def test_those_that_wait_for_the_base_share_like_any_adapter() -> None:
    lab = Lab(Fair(), generations=1)
    for _ in range(6):
        lab.add("", 4, 4)
    for _ in range(6):
        lab.add("a", 4, 4)
    for _ in range(4 * 4):
        lab.step()
    assert lab.service == {"": 2 * (4 + 8), "a": 2 * (4 + 8)}
