"""Bodies that are too large or too slow, requests past their deadline, and pages of other origins."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from motet.server.api.app import RequestLimits, create_app
from tests.unit.server.api.rig import BODY, Running, during

JSON = {"content-type": "application/json"}


def client(started: Running, **limits: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(started.service, RequestLimits(**limits)), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://x")


async def parts(content: bytes, size: int, pause_s: float = 0) -> AsyncIterator[bytes]:
    for at in range(0, len(content), size):
        yield content[at : at + size]
        await asyncio.sleep(pause_s)


def body_of(size: int) -> bytes:
    body = {**BODY, "user": ""}
    return json.dumps({**body, "user": "x" * (size - len(json.dumps(body)))}).encode()


def code_of(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


# -------------------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_has_a_largest_size(adapter: Path, announced: bool) -> None:
    async def scenario(started: Running) -> None:
        async with client(started, body_bytes=1000) as asked:
            for size, status in ((1000, 200), (1001, 413)):
                content: Any = body_of(size) if announced else parts(body_of(size), 100)
                response = await asked.post("/v1/completions", content=content, headers=JSON)
                assert response.status_code == status, response.text
            assert code_of(response) == (413, "request_too_large")
            assert response.headers["connection"] == "close"
        await started.nothing_is_held()

    during(adapter, scenario)


def test_what_is_announced_as_too_large_is_not_read(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        async def never() -> AsyncIterator[bytes]:
            raise AssertionError("it was read")
            yield b""

        async with client(started, body_bytes=1000) as asked:
            headers = {**JSON, "content-length": "1001"}
            response = await asked.post("/v1/completions", content=never(), headers=headers)
            assert code_of(response) == (413, "request_too_large")

    during(adapter, scenario)


def test_a_body_that_comes_slowly_is_given_up(adapter: Path) -> None:
    """However steadily it comes."""

    async def scenario(started: Running) -> None:
        async with client(started, body_timeout_s=0.3) as asked:
            began_s = time.monotonic()
            content = parts(body_of(1000), 1, pause_s=0.02)
            response = await asked.post("/v1/completions", content=content, headers=JSON)
            assert code_of(response) == (408, "request_timeout")
            assert time.monotonic() - began_s < 5
            quick = await asked.post("/v1/completions", content=body_of(1000), headers=JSON)
            assert quick.status_code == 200, "the answer may take longer than the body"

    during(adapter, scenario)


def test_the_body_of_an_administrator_has_limits_too(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        async with client(started, body_bytes=50) as asked:
            headers = {"Authorization": "Bearer admin-key-of-the-rig"}
            body = {"lora_name": "x" * 100, "lora_path": "y"}
            assert code_of(await asked.post("/v1/load_lora_adapter", json=body, headers=headers))[0] == 413

    during(adapter, scenario)


# ----------------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_deadline_ends_what_runs_and_what_waits(adapter: Path, stream: bool, waiting: bool) -> None:
    async def scenario(started: Running) -> None:
        started.runner.steps_before_waiting = 0 if waiting else 2
        async with client(started) as asked:
            headers = {"X-Request-Timeout-S": "0.2"}
            body = {**BODY, "max_tokens": 50, "ignore_eos": True, "stream": stream}
            response = await asked.post("/v1/completions", json=body, headers=headers)
            if stream:
                assert response.status_code == 200, "the stream had begun"
                *events, last, end = response.text.split("\n\n")
                assert len(events) == (0 if waiting else 2)
                error = json.loads(last.removeprefix("data: "))["error"]
                assert (end, "[DONE]" in response.text) == ("", False)
            else:
                assert response.status_code == 504
                error = response.json()["error"]
            assert (error["code"], error["type"]) == ("deadline_exceeded", "server_error")
        started.runner.go_on.set()
        await started.nothing_is_held()
        assert started.outcomes() == {"deadline": 1}

    during(adapter, scenario)


def test_a_request_that_is_in_time_notices_nothing(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        async with client(started, timeout_s=20.0) as asked:
            for headers in ({}, {"X-Request-Timeout-S": "20"}, {"X-Request-Timeout-S": "1.5"}):
                for stream in (False, True):
                    response = await asked.post("/v1/completions", json={**BODY, "stream": stream}, headers=headers)
                    assert response.status_code == 200
                    assert ("[DONE]" in response.text) == stream
        assert started.outcomes() == {"finished": 6}

    during(adapter, scenario)


def test_the_server_has_a_deadline_for_those_that_say_none(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.steps_before_waiting = 0
        async with client(started, timeout_s=0.2) as asked:
            assert code_of(await asked.post("/v1/completions", json=BODY)) == (504, "deadline_exceeded")
        started.runner.go_on.set()
        await started.nothing_is_held()

    during(adapter, scenario)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", "20.1", ""])
def test_an_impossible_deadline_names_the_header(adapter: Path, given: str) -> None:
    async def scenario(started: Running) -> None:
        async with client(started, timeout_s=20.0) as asked:
            response = await asked.post("/v1/completions", json=BODY, headers={"X-Request-Timeout-S": given})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "X-Request-Timeout-S")
            assert repr(given) in error["message"]
            assert "up to 20" in error["message"]

    during(adapter, scenario)


def test_what_cannot_be_cancelled_has_no_deadline(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        headers = {"Authorization": "Bearer admin-key-of-the-rig"}
        async with client(started, timeout_s=1e-4) as asked:
            body = {"lora_name": "another", "lora_path": str(adapter)}
            assert (await asked.post("/v1/load_lora_adapter", json=body, headers=headers)).status_code == 200
            for method, path in (
                ("PUT", "/v1/adapters/x"),
                ("DELETE", "/v1/adapters/x/y"),
                ("POST", "/v1/adapters/x/rollback"),
                ("POST", "/v1/unload_lora_adapter"),
            ):
                asking = {**headers, "X-Request-Timeout-S": "1"}
                response = await asked.request(method, path, json={}, headers=asking)
                assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Request-Timeout-S")
            assert code_of(await asked.post("/v1/completions", json=BODY)) == (504, "deadline_exceeded")
        await started.nothing_is_held()

    during(adapter, scenario)


# ---------------------------------------------------------------------------------------------------------------- CORS


def test_other_origins_are_shut_out_unless_named(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        page = {"Origin": "https://page.example"}
        ask = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        async with client(started) as asked:
            assert "access-control-allow-origin" not in (await asked.get("/v1/models", headers=page)).headers
            assert (await asked.options("/v1/completions", headers=ask)).status_code == 405
        async with client(started, cors_origins=("https://page.example",)) as asked:
            answer = await asked.get("/v1/models", headers=page)
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            asking = await asked.options("/v1/completions", headers=ask)
            assert asking.status_code == 200
            assert "authorization" in asking.headers["access-control-allow-headers"].lower()
            other = await asked.get("/v1/models", headers={"Origin": "https://other.example"})
            assert "access-control-allow-origin" not in other.headers

    during(adapter, scenario)
