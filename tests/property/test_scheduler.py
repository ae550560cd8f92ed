"""Any traffic on any tiny cache: every generation gets what it would get alone, and everything is given back."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from motet.server.engine.blocks import BlockPool
from motet.server.engine.policy import Fair, Fcfs
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.types import FinishReason, Generation, GenerationId, Plan, Sampling, SpanResult, TokenEvent
from tests.support.fake_memory import FakeMemory
from tests.support.fake_runner import (
    VOCABULARY,
    FakeRunner,
    Use,
    applied,
    generate_alone,
    logprobs_at,
    use_of,
    version_of,
)

USES: tuple[Use, ...] = (
    (),
    ((version_of("a"), None),),
    ((version_of("a", "1"), None),),
    ((version_of("b"), None),),
    ((version_of("b"), (0.25, 0.75)),),
    ((version_of("b"), (0.75, 0.25)),),
    ((version_of("a"), (0.5,)), (version_of("b"), (0.5,))),
)
COMMON_PREFIX = [0, 1, 2, 0, 1, 1, 0, 2, 2, 0, 0, 1]
token = st.integers(0, VOCABULARY - 1)
prompts = st.builds(
    lambda shared, own: (COMMON_PREFIX[:shared] + own) or [0],
    st.sampled_from([0, 12, 5, 8, 3, 10]),
    st.lists(token, max_size=6),
)
samplings = st.builds(
    Sampling,
    max_tokens=st.sampled_from([16, 1, 4, 9]),
    min_tokens=st.sampled_from([0, 0, 2, 12]),
    stop_token_ids=st.just(frozenset()) | st.frozensets(token, max_size=1),
    prompt_logprobs=st.sampled_from([None, 0, 2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
)


@dataclass
class Expected:
    """What a generation must get, and what it got so far."""

    generation: Generation
    drawn: list[int]
    reason: FinishReason
    events: list[TokenEvent] = field(default_factory=list)
    endings: int = 0

    @property
    def prompt(self) -> list[int]:
        return self.generation.tokens[: self.generation.prompt_length]


class Traffic(RuleBasedStateMachine):
    @initialize(
        blocks=st.sampled_from([7, 9, 24, 8, 6, 4]),
        block_size=st.integers(2, 3),
        rows=st.sampled_from([2, 3, 4, 9, 1]),
        generations=st.sampled_from([4, 3, 2, 1]),
        fair=st.booleans(),
    )
    def start(self, blocks: int, block_size: int, rows: int, generations: int, fair: bool) -> None:
        self.pool = BlockPool(blocks, block_size)
        self.limits = StepLimits(rows, generations)
        self.memory = FakeMemory()
        self.fair = fair
        self.scheduler = Scheduler(self.pool, self.limits, self.memory, Fair() if fair else Fcfs())
        self.cache: dict[GenerationId, list[int]] = {}
        self.runner = FakeRunner(block_size, self.cache)
        self.open: dict[GenerationId, Expected] = {}
        self.arrived: list[tuple[Use, list[int]]] = []
        self.ids = map(GenerationId, itertools.count())

    @rule(arrivals=st.lists(st.tuples(st.sampled_from(USES), prompts, samplings), min_size=1, max_size=3))
    def arrive(self, arrivals: list[tuple[Use, list[int], Sampling]]) -> None:
        for use, prompt, sampling in arrivals:
            self._arrive(use, prompt, sampling)

    @precondition(lambda self: self.arrived)
    @rule(pick=st.integers(0, 2), sampling=samplings)
    def arrive_again(self, pick: int, sampling: Sampling) -> None:
        """One of the latest prompts, whatever became of it."""
        use, prompt = self.arrived[-1 - pick % len(self.arrived)]
        self._arrive(use, prompt, sampling)

    @precondition(lambda self: not self.open)
    @rule(
        uses=st.tuples(st.sampled_from(USES), st.sampled_from(USES)),
        reports=st.sampled_from([0, None]),
        steps=st.integers(4, 16),
    )
    def a_long_answer_meets_a_long_prompt(self, uses: tuple[Use, Use], reports: int | None, steps: int) -> None:
        """The second just fits beside the first, so it is preempted while its prompt is computed and reported."""
        length = (self.pool.size - 2) * self.pool.block_size
        self._arrive(uses[0], [0], Sampling(max_tokens=24))
        self._arrive(uses[1], (COMMON_PREFIX * 6)[:length], Sampling(max_tokens=2, prompt_logprobs=reports))
        self.run_steps(steps)

    @precondition(lambda self: not self.open)
    @rule(uses=st.permutations(USES))
    def uses_arrive_in_turn(self, uses: list[Use]) -> None:
        """One step holds spans of a use that did not arrive as neighbours."""
        for use in (uses[0], uses[1], uses[0], uses[1]):
            self._arrive(use, [0], Sampling(max_tokens=4))
        self.run_steps(3)

    @rule(use=st.sampled_from(USES), prompt=prompts, steps=st.integers(1, 4))
    def an_unfinished_prompt_comes_again(self, use: Use, prompt: list[int], steps: int) -> None:
        """Of the first only some blocks were computed, the last of them in part."""
        self._arrive(use, prompt + COMMON_PREFIX, Sampling(max_tokens=2))
        first = next(reversed(self.open))
        self.run_steps(steps)
        if first in self.open:
            self._cancel(first)
        self._arrive(use, prompt + COMMON_PREFIX, Sampling(max_tokens=2))

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 99))
    def cancel(self, pick: int) -> None:
        self._cancel(list(self.open)[pick % len(self.open)])

    @rule(steps=st.sampled_from([1, 2, 4, 8]))
    def run_steps(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 99))
    def cancel_while_a_step_runs(self, pick: int) -> None:
        self._step(cancelled=list(self.open)[pick % len(self.open)])

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 99))
    def a_span_fails(self, pick: int) -> None:
        self._step(failing=pick)

    @invariant()
    def blocks_are_held_by_unfinished_generations_only(self) -> None:
        if not hasattr(self, "pool"):
            return
        generations = [expected.generation for expected in self.open.values()]
        held = {block for generation in generations for block in generation.blocks}
        assert self.pool.spare == self.pool.size - len(held)
        for generation in generations:
            assert len(generation.blocks) == len(set(generation.blocks))
            assert generation.computed <= len(generation.blocks) * self.pool.block_size
        assert self.scheduler.running + self.scheduler.waiting == len(self.open)
        assert self.scheduler.running <= self.limits.generations
        running = [generation for generation in generations if generation.blocks]
        assert self.memory.held == Counter(one.lease for generation in running for one in generation.applied)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        # First come, first served: the oldest is in every step and is never preempted, so this many steps are enough.
        # Fair: a preemption needs a block that a new token took, so a prompt is computed again once a token at most.
        longest = max((len(self.cache[id]) for id in self.open), default=0) if self.fair else 1
        for _ in range(sum(len(self.cache[id]) for id in self.open) * longest):
            if self.open:
                self._step()
        assert not self.open, "generations starve"
        assert self.pool.spare == self.pool.size
        assert self.scheduler.waiting_adapters == frozenset()
        assert not self.scheduler.plan().spans

    def _arrive(self, use: Use, prompt: list[int], sampling: Sampling) -> None:
        room = self.pool.size * self.pool.block_size
        prompt = prompt[: room - 1]
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room - len(prompt)))
        generation = Generation(next(self.ids), list(prompt), len(prompt), sampling, applied(use))
        drawn, reason = generate_alone(use, prompt, sampling)
        self.open[generation.id] = Expected(generation, drawn, reason)
        self.cache[generation.id] = prompt + drawn
        self.arrived.append((use, prompt))
        self.scheduler.add(generation)

    def _step(self, cancelled: GenerationId | None = None, failing: int | None = None) -> None:
        before = {id: expected.generation.computed for id, expected in self.open.items()}
        plan = self.scheduler.plan()
        self._check(plan, before)
        results = list(self.runner.run(plan))
        if failing is not None:
            index = failing % len(plan.spans)
            results[index] = SpanResult(None, error="not finite")
            self.open[plan.spans[index].generation].reason = FinishReason.ERROR
        if cancelled is not None:
            self._cancel(cancelled)
        events, ended = self.scheduler.commit(plan, results)
        for event in events:
            self._take(event)
        finished = {event.generation for event in events if event.finish is not None}
        assert {generation.id for generation in ended} == finished
        assert len(ended) == len(finished)

    def _check(self, plan: Plan, before: dict[GenerationId, int]) -> None:
        assert plan.rows <= self.limits.rows
        assert len(plan.spans) == len({span.generation for span in plan.spans})
        neighbours = [found for found, _ in itertools.groupby(use_of(span) for span in plan.spans)]
        assert len(neighbours) == len(set(neighbours)), "spans of one use are not neighbours"
        for span in plan.spans:
            assert span.tokens
            assert len(span.blocks) == self.pool.blocks_for(span.start + len(span.tokens))
            assert span.applied == self.open[span.generation].generation.applied
        assert plan.spans or not self.open, "nobody advances"
        if self.open and not self.fair:
            oldest = next(iter(self.open))
            assert oldest in {span.generation for span in plan.spans}, "the oldest generation does not advance"
            assert self.open[oldest].generation.computed >= before[oldest], "the oldest generation was preempted"

    def _take(self, event: TokenEvent) -> None:
        expected = self.open[event.generation]
        assert expected.endings == 0, "an event after the end"
        if expected.reason is FinishReason.ERROR:
            assert (event.token, event.finish, event.error) == (None, FinishReason.ERROR, "not finite")
            del self.open[event.generation]
            return
        expected.events.append(event)
        drawn = [event.token for event in expected.events if event.token is not None]
        assert drawn == expected.drawn[: len(drawn)]
        assert (event.finish is not None) == (len(drawn) == len(expected.drawn))
        assert event.cached_tokens < len(expected.prompt)
        assert {other.cached_tokens for other in expected.events} == {event.cached_tokens}
        reported = [entry for event in expected.events for entry in event.prompt_logprobs]
        due = [logprobs_at(token, position) for position, token in enumerate(expected.prompt) if position > 0]
        if expected.generation.sampling.prompt_logprobs is None:
            assert not reported
        else:
            assert reported == due[: len(reported)]
            assert event.token is None or reported == due, "a token came before the prompt's log-probabilities"
            assert event.cached_tokens == 0
        if event.finish is not None:
            assert event.finish is expected.reason
            expected.endings += 1
            del self.open[event.generation]

    def _cancel(self, id: GenerationId) -> None:
        expected = self.open.pop(id)
        assert self.scheduler.remove(id) is expected.generation
        assert not expected.generation.blocks
        assert self.scheduler.remove(id) is None, "a generation ended twice"


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
