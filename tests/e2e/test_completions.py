"""The openai client against the base and every adapter, all at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import examples
from tests.e2e.process import Server

PROMPT = "Write one sentence about the sea.\n"
TOKENS = 8
STREAMED: Any = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Answer:
    text: str
    usage: tuple[int, int, int]
    finish: str | None
    model: str
    fingerprint: str | None


def _usage(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def complete(client: openai.OpenAI, model: str) -> Answer:
    got = client.completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    choice = got.choices[0]
    return Answer(choice.text, _usage(got.usage), choice.finish_reason, got.model, got.system_fingerprint)


def chat(client: openai.OpenAI, model: str) -> Answer:
    got = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=TOKENS, temperature=0
    )
    choice = got.choices[0]
    assert choice.message.role == "assistant"
    text = choice.message.content
    assert text is not None
    return Answer(text, _usage(got.usage), choice.finish_reason, got.model, got.system_fingerprint)


def complete_streamed(client: openai.OpenAI, model: str) -> Answer:
    with client.completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0, **STREAMED) as stream:
        *chunks, last = list(stream)
    assert last.choices == []
    assert len(chunks) == last.usage.completion_tokens, "one chunk per token"
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    text = "".join(chunk.choices[0].text for chunk in chunks)
    finish = chunks[-1].choices[0].finish_reason
    return Answer(text, _usage(last.usage), finish, last.model, last.system_fingerprint)


def chat_streamed(client: openai.OpenAI, model: str) -> Answer:
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        max_completion_tokens=TOKENS,
        temperature=0,
        **STREAMED,
    ) as stream:
        first, *chunks, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert last.choices == []
    assert len(chunks) == last.usage.completion_tokens, "one chunk per token"
    assert all(chunk.usage is None for chunk in (first, *chunks))
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *chunks[:-1]))
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    finish = chunks[-1].choices[0].finish_reason
    return Answer(text, _usage(last.usage), finish, last.model, last.system_fingerprint)


WAYS: dict[str, Callable[[openai.OpenAI, str], Answer]] = {
    "completion": complete,
    "completion, streamed": complete_streamed,
    "chat": chat,
    "chat, streamed": chat_streamed,
}


@pytest.fixture(scope="module")
def answers(server: Server) -> dict[tuple[str, str], Answer]:
    """Of every model in every way, all asked at once; pools answer merged only (test_example_pool.py)."""
    asked = [name for name, card in server.models.items() if card.get("adapter", {}).get("method") != "amt"]
    wanted = [(model, way) for model in asked for way in WAYS]
    with server.openai() as client, ThreadPoolExecutor(len(wanted)) as pool:
        return dict(zip(wanted, pool.map(lambda one: WAYS[one[1]](client, one[0]), wanted), strict=True))


def test_every_adapter_of_the_start_is_a_model(server: Server) -> None:
    models = server.models
    base = models.pop(server.base)
    assert set(models) == {*examples(), "tenant/a", "tenant/b"}
    assert (base["parent"], base["object"], base["owned_by"]) == (None, "model", "motet")
    for name, model in models.items():
        assert (model["parent"], model["root"]) == (base["id"], name), "no path of the server"
        assert model["max_model_len"] == base["max_model_len"] == 8192
        assert len(model["adapter"]["version"]) == 64
        with server.openai() as client:
            assert client.models.retrieve(name).id == name


@pytest.mark.parametrize("endpoint", ["completion", "chat"])
def test_a_stream_says_what_an_answer_at_once_says(answers: dict[tuple[str, str], Answer], endpoint: str) -> None:
    models = {model for model, _ in answers}
    assert len(models) >= 3
    for model in models:
        assert answers[model, f"{endpoint}, streamed"] == answers[model, endpoint], model


def test_rows_are_computed_natively(answers: dict[tuple[str, str], Answer], server: Server) -> None:
    """All but those of the examples with sparse changes, which are not of a whole native step."""
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    rows = {
        sample.labels["path"]: sample.value
        for f in families
        for sample in f.samples
        if sample.name == "motet_rows_total"
    }
    assert rows.keys() <= {"native", "sparse"}
    assert rows["native"] > 5 * rows.get("sparse", 0)


def test_usage_counts_tokens(answers: dict[tuple[str, str], Answer]) -> None:
    prompts = {way: answer.usage[0] for (_, way), answer in answers.items()}
    assert prompts["chat"] > prompts["completion"] > 0, "the chat template adds tokens"
    for (model, way), answer in answers.items():
        prompt, completion, total = answer.usage
        assert prompt == prompts[way], "all were asked the same"
        assert total == prompt + completion
        assert completion == TOKENS if answer.finish == "length" else completion <= TOKENS
        assert answer.model == model
        assert answer.text or (answer.finish, completion) == ("stop", 1), "an adapter may end at once"


def test_each_model_answers_as_itself(answers: dict[tuple[str, str], Answer], server: Server) -> None:
    base = server.base
    assert len({answers[model, "completion"].text for model in (base, "tenant/a", "tenant/b")}) == 3
    fingerprints = {model: answer.fingerprint for (model, _), answer in answers.items()}
    assert len(set(fingerprints.values())) == len(fingerprints)
    for model, fingerprint in fingerprints.items():
        digest = "" if model == base else "_" + server.models[model]["adapter"]["version"][:12]
        assert fingerprint == f"{fingerprints[base]}{digest}"


def test_an_answer_names_its_adapter_version(server: Server) -> None:
    body = {"model": "tenant/a", "prompt": "a", "max_tokens": 1}
    version = server.models["tenant/a"]["adapter"]["version"]
    for more in ({}, {"stream": True}):
        assert server.post("/v1/completions", body | more).headers["x-motet-adapter"] == f"tenant/a@{version}"
    assert "x-motet-adapter" not in server.post("/v1/completions", body | {"model": server.base}).headers


def test_the_wire_format_of_a_stream(server: Server) -> None:
    body = {"model": server.base, "prompt": "One two three", "max_tokens": 3, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert len(events) == 3
    assert all(event.startswith('data: {"id":"cmpl-') for event in events)


def test_continuous_usage_counts_up(server: Server) -> None:
    with (
        server.openai() as client,
        client.completions.create(
            model=server.base,
            prompt="One two three",
            max_tokens=4,
            stream=True,
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "ignore_eos": True},
        ) as stream,
    ):
        assert [chunk.usage and chunk.usage.completion_tokens for chunk in stream] == [1, 2, 3, 4, 4]


def test_message_parts_are_joined(server: Server) -> None:
    with server.openai() as client:
        parts: Any = [{"type": "text", "text": "Write one sentence "}, {"type": "text", "text": "about the sea.\n"}]
        got = client.chat.completions.create(
            model=server.base, messages=[{"role": "user", "content": parts}], max_tokens=TOKENS, temperature=0
        )
        whole = chat(client, server.base)
    assert got.choices[0].message.content == whole.text
    assert got.usage is not None
    assert _usage(got.usage) == whole.usage
