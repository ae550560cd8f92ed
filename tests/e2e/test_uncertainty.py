"""Uncertainty through the openai client: streamed and not, with logprobs and without, by head and by logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.e2e.headed import PLAIN, Headed
from tests.support.models import load_dense

PROMPT = "the quick brown fox"
TOKENS = 6
BOTH: dict[str, Any] = {"level": ["sequence", "token"]}
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def client(headed: Headed) -> openai.OpenAI:
    return headed.server.openai()


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of two runs: the same but for rounding in another batch."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close = isinstance(value, float) or key == "probabilities"
        assert found[key] == (pytest.approx(value, abs=1e-4) if close else value), key


def letters(headed: Headed) -> dict[str, float]:
    """Biases by which letters alone are drawn, each a token that says what it is."""
    return {str(headed.ids(letter)[0]): 100.0 for letter in "abcdefghij"}


@torch.no_grad()
def spreads(headed: Headed, prompt: Sequence[int], drawn: Sequence[int]) -> list[tuple[float, float, float]]:
    """Log-probability, entropy and margin of each drawn token by the base model in transformers."""
    model = load_dense(headed.model, torch.float32)
    logits_TV = model(torch.tensor([[*prompt, *drawn]])).logits[0, len(prompt) - 1 : -1].double()
    entropy_T = torch.distributions.Categorical(logits=logits_TV).entropy().tolist()
    logprob_TV = logits_TV.log_softmax(-1)
    first_T2 = logprob_TV.exp().topk(2, -1).values.tolist()
    return [
        (float(row_V[token]), entropy, first - second)
        for row_V, token, entropy, (first, second) in zip(logprob_TV, drawn, entropy_T, first_T2, strict=True)
    ]


def test_the_logits_say_what_transformers_says(headed: Headed, client: openai.OpenAI) -> None:
    """Unlikely tokens are drawn, by temperature and biases; the distribution that counts is the one before both."""
    prompt = headed.ids(PROMPT)
    got = client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=3,
        seed=5,
        logit_bias=letters(headed),
        extra_body={"uncertainty": BOTH},
    )
    said: Any = got.choices[0].uncertainty  # type: ignore[attr-defined]
    texts = [one["token"] for one in said["tokens"]]
    expected = spreads(headed, prompt, [headed.ids(text)[0] for text in texts])
    for one, (logprob, entropy, margin) in zip(said["tokens"], expected, strict=True):
        assert one["logprob"] == pytest.approx(logprob, abs=2e-4)
        assert one["entropy"] == pytest.approx(entropy, abs=2e-4)
        assert one["margin"] == pytest.approx(margin, abs=2e-4)
        assert one["calibrated"] is False
    mean = sum(logprob for logprob, _, _ in expected) / TOKENS
    assert said["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-3)
    assert said["score"] == pytest.approx(1 - math.exp(mean), abs=2e-4)
    assert said["confidence"] == 1 - said["score"]
    assert said["mean_token_entropy"] == pytest.approx(sum(one[1] for one in expected) / TOKENS, abs=2e-4)
    assert said["min_token_logprob"] == pytest.approx(min(one[0] for one in expected), abs=2e-4)
    assert (said["method"], said["calibrated"]) == ("logprob", False)


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("name", ["tiny", PLAIN, "dense"])
def test_a_streamed_chat_says_the_same(headed: Headed, client: openai.OpenAI, name: str, logprobs: bool) -> None:
    """Token values in the chunk of their token, the whole in the chunk that ends, nothing in the one with the usage."""
    body: Any = {"model": name, "messages": MESSAGES, "max_completion_tokens": TOKENS, "temperature": 0}
    body |= {"logprobs": logprobs, "extra_body": {"uncertainty": BOTH}, "logit_bias": letters(headed)}
    whole: Any = client.chat.completions.create(**body).choices[0]
    with client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}) as stream:
        first, *chunks, usage = list(stream)
    assert usage.choices == []
    assert "uncertainty" not in (usage.model_extra or {})
    assert not hasattr(first.choices[0], "uncertainty")
    assert len(chunks) == TOKENS
    assert all("score" not in getattr(chunk.choices[0], "uncertainty", {}) for chunk in chunks[:-1])
    last: Any = chunks[-1].choices[0]
    same(*({**choice.uncertainty, "tokens": None} for choice in (last, whole)))
    assert whole.uncertainty["method"] == ("vbll" if name == "dense" else "logprob")
    if logprobs:
        assert "tokens" not in whole.uncertainty
        assert whole.logprobs.uncertainty == whole.uncertainty
        assert last.logprobs.uncertainty == last.uncertainty
        tokens = [one.uncertainty for one in whole.logprobs.content]
        streamed = [chunk.choices[0].logprobs.content[0].uncertainty for chunk in chunks]
    else:
        assert whole.logprobs is None
        tokens = whole.uncertainty["tokens"]
        streamed = [chunk.choices[0].uncertainty["tokens"][0] for chunk in chunks]
        assert "".join(one["token"] for one in tokens) == whole.message.content
    assert len(tokens) == TOKENS
    assert all(one["calibrated"] is False for one in tokens)
    for one, other in zip(tokens, streamed, strict=True):
        assert one["entropy"] == pytest.approx(other["entropy"], abs=1e-4)
        assert one["margin"] == pytest.approx(other["margin"], abs=1e-4)


def test_a_streamed_completion_says_the_same(client: openai.OpenAI) -> None:
    body: Any = {"model": "judge", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    body |= {"echo": True, "extra_body": {"uncertainty": BOTH, "ignore_eos": True}}
    whole: Any = client.completions.create(**body).choices[0]
    with client.completions.create(**body, stream=True) as stream:
        chunks: list[Any] = [chunk.choices[0] for chunk in stream]
    same(chunks[-1].uncertainty, whole.uncertainty)
    assert chunks[-1].logprobs.uncertainty == chunks[-1].uncertainty
    assert not hasattr(chunks[0], "uncertainty")
    values = whole.logprobs.token_uncertainty
    assert len(values) == len(whole.logprobs.tokens), "the echoed prompt has none, but places"
    assert values[:-TOKENS] == [None] * (len(values) - TOKENS)
    streamed = [value for chunk in chunks for value in chunk.logprobs.token_uncertainty]
    assert [value and value["entropy"] for value in streamed] == pytest.approx(
        [value and value["entropy"] for value in values], abs=1e-4
    )


def test_an_adapter_that_declares_a_threshold_abstains(headed: Headed, client: openai.OpenAI) -> None:
    seen = set()
    for place in range(40):
        got: Any = client.completions.create(
            model="judge", prompt=f"{PROMPT} {place} {'dog ' * place}", max_tokens=1, extra_body={"uncertainty": True}
        )
        said = got.choices[0].uncertainty
        assert said["threshold"] == 0.3
        assert said["abstain"] == (said["score"] > 0.3)
        assert said["calibration"] == {
            "set": "dev-2026-08",
            "n": 2000,
            "ece": 0.03,
            "nll": 0.4,
            "brier": 0.2,
            "miss_rate": 0.1,
        }
        seen.add(said["abstain"])
    assert seen == {True, False}


def test_nothing_is_said_that_was_not_asked(headed: Headed) -> None:
    for given in ({}, {"uncertainty": False}, {"uncertainty": None}):
        response = headed.server.post("/v1/completions", {"model": "dense", "prompt": "a", "logprobs": 1, **given})
        assert "uncertainty" not in response.text
        assert "x-uncertainty-score" not in response.headers


def test_the_header_asks_too(headed: Headed) -> None:
    def ask(header: str | None, **more: Any) -> httpx.Response:
        headers = {} if header is None else {"X-Uncertainty": header}
        body = {"model": "dense", "prompt": PROMPT, "max_tokens": 1, **more}
        return headed.server.http.post("/v1/completions", json=body, headers=headers)

    asked = ask("1")
    said = asked.json()["choices"][0]["uncertainty"]
    headed.check("dense", headed.ids(PROMPT), said)
    assert float(asked.headers["x-uncertainty-score"]) == pytest.approx(said["score"], abs=1e-6)
    assert "x-uncertainty-score" not in ask("1", n=2).headers
    assert "x-uncertainty-score" not in ask("1", stream=True).headers
    assert ask("0").json()["choices"][0].keys() == ask(None).json()["choices"][0].keys()
    assert "uncertainty" not in ask("1", uncertainty=False).json()["choices"][0], "the field goes before the header"
    refused = ask("perhaps")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-uncertainty")
    classified = headed.server.http.post(
        "/v1/classify", json={"model": "dense", "input": PROMPT}, headers={"X-Uncertainty": "1"}
    )
    headed.check("dense", headed.ids(PROMPT), classified.json()["data"][0]["uncertainty"])


UNSUPPORTED: list[tuple[str, dict[str, Any], str, str]] = [
    (PLAIN, {"method": "vbll"}, "uncertainty", "has no head"),
    ("tiny", {"method": "softmax"}, "uncertainty", "has no head"),
    ("softmax", {"method": "vbll"}, "uncertainty", "has a softmax head"),
    ("dense", {"method": "softmax"}, "uncertainty", "has a vbll head"),
    ("dense", {"method": "vbll", "level": ["token"]}, "uncertainty.level", "level 'token'"),
    ("dense", {"method": "vbll", **BOTH}, "uncertainty.level", "level 'token'"),
    (PLAIN, {"samples": 5}, "uncertainty.samples", "samples is 5"),
    ("softmax", {"samples": 5}, "uncertainty.samples", "samples is 5"),
    ("dense", {"samples": 5, "method": "logprob"}, "uncertainty.samples", "samples is 5"),
    ("dense", {"samples": 5, "level": ["token"]}, "uncertainty.samples", "samples is 5"),
]


@pytest.mark.parametrize(("name", "asked", "field", "said"), UNSUPPORTED)
def test_what_the_model_cannot_say(headed: Headed, name: str, asked: dict[str, Any], field: str, said: str) -> None:
    body = {"model": name, "prompt": "a", "max_tokens": 1}
    refused = headed.server.post("/v1/completions", {**body, "uncertainty": asked})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "uncertainty_unsupported", field)
    assert said in error["message"]
    omitted = headed.server.complete(**body, uncertainty={**asked, "on_unsupported": "omit"})
    assert "uncertainty" not in omitted["choices"][0]


IMPOSSIBLE: list[tuple[Any, str]] = [
    ({"method": "ensemble"}, "uncertainty.method"),
    ({"method": "laplace_last_layer"}, "uncertainty.method"),
    ({"method": "probe", "on_unsupported": "omit"}, "uncertainty.method"),
    ({"level": "token"}, "uncertainty.level"),
    ({"level": []}, "uncertainty.level"),
    ({"level": ["word"]}, "uncertainty.level.0"),
    ({"samples": -1}, "uncertainty.samples"),
    ({"samples": 100_001}, "uncertainty.samples"),
    ({"samples": 1.5}, "uncertainty.samples"),
    ({"on_unsupported": "ignore"}, "uncertainty.on_unsupported"),
    ({"invented": 1}, "uncertainty.invented"),
    ("perhaps", "uncertainty"),
]


@pytest.mark.parametrize(("asked", "field"), IMPOSSIBLE)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/classify"])
def test_what_is_no_ask(headed: Headed, path: str, asked: Any, field: str) -> None:
    given = {"/v1/completions": {"prompt": "a"}, "/v1/classify": {"input": "a"}}.get(path, {"messages": MESSAGES})
    refused = headed.server.post(path, {"model": "dense", "uncertainty": asked, **given})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text


def test_no_token_has_no_spread(headed: Headed) -> None:
    for path, given in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        body = {"model": PLAIN, "max_tokens": 0, "uncertainty": True, **given}
        refused = headed.server.post(path, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "uncertainty_unsupported")


def test_too_many_draws_are_refused(headed: Headed) -> None:
    body = {"model": "tenant/diagonal", "prompt": ["a"] * 300, "max_tokens": 1, "uncertainty": {"samples": 100_000}}
    refused = headed.server.post("/v1/completions", body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "uncertainty.samples")
    assert "150,000,000 draws" in error["message"]


def test_classifications_that_cannot_be(headed: Headed) -> None:
    asks: list[tuple[dict[str, Any], int, str]] = [
        ({"model": PLAIN}, 404, "model"),
        ({"model": "tiny"}, 404, "model"),
        ({"model": "nobody"}, 404, "model"),
        ({"input": ["a", ""]}, 400, "input.1"),
        ({"input": ["z" * 5000]}, 400, "input.0"),
        ({"seed": 1}, 400, "seed"),
        ({"seed": 1, "uncertainty": True}, 400, "seed"),
        ({"uncertainty": {"level": ["token"]}}, 400, "uncertainty"),
        ({"uncertainty": {"method": "logprob"}}, 400, "uncertainty"),
    ]
    for change, status, field in asks:
        refused = headed.server.post("/v1/classify", {"model": "dense", "input": "a", **change})
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, field), refused.text
