"""SIGTERM: the door closes, what has begun is finished, the process ends well."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.conftest import examples
from tests.e2e.process import Server, eventually

TOKENS = 100


def test_a_drain_finishes_what_has_begun(tmp_path: Path) -> None:
    """As users run it: the default model in the machine's own dtype with the example adapters."""
    adapters = [part for name, folder in examples().items() for part in ("--adapter", f"{name}={folder}")]
    server = Server([*adapters, "--drain-timeout", "300"], tmp_path / "log").wait_until_ready()
    try:
        model = next(iter(examples()), server.base)
        with (
            server.openai() as client,
            client.completions.create(
                model=model,
                prompt="Once upon a time",
                max_tokens=TOKENS,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            ) as stream,
        ):
            chunks = [next(stream) for _ in range(3)]
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: server.http.get("/ready").status_code == 503)
            assert server.http.get("/ready").json() == {"status": "draining"}
            assert server.http.get("/health").status_code == 200, "draining is no reason to be killed"
            refusal = server.post("/v1/completions", {"model": server.base, "prompt": "a"})
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "server_draining")
            assert int(refusal.headers["retry-after"]) > 0
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}])
            assert server.metrics["motet_running"] == 1, "the stream ended before the drain was looked at"
            *rest, last = list(stream)
        chunks += rest
        assert last.usage is not None
        assert len(chunks) == last.usage.completion_tokens == TOKENS
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(60) == 0
    finally:
        server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_drain_ends_at_its_timeout(tmp_path: Path, tiny_model: Path) -> None:
    server = Server(["--model", str(tiny_model), "--drain-timeout", "0.5"], tmp_path / "log").wait_until_ready()
    try:
        body = {"model": server.base, "prompt": ["a"] * 60, "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            seen = [next(lines)]
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
            with contextlib.suppress(httpx.TransportError):
                seen += lines
        assert "data: [DONE]" not in seen, "the stream ended before the timeout"
    finally:
        server.stop()
