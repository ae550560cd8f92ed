"""An engine with a runner of our own, and everything it publishes."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from motet.server.engine.blocks import BlockPool
from motet.server.engine.engine import Engine
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.types import (
    Applied,
    FinishReason,
    GenerationId,
    Lease,
    Plan,
    Sampling,
    SpanResult,
    TokenEvent,
)
from tests.support.fake_memory import FakeMemory
from tests.support.fake_runner import FakeLease, FakeRunner, version_of

BLOCK = 4
PATIENCE_S = 30.0
SHORT = Sampling(max_tokens=4)


class Steered(FakeRunner):
    """Raises where told to, and can be held inside of a step."""

    def __init__(self) -> None:
        super().__init__(BLOCK)
        self.fails: Callable[[Plan], bool] = lambda plan: False
        self.errors: set[GenerationId] = set()
        self.held = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def run(self, plan: Plan) -> Sequence[SpanResult]:
        self.held.set()
        assert self.go_on.wait(PATIENCE_S)
        if self.fails(plan):
            raise RuntimeError("the device is on fire")
        return [
            SpanResult(None, error="not finite") if span.generation in self.errors else result
            for span, result in zip(plan.spans, super().run(plan), strict=True)
        ]


class Rig:
    """An engine, and everything that came out of it."""

    def __init__(self, blocks: int = 64, rows: int = 64, generations: int = 8) -> None:
        self.pool = BlockPool(blocks, BLOCK)
        self.runner = Steered()
        self.memory = FakeMemory()
        scheduler = Scheduler(self.pool, StepLimits(rows, generations), self.memory)
        self.engine = Engine(scheduler, self.runner, self._publish, self._end_lease)
        self.events: dict[GenerationId, list[TokenEvent]] = {}
        self.published: list[list[TokenEvent]] = []
        self.ended: Counter[Lease] = Counter()
        self.leases: dict[GenerationId, Lease] = {}
        self._ids = itertools.count()
        self._news = threading.Condition()

    def submit(self, prompt: Sequence[int], adapter: str | None = "fr", sampling: Sampling = SHORT) -> GenerationId:
        id = GenerationId(next(self._ids))
        self.events[id] = []
        lease = FakeLease(version_of(adapter)) if adapter else None
        if lease:
            self.leases[id] = lease
        self.engine.submit(id, prompt, sampling, (Applied(lease),) if lease else ())
        return id

    def wait(self, ids: Sequence[GenerationId]) -> None:
        with self._news:
            assert self._news.wait_for(lambda: all(self.ends(id) for id in ids), PATIENCE_S)

    def ends(self, id: GenerationId) -> list[FinishReason]:
        return [event.finish for event in self.events[id] if event.finish is not None]

    def tokens(self, id: GenerationId) -> list[int]:
        return [event.token for event in self.events[id] if event.token is not None]

    def assert_everything_ended_once(self) -> None:
        assert all(len(self.ends(id)) == 1 for id in self.events)
        assert all(events[-1].finish is not None for events in self.events.values())
        assert self.ended == Counter(self.leases.values())
        assert self.pool.spare == self.pool.size

    def _publish(self, events: Sequence[TokenEvent]) -> None:
        with self._news:
            self.published.append(list(events))
            for event in events:
                self.events[event.generation].append(event)
            self._news.notify_all()

    def _end_lease(self, lease: Lease) -> None:
        self.ended[lease] += 1


def run_until_idle(rig: Rig, steps: int = 200) -> None:
    for _ in range(steps):
        rig.engine.step()
        if not (rig.engine.state.running or rig.engine.state.waiting):
            return
    raise AssertionError("still busy")
