"""The real app, registry and engine around a runner of our own, in one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from motet.adapters.host import HostTier
from motet.adapters.lease import Lease
from motet.adapters.origin import folders
from motet.adapters.registry import Registry
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion
from motet.server.api.app import create_app
from motet.server.api.base_info import BaseInfo
from motet.server.api.classifying import Classifying
from motet.server.api.inputs import TextInputs
from motet.server.api.keys import Keys
from motet.server.api.merging import Merging
from motet.server.api.scoring import Scorer, golden_check
from motet.server.api.service import Service
from motet.server.engine.blocks import BlockPool
from motet.server.engine.engine import Engine
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.stream import Streams
from motet.server.engine.types import Lease as EngineLease, Plan, SpanResult, TokenLogprobs
from motet.server.metrics import Metrics
from tests.support.bases import one_target_base, residency_of
from tests.support.tokenizer import byte_tokenizer

TOKENIZER: Any = byte_tokenizer()
DEADLINE_S = 20
LIMITS = StepLimits(rows=64, generations=8)
ADMIN_KEY = "admin-key-of-the-rig"
BODY: dict[str, Any] = {"model": "adapted", "prompt": "abc", "max_tokens": 4}


def logprob_of(token: int) -> float:
    """What the rig's runner says of a token in a prompt."""
    return -1.0 - token / 8


class CountingRunner:
    """Draws the token after the last one; fails or waits when told to."""

    def __init__(self) -> None:
        self.failing_steps = 0
        self.steps_before_waiting: int | None = None
        self.go_on = threading.Event()
        self.versions: set[AdapterVersion | None] = set()

    def run(self, plan: Plan) -> Sequence[SpanResult]:
        self.versions |= {next((one.lease.version for one in span.applied), None) for span in plan.spans}
        if self.failing_steps:
            self.failing_steps -= 1
            raise RuntimeError("/srv/secret failed")
        if self.steps_before_waiting is not None:
            if self.steps_before_waiting == 0:
                assert self.go_on.wait(DEADLINE_S)
            self.steps_before_waiting = max(0, self.steps_before_waiting - 1)
        return [
            SpanResult(
                (span.tokens[-1] + 1) % len(TOKENIZER) if span.draw else None,
                prompt_logprobs=tuple(TokenLogprobs(token, logprob_of(token), ()) for token in span.prompt_targets),
            )
            for span in plan.spans
        ]


class Running:
    """A service in the running loop, with one adapter, "adapted", and a client of it."""

    def __init__(self, adapter: Path, limits: StepLimits, max_waiting: int) -> None:
        base = one_target_base()
        self.runner = CountingRunner()
        residency = residency_of(base)
        tiers = Tiers(residency, HostTier(1 << 20))
        self.scheduler = Scheduler(BlockPool(64, 4), limits, tiers)
        loop = asyncio.get_running_loop()
        streams = Streams(loop)
        engine = Engine(self.scheduler, self.runner, streams.publish, self._end_lease)
        info = BaseInfo("base", "0" * 64, 256, len(TOKENIZER), frozenset({2}), "float32", "cpu", 0)
        self.scorer = Scorer(info, engine, streams)
        check, resolve = golden_check(self.scorer, loop), folders([adapter.parent])
        self.registry = Registry(base, residency, check=check, tiers=tiers, resolve=resolve)
        tiers.listen(engine.wake)
        self.registry.load("adapted", adapter)
        self.service = Service(
            base=info,
            tokenizer=TOKENIZER,
            registry=self.registry,
            engine=engine,
            streams=streams,
            merging=Merging(self.registry, self.scorer, TextInputs(TOKENIZER)),
            classifying=Classifying(info, self.registry, self.scorer, TextInputs(TOKENIZER)),
            metrics=Metrics(lambda: engine.state, lambda: (0, 0), list),
            keys=Keys(admin=(ADMIN_KEY,)),
            max_waiting=max_waiting,
            ready=True,
        )
        transport = httpx.ASGITransport(create_app(self.service), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://x")

    async def post(self, path: str = "/v1/completions", **change: Any) -> httpx.Response:
        return await self.client.post(path, json={**BODY, **change})

    async def administer(self, method: str, path: str, headers: Any = None, **body: Any) -> httpx.Response:
        """A request of the administrator."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}", **(headers or {})}
        return await self.client.request(method, path, json=body or None, headers=headers)

    async def eventually(self, look: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not look():
                await asyncio.sleep(0.002)

    async def nothing_is_held(self) -> None:
        """No lease, no stream, no block, no generation."""
        await self.eventually(lambda: self.registry.get("adapted").leases == 0)
        await self.eventually(lambda: self.scheduler.blocks.spare == self.scheduler.blocks.size)
        assert len(self.service.streams) == self.scheduler.running == self.scheduler.waiting == 0

    def outcomes(self) -> dict[str, float]:
        samples = next(iter(self.service.metrics.requests.collect())).samples
        return {s.labels["outcome"]: s.value for s in samples if s.name == "motet_requests_total"}

    def generated_tokens(self) -> float:
        return next(iter(self.service.metrics.generated_tokens.collect())).samples[0].value

    def _end_lease(self, lease: EngineLease) -> None:
        assert isinstance(lease, Lease)
        self.registry.release(lease)


@asynccontextmanager
async def running(adapter: Path, limits: StepLimits = LIMITS, max_waiting: int = 99) -> AsyncIterator[Running]:
    started = Running(adapter, limits, max_waiting)
    started.service.engine.start()
    try:
        async with started.client:
            yield started
    finally:
        started.runner.go_on.set()
        started.service.engine.stop()


def during(adapter: Path, scenario: Callable[[Running], Awaitable[None]], **options: Any) -> None:
    async def play() -> None:
        async with asyncio.timeout(2 * DEADLINE_S), running(adapter, **options) as started:
            await scenario(started)

    asyncio.run(play())
