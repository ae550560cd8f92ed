"""A name moves to another version again and again under load: no request fails, no answer is of two versions."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.process import ADMIN_KEY, Server

SWAPS = 24
CLIENTS = 4
TOKENS = 24
BEGINNING = list(range(5, 53))
"""Three blocks of the cache that all prompts share."""
PROMPTS = [[*BEGINNING, end] for end in (60, 61, 62)]
HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def rolling(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_sources: list[Path]) -> Iterator[Server]:
    """The random Llama, "tiny", with two adapters, "one" and "two", and "live", which may be either."""
    arguments = ["--model", str(tiny_model), "--name", "tiny", "--dtype", "float32", "--kv-memory", "64MiB"]
    for name, folder in (("one", tiny_sources[0]), ("two", tiny_sources[1]), ("live", tiny_sources[0])):
        arguments += ["--adapter", f"{name}={folder}"]
    arguments += ["--adapter-root", str(tiny_sources[0].parent)]
    server = Server(arguments, tmp_path_factory.mktemp("rolling") / "log", MOTET_ADMIN_KEY=ADMIN_KEY)
    try:
        yield server.wait_until_ready()
        server.wait_until_idle()
    finally:
        code = server.stop()
    log = server.log.read_text()
    assert code == 0, log
    assert "Traceback" not in log, log


def body(model: str, prompt: list[int]) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        versions: of every chunk, of the header.
        began_s, ended_s: on the monotonic clock.
    """

    prompt: int
    text: str
    versions: frozenset[str]
    cached_tokens: int
    began_s: float
    ended_s: float


def ask(http: httpx.Client, prompt: int) -> Answer:
    began_s, text, cached_tokens = time.monotonic(), "", 0
    asked = {**body("live", PROMPTS[prompt]), "stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, response.read()
        name, _, version = response.headers["X-Motet-Adapter"].partition("@")
        assert name == "live"
        versions, lines = {version}, [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    for line in lines:
        chunk = json.loads(line.removeprefix("data: "))
        assert chunk["adapter"]["name"] == "live"
        assert chunk["adapter"]["version"][:12] in chunk["system_fingerprint"]
        versions.add(chunk["adapter"]["version"])
        text += "".join(choice["text"] for choice in chunk["choices"])
        if chunk.get("usage"):
            cached_tokens = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Answer(prompt, text, frozenset(versions), cached_tokens, began_s, time.monotonic())


def publish(server: Server, source: Path) -> float:
    """The moment at which the name had moved."""
    response = server.http.put("/v1/adapters/live", json={"source": source.name}, headers=HEADERS)
    assert response.status_code == 200, response.text
    return time.monotonic()


def test_every_answer_is_wholly_of_the_version_it_names(rolling: Server, tiny_sources: list[Path]) -> None:
    versions = {rolling.models[name]["adapter"]["version"]: name for name in ("one", "two")}
    expected = {
        (version, prompt): rolling.complete(**body(name, tokens))["choices"][0]["text"]
        for version, name in versions.items()
        for prompt, tokens in enumerate(PROMPTS)
    }
    assert len(set(expected.values())) == len(expected), "answers that are alike tell nothing apart"
    over, before = threading.Event(), rolling.metrics["motet_adapter_memory_bytes"]

    def client(seed: int) -> list[Answer]:
        chance, found = random.Random(seed), []
        with httpx.Client(base_url=rolling.url, timeout=60) as http:
            while not over.is_set():
                found.append(ask(http, chance.randrange(len(PROMPTS))))
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, seed) for seed in range(CLIENTS)]
        try:
            moved_s = []
            for source in itertools.islice(itertools.cycle([tiny_sources[1], tiny_sources[0]]), SWAPS):
                rolling.wait_until_running()
                moved_s.append(publish(rolling, source))
        finally:
            over.set()
        answers = [answer for future in clients for answer in future.result()]
    assert {answer.versions for answer in answers} == {frozenset([version]) for version in versions}
    for answer in answers:
        (version,) = answer.versions
        assert answer.text == expected[version, answer.prompt]
    require_swaps_within(answers, moved_s)
    assert sum(answer.cached_tokens > 0 for answer in answers) > len(answers) / 4, "the prefix cache took no part"
    rolling.wait_until_idle()
    assert rolling.metrics["motet_adapter_memory_bytes"] == before, "a version that nobody uses is still there"


def require_swaps_within(answers: list[Answer], moved_s: list[float]) -> None:
    """Most swaps happened while answers ran, else they show nothing."""
    crossed = [moment for moment in moved_s if any(one.began_s < moment < one.ended_s for one in answers)]
    assert len(crossed) >= SWAPS / 2, (len(crossed), len(answers))


def test_a_request_for_a_version_never_gets_another(rolling: Server, tiny_sources: list[Path]) -> None:
    versions: Mapping[str, str] = {name: rolling.models[name]["adapter"]["version"] for name in ("one", "two")}
    publish(rolling, tiny_sources[0])
    asked = body(f"live@{versions['one'][:12]}", PROMPTS[0])
    answer = rolling.complete(**asked)
    assert answer["adapter"] == {"name": "live", "version": versions["one"]}
    publish(rolling, tiny_sources[1])
    gone = rolling.post("/v1/completions", asked)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "version_not_served")
    assert versions["two"] in gone.json()["error"]["message"]
    assert rolling.complete(**{**asked, "model": f"one@{versions['one']}"})["choices"] == answer["choices"]
