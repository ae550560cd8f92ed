"""Decides which rows of which generations a step computes, and what its result means for them.

Must not know: torch, text, HTTP, how adapters work. It owns the generations and the cache blocks; it touches no tensor.
Running generations come in the order of their admission, then waiting ones in the order of the policy. A step has a
budget of rows; a generation that decodes takes one, a prompt takes a chunk of what is left. When blocks run out, the
generation that the policy puts last is preempted: its blocks are released and it waits to be computed again (mostly
from the prefix cache). One whose adapters are not on the device is passed over until they are, or it loses patience.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from motet.server.engine.blocks import BlockPool
from motet.server.engine.holding import Holding
from motet.server.engine.policy import Fcfs, Policy
from motet.server.engine.queue import Queue
from motet.server.engine.types import (
    FinishReason,
    Generation,
    GenerationId,
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

    Args:
        policy: first come, first served where there is none.
        clock: seconds that only grow.

    Note: used by the engine thread only.
    """

    def __init__(
        self,
        blocks: BlockPool,
        limits: StepLimits,
        memory: Memory,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocks = blocks
        self.limits = limits
        self.preemptions = 0
        self._policy: Policy = policy or Fcfs()
        self._clock = clock
        self._holding = Holding(memory, clock)
        self._arrivals = itertools.count()
        self._waiting = Queue(self._policy)
        self._running: list[Generation] = []
        self._failed: list[tuple[Generation, str]] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting_adapters(self) -> frozenset[str]:
        """Names of the adapters that waiting generations want."""
        return self._waiting.adapters

    def add(self, generation: Generation) -> None:
        """Queue a new generation, which must fit into the cache when it runs alone."""
        assert self.blocks.blocks_for(generation.prompt_length + generation.sampling.max_tokens) <= self.blocks.size
        generation.arrival = next(self._arrivals)
        self._waiting.add(generation)

    def remove(self, generation_id: GenerationId) -> Generation | None:
        """Drop a generation wherever it is and release its blocks; None when it is unknown or has ended."""
        for generation in self._running:
            if generation.id == generation_id:
                self._stop(generation)
                return generation
        return self._unqueue(generation_id)

    def drain(self) -> list[Generation]:
        """Drop every generation and release its blocks."""
        dropped = [*self._running, *self._waiting]
        for generation in dropped:
            self.remove(generation.id)
        self._holding.want(())
        return dropped

    def plan(self) -> Plan:
        """Choose the rows of the next step; empty when there is nothing to compute."""
        budget = self.limits.rows
        chosen: dict[Generation, int] = {}
        preemptions = self.preemptions
        for generation in list(self._running):
            if budget == 0 or generation not in self._running:
                continue
            count = min(budget, len(generation.tokens) - generation.computed)
            victims = self._reserve(generation, count)
            budget += sum(chosen.pop(victim, 0) for victim in victims)
            if generation not in victims:
                chosen[generation] = count
                budget -= count
        full = preemptions < self.preemptions or len(self._running) >= self.limits.generations
        for generation in () if full else self._candidates():
            if budget == 0 or len(self._running) >= self.limits.generations:
                break
            if not self._holding.hold(generation):
                self._give_up(generation)
                continue
            if not self._admit(generation):
                self._holding.let_go(generation)
                break
            chosen[generation] = min(budget, len(generation.tokens) - generation.computed)
            budget -= chosen[generation]
        self._holding.want(self._waiting.heads())
        return Plan(tuple(self._span(*choice) for choice in sorted(chosen.items(), key=_adapter_order)))

    def _candidates(self) -> Iterator[Generation]:
        """Who may be admitted, in order; whom the caller leaves in the queue was not."""
        while (first := self._holding.impatient()) is not None:
            yield first
            if first in self._waiting:
                break
        for head in self._waiting.heads():
            if first is None or not head.applied or head.arrival < first.arrival:
                yield head

    def _give_up(self, generation: Generation) -> None:
        """Drop it, where its adapters cannot be brought to the device."""
        if (failure := self._holding.failure(generation)) is not None:
            self._unqueue(generation.id)
            self._failed.append((generation, failure))

    def _unqueue(self, generation_id: GenerationId) -> Generation | None:
        if (generation := self._waiting.remove(generation_id)) is not None:
            self._holding.settled(generation)
        return generation

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
                self._policy.drew(generation)
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
                    queue_s=generation.queue_s,
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
        """Let it run, with every block the tokens so far need, reusing shared ones; False when it must wait.

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
        self._running.append(generation)
        self._unqueue(generation.id)  # in this order: whoever asks from another thread how many wait sees no gap
        if generation.cached_tokens is None:
            generation.cached_tokens = generation.computed
            generation.queue_s = self._clock() - generation.submitted_s
            self._policy.admitted(generation)
        return True

    def _reserve(self, generation: Generation, count: int) -> list[Generation]:
        """Make room for `count` more rows; whoever had to go for that, perhaps the generation itself."""
        needed = self.blocks.blocks_for(generation.computed + count) - len(generation.blocks)
        victims: list[Generation] = []
        while needed > 0 and generation not in victims:
            fresh = self.blocks.allocate(needed)
            if fresh is not None:
                generation.blocks += fresh
                break
            victims.append(max(self._running, key=self._policy.order))
            self._preempt(victims[-1])
        return victims

    def _preempt(self, generation: Generation) -> None:
        self.preemptions += 1
        self._waiting.add(generation)
        self._stop(generation)

    def _stop(self, generation: Generation) -> None:
        """It runs no longer: its blocks and its adapters' places are free."""
        self._running.remove(generation)
        self._holding.let_go(generation)
        self.blocks.release(generation.blocks)
        generation.blocks = []
        generation.computed = 0

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
