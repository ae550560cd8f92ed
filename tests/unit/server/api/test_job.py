"""A request's way through the engine when something goes wrong: what the client sees and what is given back."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from motet.adapters.base import BaseModel, Target
from motet.adapters.registry import Lease, Registry
from motet.server.api.app import create_app
from motet.server.api.chat import RESERVED
from motet.server.api.service import FAILURES_UNHEALTHY, BaseInfo, Keys, Service
from motet.server.engine.blocks import BlockPool
from motet.server.engine.engine import Engine
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.engine.stream import Streams
from motet.server.engine.types import Lease as EngineLease, Plan, SpanResult
from motet.server.metrics import Metrics
from tests.support.bases import residency_of
from tests.support.tokenizer import byte_tokenizer

TOKENIZER: Any = byte_tokenizer()
DEADLINE_S = 20
LIMITS = StepLimits(rows=64, generations=8)
BODY: dict[str, Any] = {"model": "adapted", "prompt": "abc", "max_tokens": 4}


class CountingRunner:
    """Draws the token after the last one; fails or waits when told to."""

    def __init__(self) -> None:
        self.failing_steps = 0
        self.steps_before_waiting: int | None = None
        self.go_on = threading.Event()

    def run(self, plan: Plan) -> Sequence[SpanResult]:
        if self.failing_steps:
            self.failing_steps -= 1
            raise RuntimeError("/srv/secret failed")
        if self.steps_before_waiting is not None:
            if self.steps_before_waiting == 0:
                assert self.go_on.wait(DEADLINE_S)
            self.steps_before_waiting = max(0, self.steps_before_waiting - 1)
        return [SpanResult((span.tokens[-1] + 1) % len(TOKENIZER) if span.draw else None) for span in plan.spans]


class Running:
    """A service in the running loop, with one adapter, "adapted", and a client of it."""

    def __init__(self, adapter: Path, limits: StepLimits, max_waiting: int) -> None:
        weight = torch.ones(4, 4)
        base = BaseModel(
            "base",
            "0" * 64,
            {"q_proj": Target(0, "q_proj", 4, 4, has_bias=False)},
            frozenset(),
            lambda _: weight,
            lambda _: weight[0],
            lambda _: 1.0,
        )
        self.registry = Registry(base, residency_of(base))
        self.registry.load("adapted", adapter)
        self.runner = CountingRunner()
        self.scheduler = Scheduler(BlockPool(64, 4), limits)
        streams = Streams(asyncio.get_running_loop())
        engine = Engine(self.scheduler, self.runner, streams.publish, self._end_lease)
        self.service = Service(
            base=BaseInfo("base", "0" * 64, 256, len(TOKENIZER), frozenset({2}), "float32", "cpu", 0),
            tokenizer=TOKENIZER,
            registry=self.registry,
            engine=engine,
            streams=streams,
            metrics=Metrics(lambda: engine.state, lambda: (0, 0), list),
            keys=Keys(),
            adapter_roots=[],
            max_waiting=max_waiting,
            ready=True,
        )
        transport = httpx.ASGITransport(create_app(self.service), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://x")

    async def post(self, path: str = "/v1/completions", **change: Any) -> httpx.Response:
        return await self.client.post(path, json={**BODY, **change})

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


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    place = "base_model.model.q_proj"
    tensors = {f"{place}.lora_A.weight": torch.ones(1, 4), f"{place}.lora_B.weight": torch.ones(4, 1)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def during(adapter: Path, scenario: Callable[[Running], Awaitable[None]], **options: Any) -> None:
    async def play() -> None:
        async with asyncio.timeout(2 * DEADLINE_S), running(adapter, **options) as started:
            await scenario(started)

    asyncio.run(play())


def test_an_answer_gives_everything_back(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        response = await started.post(n=3)
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 12
        await started.nothing_is_held()
        assert started.outcomes() == {"finished": 1}

    during(adapter, scenario)


@pytest.mark.parametrize(
    "change",
    [
        {"stop": ""},
        {"stop": ["a"] * 17},
        {"stop_token_ids": [10**6]},
        {"logit_bias": {"a": 1}},
        {"max_tokens": 10**6},
        {"min_tokens": 5},
        {"prompt": ["a", "x" * 300]},
        {"prompt": ["a"] * 100, "n": 100},
    ],
    ids=str,
)
def test_a_refusal_takes_nothing(adapter: Path, change: dict[str, Any]) -> None:
    """A lease that was taken before the refusal would never end, nor would a drain."""

    async def scenario(started: Running) -> None:
        assert (await started.post(**change)).status_code == 400
        await started.nothing_is_held()

    during(adapter, scenario)


def test_a_failed_step_is_a_500_and_the_next_request_is_served(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.failing_steps = 1
        response = await started.post()
        assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
        assert "secret" not in response.text
        await started.nothing_is_held()
        assert (await started.post()).status_code == 200
        assert started.outcomes() == {"failed": 1, "finished": 1}

    during(adapter, scenario)


def test_a_failure_in_a_stream_is_an_event_and_no_done(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.failing_steps = 1
        response = await started.post(stream=True)
        assert response.status_code == 200, "the stream had begun"
        *_, last, end = response.text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert (end, "[DONE]" in response.text) == ("", False)
        await started.nothing_is_held()

    during(adapter, scenario)


def test_repeated_failures_are_unhealthy_and_a_success_heals(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.failing_steps = FAILURES_UNHEALTHY
        for _ in range(FAILURES_UNHEALTHY):
            assert (await started.client.get("/health")).status_code == 200
            await started.post()
        assert (await started.client.get("/health")).status_code == 503
        assert (await started.client.get("/ready")).status_code == 503
        assert (await started.post()).status_code == 200
        assert (await started.client.get("/health")).status_code == 200

    during(adapter, scenario)


def test_more_than_may_wait_is_a_429(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.steps_before_waiting = 1
        async with asyncio.TaskGroup() as group:
            many = group.create_task(started.post(prompt=["a", "b", "c"], max_tokens=50))
            await started.eventually(lambda: started.service.engine.state.waiting == 2)
            refusal = await started.post()
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "queue_full")
            assert refusal.json()["error"]["type"] == "rate_limit_error"
            assert int(refusal.headers["retry-after"]) > 0
            started.runner.go_on.set()
            assert (await many).status_code == 200
        await started.nothing_is_held()

    during(adapter, scenario, limits=StepLimits(64, 1), max_waiting=2)


@pytest.mark.parametrize(("state", "code"), [("draining", "server_draining"), ("starting", "server_starting")])
def test_a_closed_door(adapter: Path, state: str, code: str) -> None:
    async def scenario(started: Running) -> None:
        started.service.draining, started.service.ready = state == "draining", state != "starting"
        for path, change in (("/v1/completions", {}), ("/v1/completions", {"stream": True})):
            response = await started.post(path, **change)
            assert (response.status_code, response.json()["error"]["code"]) == (503, code)
            assert int(response.headers["retry-after"]) > 0
        assert (await started.client.get("/ready")).status_code == 503
        assert (await started.client.get("/health")).status_code == 200
        await started.nothing_is_held()

    during(adapter, scenario)


def test_an_adapter_unloaded_while_it_answers(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.steps_before_waiting = 1
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(started.post(n=2))
            await started.eventually(lambda: started.service.engine.state.running == 2)
            started.registry.unload("adapted")
            assert started.registry.residency.used_bytes > 0
            assert (await started.post()).status_code == 404
            started.runner.go_on.set()
        assert answer.result().status_code == 200
        await started.eventually(lambda: started.registry.residency.used_bytes == 0)

    during(adapter, scenario)


def test_a_stop_string_ends_the_engines_work(adapter: Path) -> None:
    """The engine knows tokens only: it has to be told, or it goes on until max_tokens."""

    async def scenario(started: Running) -> None:
        [token] = TOKENIZER("~", add_special_tokens=False)["input_ids"]
        started.runner.steps_before_waiting = 2
        async with asyncio.TaskGroup() as group:
            prompts = [[token - 1], [token + 1]]  # the second one does not come to the stop string
            answer = group.create_task(started.post(prompt=prompts, stop="~", max_tokens=200, ignore_eos=True))
            await started.eventually(lambda: started.generated_tokens() == 3)
            started.runner.go_on.set()
        choices = answer.result().json()["choices"]
        assert [(choice["text"] == "", choice["finish_reason"]) for choice in choices] == [
            (True, "stop"),
            (False, "length"),
        ]
        await started.nothing_is_held()
        assert started.service.engine.state.rows < 210, "the stopped one went on"

    during(adapter, scenario)


def test_what_the_template_is_called_with_cannot_be_set_by_a_request() -> None:
    """A new parameter of transformers' function needs a decision; these two change no length."""
    parameters = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert parameters - RESERVED == {"self", "kwargs", "documents", "sanitize_control_tokens"}
