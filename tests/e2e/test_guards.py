"""A server with keys that see some adapters, quotas and limits; and that nothing secret is in what it says."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.process import ADMIN_KEY, Server

TENANT, POOR, FREE = "tenant-key-7f3a", "poor-key-90c1", "free-key-55d2"
TIMEOUT_S = 1.5
ENDLESS: dict[str, Any] = {"model": "tuned", "prompt": "a", "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_adapter: Path) -> Iterator[Server]:
    """After the tests, neither its answers nor its log may hold a key or a path of the machine."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = (f"{TENANT} label=tenant adapters=mine,team/*", f"{POOR} label=poor", FREE)
    (folder / "api").write_text("\n".join(keys))
    (folder / "admin").write_text(f"{ADMIN_KEY} label=ops")
    options = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--log-level", "info"]
    options += ["--api-key-file", str(folder / "api"), "--admin-key-file", str(folder / "admin")]
    options += [part for name in ("tuned", "mine", "limited") for part in ("--adapter", f"{name}={tiny_adapter}")]
    options += ["--adapter-quota", "limited=tokens:40", "--key-quota", "poor=requests:2", "--max-generations", "2"]
    options += ["--max-body", "2000", "--body-timeout", str(TIMEOUT_S), "--adapter-root", str(folder)]
    server = Server(options, folder / "log")
    answers: list[str] = []

    def record(response: httpx.Response) -> None:
        if response.status_code >= 400:
            answers.append(response.read().decode())

    try:
        server.wait_until_ready()
        server.http.event_hooks = {"response": [record]}
        yield server
        server.wait_until_idle()
    finally:
        code = server.stop()
    said = server.log.read_text() + "".join(answers)
    assert code == 0, said
    assert "Traceback" not in said, said
    for secret in (TENANT, POOR, FREE, ADMIN_KEY, str(folder), str(tiny_model), str(tiny_adapter)):
        assert secret not in said, said


def ask(server: Server, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    asked = {"model": "tuned", "prompt": "a", "max_tokens": 2, "ignore_eos": True, **body}
    return server.post(path, asked, key)


def code_of(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"]["code"]


def test_a_key_sees_its_adapters_only(guarded: Server) -> None:
    with guarded.openai(TENANT) as client:
        assert {model.id for model in client.models.list()} == {"tiny", "mine"}
        assert client.completions.create(model="mine", prompt="a", max_tokens=1).usage
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="tuned", prompt="a", max_tokens=1)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("tuned")
    with guarded.openai(FREE) as client:
        assert {model.id for model in client.models.list()} == {"tiny", "mine", "tuned", "limited"}


def test_the_quota_of_a_key(guarded: Server) -> None:
    assert [ask(guarded, POOR).status_code for _ in range(2)] == [200, 200]
    with guarded.openai(POOR) as client, pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert error.value.code == "key_quota_exceeded"
    assert 0 < int(error.value.response.headers["retry-after"]) <= 30
    assert ask(guarded, FREE).status_code == 200
    assert "poor" in error.value.message


def test_the_quota_of_an_adapter_and_its_seconds(guarded: Server) -> None:
    """40 tokens a minute: a prompt of 1 and 29 drawn leave 10; 20 are missing for another such request."""
    assert ask(guarded, FREE, model="limited", max_tokens=29).status_code == 200
    refusal = ask(guarded, FREE, model="limited", max_tokens=29)
    assert code_of(refusal) == (429, "adapter_quota_exceeded")
    assert 25 <= int(refusal.headers["retry-after"]) <= 30
    assert ask(guarded, FREE, model="limited", max_tokens=8).status_code == 200
    assert code_of(ask(guarded, FREE, model="limited", max_tokens=40)) == (400, "adapter_quota_exceeded")


def test_a_quota_is_published_with_its_adapter(guarded: Server, tiny_adapter: Path) -> None:
    shutil.copytree(tiny_adapter, guarded.log.parent / "quoted")
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}

    def publish(tokens: float) -> httpx.Response:
        body = {"source": "quoted", "quota": {"tokens_per_minute": tokens, "weight": 2}}
        return guarded.http.put("/v1/adapters/quoted", json=body, headers=admin)

    assert publish(-1).status_code == 400
    assert publish(10).status_code == 200
    assert ask(guarded, FREE, model="quoted", max_tokens=6).status_code == 200
    assert code_of(ask(guarded, FREE, model="quoted", max_tokens=6)) == (429, "adapter_quota_exceeded")
    assert publish(600).status_code == 200
    assert ask(guarded, FREE, model="quoted", max_tokens=1).status_code == 200
    assert guarded.http.delete("/v1/adapters/quoted", headers=admin).status_code == 200
    assert code_of(ask(guarded, FREE, model="quoted")) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_deadlines_of_what_runs_and_what_waits(guarded: Server, stream: bool) -> None:
    """Two run at once, so that of six prompts four wait."""
    headers = {"Authorization": f"Bearer {FREE}", "X-Request-Timeout-S": "0.5"}
    began_s = time.monotonic()
    body = {**ENDLESS, "prompt": ["a"] * 6, "stream": stream}
    response = guarded.http.post("/v1/completions", json=body, headers=headers)
    assert time.monotonic() - began_s < 10
    if stream:
        last = [line for line in response.text.split("\n\n") if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    else:
        assert code_of(response) == (504, "deadline_exceeded")
    guarded.wait_until_idle(10)


def raw(server: Server, *parts: bytes) -> bytes:
    """What comes back before the server closes the connection; each part is sent half a second after the one before."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.5 if len(parts) > 1 else 0)
        received = b""
        while more := connection.recv(4096):
            received += more
    return received


@pytest.mark.parametrize("head", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthor"])
def test_half_a_head_is_given_up(guarded: Server, head: bytes) -> None:
    began_s = time.monotonic()
    answer = raw(guarded, head)
    assert TIMEOUT_S * 0.9 < time.monotonic() - began_s < 10
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_half_a_head_after_a_whole_request_is_given_up(guarded: Server) -> None:
    answer = raw(guarded, b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /vers")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in answer


def test_half_a_body_is_given_up(guarded: Server) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {FREE}\r\nContent-Length: 100\r\n"
    answer = raw(guarded, head.encode() + b'Content-Type: application/json\r\n\r\n{"model": ')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_a_large_body_is_refused(guarded: Server) -> None:
    assert code_of(ask(guarded, FREE, user="x" * 3000)) == (413, "request_too_large")


def test_an_answer_may_take_longer_than_a_request(guarded: Server) -> None:
    """The head's limit ends with the head."""
    with guarded.openai(FREE) as client:
        stream = client.completions.create(
            model="tuned", prompt="a", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        began_s = time.monotonic()
        for _ in stream:
            if time.monotonic() - began_s > TIMEOUT_S + 0.5:
                break
        else:
            pytest.skip("this machine draws 2000 tokens too fast to tell")
        stream.close()
    guarded.wait_until_idle(10)


def test_refusals_of_all_kinds(guarded: Server) -> None:
    """For what they say, which is looked at in the end."""
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    for source in ("nobody", "../escape", "/etc/passwd", "admin", ".", "none", "x" * 300, "\u0000", "http://x/y"):
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": source}),
            ("/v1/unload_lora_adapter", {"lora_name": source}),
        ):
            assert guarded.http.post(path, json=body, headers=admin).status_code >= 400
        assert guarded.http.put("/v1/adapters/new", json={"source": source}, headers=admin).status_code >= 400
    for key in (TENANT[:-1], ADMIN_KEY + "x", f"{TENANT} {POOR}"):
        assert ask(guarded, key).status_code == 401
    for content in (b"{", b"[" * 1900, b"\xff", b'{"a": 1' + b"0" * 1000 + b"}", b'{"model": NaN}'):
        headers = {"Authorization": f"Bearer {FREE}", "content-type": "application/json"}
        assert guarded.http.post("/v1/completions", content=content, headers=headers).status_code == 400


def test_series_of_each_adapter(guarded: Server) -> None:
    for _ in range(2):
        assert ask(guarded, FREE, model="mine", max_tokens=3).status_code == 200
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(guarded.http.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "version")
            found.setdefault(sample.name, {})[labels] = sample.value
    assert found["motet_adapter_requests_total"]["mine", "finished"] >= 2
    assert found["motet_adapter_requests_total"]["limited", "refused"] >= 1
    assert found["motet_adapter_tokens_total"]["mine", "drawn"] >= 6
    assert found["motet_adapter_ttft_seconds_count"]["mine",] >= 2
    assert found["motet_adapter_itl_seconds_count"]["mine",] >= 4
    assert found["motet_adapter_queue_seconds_count"]["mine",] >= 2
    for tier in ("device", "host", "disk"):
        assert found["motet_adapter_resident"]["mine", tier] == 1
    [(_, on_device, _)] = found["vllm:lora_requests_info"]
    assert on_device.split(",") == ["limited", "mine", "tuned"]
