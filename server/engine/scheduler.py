"""Decides which rows of which generations a step computes, and what its result means for them.

Must not know: torch, text, HTTP, how adapters work. It owns the generations and the cache blocks; it touches no tensor.
First come, first served: running generations in order of arrival, then waiting ones. A step has a budget of rows;
a generation that decodes takes one, a prompt takes a chunk of what is left. When blocks run out, the generation that
arrived last is preempted: its blocks are released and it waits to be computed again (mostly from the prefix cache).
One whose adapters are not on the device is passed over until they are.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from motet.server.engine.blocks import BlockPool
from motet.server.engine.types import (
    MOST_WANTED,
    FinishReason,
    Generation,
    GenerationId,
    Lease,
    Memory,
    Plan,
    Span,
    SpanResult,
    TokenEvent,
)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds on one step.

    Attributes:
        rows: most rows of all generations together.
        generations: most generations that run at once.
    """

    rows: int
    generations: int


class Scheduler:
    """The generations and their order.

    Note: used by the engine thread only.
    """

    def __init__(self, blocks: BlockPool, limits: StepLimits, memory: Memory) -> None:
        self._memory = memory
        self._wanted = False
        self._failed: list[tuple[Generation, str]] = []
        self.blocks = blocks
        self.limits = limits
        self.preemptions = 0
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting_adapters(self) -> frozenset[str]:
        """Names of the adapters that waiting generations want."""
        return frozenset(one.lease.version.name for generation in self._waiting for one in generation.applied)

    def add(self, generation: Generation) -> None:
        """Queue a new generation, which must fit into the cache when it runs alone."""
        assert self.blocks.blocks_for(generation.prompt_length + generation.sampling.max_tokens) <= self.blocks.size
        self._waiting.append(generation)

    def remove(self, generation_id: GenerationId) -> Generation | None:
        """Drop a generation wherever it is and release its blocks; None when it is unknown or has ended."""
        for generation in self._running:
            if generation.id == generation_id:
                self._stop(generation)
                return generation
        for generation in self._waiting:
            if generation.id == generation_id:
                self._waiting.remove(generation)
                return generation
        return None

    def drain(self) -> list[Generation]:
        """Drop every generation and release its blocks."""
        dropped = [*self._running, *self._waiting]
        for generation in list(self._running):
            self._stop(generation)
        self._waiting.clear()
        self._want()
        return dropped

    def plan(self) -> Plan:
        """Choose the rows of the next step; empty when there is nothing to compute."""
        budget = self.limits.rows
        chosen: list[tuple[Generation, int]] = []
        preemptions = self.preemptions
        for generation in list(self._running):
            if budget == 0 or generation not in self._running:
                continue
            count = min(budget, len(generation.tokens) - generation.computed)
            if self._reserve(generation, count):
                chosen.append((generation, count))
                budget -= count
        for generation in list(self._waiting) if preemptions == self.preemptions else ():
            if budget == 0 or len(self._running) >= self.limits.generations:
                break
            if not self._hold(generation):
                continue
            if not self._admit(generation):
                self._let_go(generation)
                break
            self._waiting.remove(generation)
            self._running.append(generation)
            count = min(budget, len(generation.tokens) - generation.computed)
            chosen.append((generation, count))
            budget -= count
        self._want()
        chosen.sort(key=_adapter_order)
        return Plan(tuple(self._span(generation, count) for generation, count in chosen))

    def take_failed(self) -> list[tuple[Generation, str]]:
        """The generations that `plan` dropped since the last call, and why; their leases are the caller's to end."""
        failed, self._failed = self._failed, []
        return failed

    def commit(self, plan: Plan, results: Sequence[SpanResult]) -> tuple[list[TokenEvent], list[Generation]]:
        """Take in a step's results.

        Returns:
            The events to publish, and the generations that ended (their leases are the caller's to end).
        """
        running = {generation.id: generation for generation in self._running}
        events: list[TokenEvent] = []
        ended: list[Generation] = []
        for span, result in zip(plan.spans, results, strict=True):
            generation = running.get(span.generation)
            if generation is None:
                continue  # cancelled while the step ran
            if result.error is not None:
                events.append(TokenEvent(generation.id, finish=FinishReason.ERROR, error=result.error))
                self._end(generation, ended)
                continue
            self._advance(generation, len(span.tokens))
            prompt_logprobs = result.prompt_logprobs[max(0, generation.prompt_reported - span.start) :]
            generation.prompt_reported += len(prompt_logprobs)
            if result.token is None and result.feature is None and not prompt_logprobs:
                continue
            finish = FinishReason.LENGTH if span.feature and not span.draw else None
            if result.token is not None:
                generation.tokens.append(result.token)
                finish = _finish_reason(generation)
            events.append(
                TokenEvent(
                    generation.id,
                    result.token,
                    result.logprobs,
                    prompt_logprobs,
                    finish,
                    generation.cached_tokens or 0,
                    result.feature,
                    class_logits=result.class_logits,
                )
            )
            if finish is not None:
                self._end(generation, ended)
        return events, ended

    def _end(self, generation: Generation, ended: list[Generation]) -> None:
        self._stop(generation)
        ended.append(generation)

    def _advance(self, generation: Generation, count: int) -> None:
        """The generation's next `count` tokens are in the cache now; share the blocks that became full."""
        before, after = generation.computed, generation.computed + count
        generation.computed = after
        size = self.blocks.block_size
        self.blocks.share(generation.namespace, generation.blocks, generation.tokens, before // size, after // size)

    def _admit(self, generation: Generation) -> bool:
        """Hold every block the tokens so far need, reusing shared ones; False when it must wait.

        A spare block per running generation is left over, so that an admission does not force a preemption at once.
        """
        reusable = [] if generation.sampling.prompt_logprobs is not None else generation.tokens[:-1]
        shared = self.blocks.match(generation.namespace, reusable)
        missing = self.blocks.blocks_for(len(generation.tokens)) - len(shared)
        fresh = self.blocks.allocate(missing) if missing + len(self._running) <= self.blocks.spare else None
        if fresh is None:
            self.blocks.release(shared)
            return False
        generation.blocks = shared + fresh
        generation.computed = len(shared) * self.blocks.block_size
        if generation.cached_tokens is None:
            generation.cached_tokens = generation.computed
        return True

    def _reserve(self, generation: Generation, count: int) -> bool:
        """Make room for `count` more rows, preempting later arrivals; False when the generation itself had to go."""
        needed = self.blocks.blocks_for(generation.computed + count) - len(generation.blocks)
        while needed > 0:
            fresh = self.blocks.allocate(needed)
            if fresh is not None:
                generation.blocks += fresh
                return True
            victim = self._running[-1]
            self._preempt(victim)
            if victim is generation:
                return False
        return True

    def _preempt(self, generation: Generation) -> None:
        self.preemptions += 1
        self._stop(generation)
        self._waiting.appendleft(generation)

    def _stop(self, generation: Generation) -> None:
        """It runs no longer: its blocks and its adapters' places are free."""
        self._running.remove(generation)
        self._let_go(generation)
        self.blocks.release(generation.blocks)
        generation.blocks = []
        generation.computed = 0

    def _hold(self, generation: Generation) -> bool:
        """Whether its adapters are on the device, to stay; one whose adapters cannot be brought there is dropped."""
        leases = _leases(generation)
        if not leases or self._memory.hold(leases):
            return True
        failures = (self._memory.failure(lease) for lease in leases)
        if (failure := next((why for why in failures if why is not None), None)) is not None:
            self._waiting.remove(generation)
            self._failed.append((generation, failure))
        return False

    def _let_go(self, generation: Generation) -> None:
        if leases := _leases(generation):
            self._memory.let_go(leases)

    def _want(self) -> None:
        """Tell the memory what the queue needs, in its order; silent while it needs nothing."""
        every = (lease for generation in self._waiting for lease in _leases(generation))
        wanted = list(itertools.islice(every, MOST_WANTED))
        if wanted or self._wanted:
            self._memory.want(wanted)
        self._wanted = bool(wanted)

    def _span(self, generation: Generation, count: int) -> Span:
        start, stop = generation.computed, generation.computed + count
        sampling = generation.sampling
        wants_prompt = sampling.prompt_logprobs is not None and generation.drawn == 0
        return Span(
            generation=generation.id,
            applied=generation.applied,
            tokens=tuple(generation.tokens[start:stop]),
            start=start,
            blocks=tuple(generation.blocks[: self.blocks.blocks_for(stop)]),
            draw=stop == len(generation.tokens) and sampling.max_tokens > 0,
            sampling=sampling,
            drawn=generation.drawn,
            history=tuple(generation.tokens) if sampling.needs_history else (),
            prompt_length=generation.prompt_length,
            prompt_targets=tuple(generation.tokens[start + 1 : stop + 1]) if wants_prompt else (),
            given={at - start: one for at, one in generation.given.items() if start <= at < stop},
            feature=sampling.feature and generation.drawn == 0 and stop == len(generation.tokens),
        )


def _leases(generation: Generation) -> list[Lease]:
    return [one.lease for one in generation.applied]


def _adapter_order(choice: tuple[Generation, int]) -> list[tuple[str, str, tuple[float, ...]]]:
    """Rows of one adapter and gate become neighbours."""
    return [(one.lease.version.name, one.lease.version.digest, one.gate or ()) for one in choice[0].applied]


def _finish_reason(generation: Generation) -> FinishReason | None:
    sampling = generation.sampling
    if generation.drawn >= sampling.min_tokens and generation.tokens[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    if generation.drawn >= sampling.max_tokens:
        return FinishReason.LENGTH
    return None
