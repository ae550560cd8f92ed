"""A request's way through the engine when something goes wrong: what the client sees and what is given back."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from motet.server.api.chat import RESERVED
from motet.server.api.service import FAILURES_UNHEALTHY
from motet.server.engine.scheduler import StepLimits
from tests.unit.server.api.rig import TOKENIZER, Running, during


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
        assert started.outcomes() == {"failed": 1}

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


def test_a_bug_in_a_stream_is_an_event_and_no_done(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise LookupError("/srv/secret")

    monkeypatch.setattr("motet.server.api.completions._Completion.chunk", broken)

    async def scenario(started: Running) -> None:
        response = await started.post(stream=True)
        event, end = response.text.split("\n\n")
        assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"
        assert (end, "secret" in response.text) == ("", False)
        await started.nothing_is_held()
        assert started.outcomes() == {"failed": 1}

    during(adapter, scenario)


def test_stop_strings_wait_for_min_tokens(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        whole = (await started.post(max_tokens=12)).json()["choices"][0]["text"]
        early, late = whole[1], whole[6]
        stopped = (await started.post(max_tokens=12, stop=[early, late])).json()["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == (whole[:1], "stop")
        waited = (await started.post(max_tokens=12, stop=[early, late], min_tokens=4)).json()["choices"][0]
        assert (waited["text"], waited["finish_reason"]) == (whole[:6], "stop")

    during(adapter, scenario)
