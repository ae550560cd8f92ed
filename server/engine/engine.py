"""The step loop: takes in submissions and cancellations, plans, runs, commits, publishes.

Must not know: torch, HTTP, text, how a step is computed. One thread owns the scheduler; everyone else talks to it
through the inbox, and hears from it through one call per step for all generations together.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from motet.server.engine.scheduler import Scheduler
from motet.server.engine.types import (
    Applied,
    FinishReason,
    Generation,
    GenerationId,
    GivenInput,
    Lease,
    Plan,
    Runner,
    Sampling,
    TokenEvent,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineState:
    """A picture of the engine after its latest step, for metrics and probes.

    Attributes:
        steps, rows: totals since the start.
        step_s: duration of the latest step.
        waiting_adapters: names with at least one generation that waits.
        failures: steps in a row that raised.
    """

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_held: int = 0
    preemptions: int = 0
    steps: int = 0
    rows: int = 0
    step_s: float = 0.0
    waiting_adapters: frozenset[str] = frozenset()
    failures: int = 0


class Engine:
    """Owns the step thread.

    Args:
        publish: receives the events of a step, in the step thread; must return quickly.
        end_lease: called once for every lease of a generation that ended, however it ended.
        prepare: called in the step thread before its first step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        publish: Callable[[Sequence[TokenEvent]], None],
        end_lease: Callable[[Lease], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._publish = publish
        self._end_lease = end_lease
        self._prepare = prepare
        self._prepared = threading.Event()
        self._failure: Exception | None = None
        self._inbox: deque[Generation | GenerationId] = deque()
        self._posted = 0
        self._wake = threading.Condition()
        self._woken = False
        self._goes_on = False
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="motet-steps", daemon=True)
        self.state = EngineState(blocks=scheduler.blocks.size)

    def start(self) -> None:
        """Begin stepping; returns once the step thread is prepared, and raises what kept it from that."""
        self._thread.start()
        self._prepared.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop after the current step; unfinished generations are cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the step thread runs."""
        return self._thread.is_alive()

    @property
    def most_running(self) -> int:
        """Generations that may run at once."""
        return self._scheduler.limits.generations

    @property
    def queued(self) -> int:
        """Generations that were submitted and do not run. May be asked from any thread."""
        with self._wake:
            return self._posted + self._scheduler.waiting

    def room(self, most_waiting: int) -> int:
        """How many more may be submitted so that no more than so many wait. May be asked from any thread.

        Whoever has to wait while others might still run lacks blocks, or its adapter: then nothing else is room.
        """
        with self._wake:
            waiting = self._scheduler.waiting
            free = 0 if waiting else self.most_running - self._scheduler.running
            return most_waiting + free - waiting - self._posted

    def submit(
        self,
        generation: GenerationId,
        prompt: Sequence[int],
        sampling: Sampling,
        applied: Sequence[Applied] = (),
        given: Mapping[int, GivenInput] | None = None,
        party: str | None = None,
    ) -> None:
        """Queue a prompt; from here on the engine owns the leases. May be called from any thread.

        Args:
            party: whom its service is counted to, where that is not its first adapter's name.
        """
        assert prompt, "a prompt has at least one token"
        asked = Generation(generation, list(prompt), len(prompt), sampling, tuple(applied), given or {})
        asked.submitted_s, asked.counted_to = time.monotonic(), party
        self._post(asked)

    def cancel(self, generation: GenerationId) -> None:
        """End a generation early; does nothing when it has ended. May be called from any thread."""
        self._post(generation)

    def wake(self) -> None:
        """An adapter arrived, failed, or may have room now: plan again. May be called from any thread."""
        with self._wake:
            self._woken = True
            self._wake.notify()

    def _post(self, message: Generation | GenerationId) -> None:
        with self._wake:
            self._inbox.append(message)
            self._posted += isinstance(message, Generation)
            self._wake.notify()

    def _loop(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            self._failure = error
            return
        finally:
            self._prepared.set()
        while True:
            with self._wake:
                while not (self._inbox or self._woken or self._goes_on or self._stopping):
                    self._wake.wait()
                self._woken = False
                if self._stopping:
                    break
            self.step()
        self._drain_inbox()
        for generation in self._scheduler.drain():
            self._finish(generation, FinishReason.CANCELLED)

    def step(self) -> None:
        """One turn: inbox, plan, run, commit, publish."""
        self._drain_inbox()
        plan = self._scheduler.plan()
        for generation, failure in self._scheduler.take_failed():
            self._finish(generation, FinishReason.ERROR, failure)
        # Without a row to compute, all that wait need an adapter that is not there: its arrival wakes the loop.
        self._goes_on = bool(plan.spans)
        if not plan.spans:
            self._observe(plan, 0.0)
            return
        started_s = time.perf_counter()
        try:
            results = self._runner.run(plan)
        except Exception:
            logger.exception("a step of %d rows failed; its %d generations end", plan.rows, len(plan.spans))
            self._fail(plan)
            return
        events, ended = self._scheduler.commit(plan, results)
        for generation in ended:
            self._end_leases(generation)
        # Before anybody hears of the step, so that whoever looks at the state then finds the step in it.
        self._observe(plan, time.perf_counter() - started_s)
        if events:
            self._publish(events)

    def _drain_inbox(self) -> None:
        while self._inbox:
            with self._wake:
                message = self._inbox.popleft()
                if isinstance(message, Generation):
                    self._posted -= 1
                    self._scheduler.add(message)
                    continue
            if (generation := self._scheduler.remove(message)) is not None:
                self._finish(generation, FinishReason.CANCELLED)

    def _fail(self, plan: Plan) -> None:
        """A step raised: its generations end with an error, the others go on."""
        failed = [one for span in plan.spans if (one := self._scheduler.remove(span.generation)) is not None]
        self._observe(plan, 0.0, failed=True)
        for generation in failed:
            self._finish(generation, FinishReason.ERROR, "the step that computed this request failed")

    def _finish(self, generation: Generation, reason: FinishReason, error: str | None = None) -> None:
        self._end_leases(generation)
        self._publish([TokenEvent(generation.id, finish=reason, error=error)])

    def _end_leases(self, generation: Generation) -> None:
        for one in generation.applied:
            self._end_lease(one.lease)

    def _observe(self, plan: Plan, step_s: float, failed: bool = False) -> None:
        scheduler, before = self._scheduler, self.state
        failures = before.failures + 1 if failed else 0
        self.state = EngineState(
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks=scheduler.blocks.size,
            blocks_held=scheduler.blocks.size - scheduler.blocks.spare,
            preemptions=scheduler.preemptions,
            steps=before.steps + bool(plan.spans),
            rows=before.rows + plan.rows,
            step_s=step_s,
            waiting_adapters=scheduler.waiting_adapters,
            failures=failures if plan.spans else before.failures,
        )
