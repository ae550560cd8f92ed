"""A `motet serve` process, and what a test asks of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

START_S = 180
"""A start takes about ten seconds; a machine that also does something else needs more."""
END_S = 60
ADMIN_KEY = "admin-key-of-the-tests"

T = TypeVar("T")


def eventually(look: Callable[[], T], within_s: float = 30, every_s: float = 0.05) -> T:
    """What `look` returns once that is true; fails when it never is."""
    deadline_s = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < deadline_s, f"not within {within_s} s; the last look saw {seen!r}"
        time.sleep(every_s)
    return seen


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what configures a server, and without a network to fall back on."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOTET_")}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **more}


class Server:
    """One process; `log` receives what it prints."""

    def __init__(self, arguments: Sequence[str], log: Path, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.http = httpx.Client(base_url=self.url, timeout=120)
        own = ["--port", str(self.port), "--adapter-cache", str(log.with_name("lowered"))]
        command = [str(Path(sys.executable).with_name("motet")), "serve", *own, *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(**variables)
            )

    def wait_until_ready(self) -> Server:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                return self.http.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        eventually(ready, START_S)
        return self

    def stop(self) -> int:
        """Ask the process to end, as an orchestrator does; its exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        finally:
            self.process.kill()

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, path: str, body: Any, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.http.post(path, json=body, headers=headers)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The body of a completion that must succeed."""
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def prompt_logprobs(self, model: str, prompt: list[int]) -> list[float]:
        """Of the prompt's tokens from the second on."""
        answer = self.complete(model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=0, temperature=0)
        values: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        return values

    def load(self, name: str, folder: Path | str, **more: Any) -> httpx.Response:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder), **more}, ADMIN_KEY)

    def unload(self, name: str) -> httpx.Response:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name}, ADMIN_KEY)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return {model["id"]: model for model in self.http.get("/v1/models").json()["data"]}

    @property
    def base(self) -> str:
        return next(name for name, model in self.models.items() if model["parent"] is None)

    @property
    def metrics(self) -> dict[str, float]:
        """Every series without labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}

    def wait_until_idle(self, within_s: float = 30) -> None:
        """No generation runs or waits, and every block of the cache is free again."""

        def idle() -> bool:
            now = self.metrics
            return not (now["motet_running"] or now["motet_waiting"] or now["motet_kv_usage"])

        eventually(idle, within_s)

    def wait_until_running(self, generations: int = 1) -> None:
        eventually(lambda: self.metrics["motet_running"] >= generations)
