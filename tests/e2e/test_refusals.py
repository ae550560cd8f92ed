"""What cannot be honoured is refused: in OpenAI's shape, naming the field, and never answered by something else."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.process import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES: Any = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
IMAGE = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}]
INVALID, LONG = "invalid_request", "context_length_exceeded"

BOTH: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"temperature": -0.1}, "temperature", INVALID),
    ({"temperature": 101}, "temperature", INVALID),
    ({"temperature": float("nan")}, "temperature", INVALID),
    ({"temperature": "hot"}, "temperature", INVALID),
    ({"top_p": 0}, "top_p", INVALID),
    ({"top_p": 1.1}, "top_p", INVALID),
    ({"top_k": -2}, "top_k", INVALID),
    ({"min_p": 2}, "min_p", INVALID),
    ({"n": 0}, "n", INVALID),
    ({"n": 129}, "n", INVALID),
    ({"presence_penalty": 2.1}, "presence_penalty", INVALID),
    ({"frequency_penalty": -2.1}, "frequency_penalty", INVALID),
    ({"repetition_penalty": 0}, "repetition_penalty", INVALID),
    ({"max_tokens": -1}, "max_tokens", INVALID),
    ({"max_tokens": 10**30}, "max_tokens", LONG),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", None),
    ({"stop": ""}, "stop", None),
    ({"stop": ["a", ""]}, "stop", None),
    ({"stop": ["a"] * 17}, "stop", None),
    ({"stop": 5}, "stop", INVALID),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", INVALID),
    ({"stop_token_ids": [10**6], "min_tokens": 1}, "stop_token_ids", None),
    ({"logit_bias": {"1": 101}}, "logit_bias", None),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias", None),
    ({"logit_bias": {"x": 1}}, "logit_bias", None),
    ({"logit_bias": {"-1": 1}}, "logit_bias", None),
    ({"logit_bias": {"1000000": 1}}, "logit_bias", None),
    ({"response_format": {"type": "json_object"}}, "response_format.type", INVALID),
    ({"response_format": SCHEMA}, "response_format.type", INVALID),
    ({"store": True}, "store", INVALID),
    ({"invented": 1}, "invented", INVALID),
    ({"guided_json": {}}, "guided_json", INVALID),
    ({"\ud800": 1}, None, INVALID),
    ({"logit_bias": {"\ud800": 1}}, "logit_bias", None),
    ({"stream": "perhaps"}, "stream", INVALID),
    ({"stream_options": {"include_everything": True}}, "stream_options.include_everything", INVALID),
    ({"model": None}, "model", INVALID),
    ({"model": ""}, "model", INVALID),
    ({"model": "\ud800"}, "model", INVALID),
]
ONLY_COMPLETIONS: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"prompt": ""}, "prompt", None),
    ({"prompt": []}, "prompt", None),
    ({"prompt": [[]]}, "prompt", None),
    ({"prompt": ["a", ""]}, "prompt", None),
    ({"prompt": 5}, "prompt", INVALID),
    ({"prompt": None}, "prompt", INVALID),
    ({"prompt": {"text": "a"}}, "prompt", INVALID),
    ({"prompt": [-1]}, "prompt.0", INVALID),
    ({"prompt": [10**6]}, "prompt", None),
    ({"prompt": [2**80]}, "prompt", None),
    ({"prompt": "half of a pair: \ud83d"}, "prompt", INVALID),
    ({"prompt": ["a"] * 1025}, "n", None),
    ({"prompt": ["a"] * 9, "n": 128}, "n", None),
    ({"prompt": [5] * 2048}, "prompt", LONG),
    ({"prompt": [5] * 2000, "max_tokens": 49}, "max_tokens", LONG),
    ({"logprobs": 21}, "logprobs", INVALID),
    ({"best_of": 2}, "best_of", None),
    ({"best_of": 3, "n": 2}, "best_of", None),
    ({"suffix": "and so on"}, "suffix", INVALID),
    ({"messages": MESSAGES}, "messages", INVALID),
]
ONLY_CHAT: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"messages": []}, "messages", INVALID),
    ({"messages": None}, "messages", INVALID),
    ({"messages": [{"content": "a"}]}, "messages.0.role", INVALID),
    ({"messages": [*MESSAGES, {"role": "user", "content": 5}]}, "messages.1.content", INVALID),
    ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content.1.type", INVALID),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", INVALID),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages.0.tool_calls", INVALID),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", None),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt", LONG),
    ({"max_completion_tokens": 2040}, "max_tokens", LONG),
    ({"tools": [TOOL]}, "tools", INVALID),
    ({"tool_choice": "required"}, "tool_choice", INVALID),
    ({"functions": []}, "functions", INVALID),
    ({"top_logprobs": 2}, "top_logprobs", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", INVALID),
    ({"modalities": ["audio"]}, "modalities.0", INVALID),
    ({"continue_final_message": True}, "continue_final_message", None),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", None),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", None),
    ({"chat_template_kwargs": {"padding": "max_length", "max_length": 10**9}}, "chat_template_kwargs", None),
    ({"chat_template_kwargs": {"truncation": True, "max_length": 1}}, "chat_template_kwargs", None),
    ({"prompt": "a"}, "prompt", INVALID),
]
CASES = [
    *((COMPLETIONS, *case) for case in BOTH + ONLY_COMPLETIONS),
    *((CHAT, *case) for case in BOTH + ONLY_CHAT),
]


def body_for(path: str, change: dict[str, Any], model: str = "tiny") -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": MESSAGES}
    return {"model": model, "max_tokens": 2, **asked, **change}


def post(server: Server, path: str, body: Any) -> Any:
    """Also sends what httpx would refuse to encode: NaN and halves of surrogate pairs."""
    content = json.dumps(body).encode()
    return server.http.post(path, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(("path", "change", "param", "code"), CASES, ids=lambda value: str(value)[:60])
def test_a_bad_request_names_its_field(
    tiny_server: Server, path: str, change: dict[str, Any], param: str | None, code: str | None
) -> None:
    response = post(tiny_server, path, body_for(path, change))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error["message"]
    assert error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_never_answered_by_the_base(tiny_server: Server, path: str, stream: bool) -> None:
    for name in ("nobody", "Tiny", "tiny ", "tuned/x", "gpt-4o"):
        response = post(tiny_server, path, body_for(path, {"stream": stream}, name))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert repr(name) in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("content", [b"", b"{", b'{"model": "tiny", ', b"\xff", b"[]", b"null", b"[" * 100_000])
def test_malformed_json(tiny_server: Server, path: str, content: bytes) -> None:
    response = tiny_server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None), error


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize("content", [b"[]", b'{"nonsense": 1}'])
def test_the_key_is_asked_for_before_the_body_is_judged(tiny_server: Server, path: str, content: bytes) -> None:
    response = tiny_server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_closed")


def test_a_body_of_another_type(tiny_server: Server) -> None:
    response = tiny_server.http.post(COMPLETIONS, data={"model": "tiny", "prompt": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "not_found_error"),
        ("GET", "/v1/models/nobody", 404, "not_found_error"),
        ("GET", COMPLETIONS, 405, "invalid_request_error"),
        ("POST", "/health", 405, "invalid_request_error"),
    ],
)
def test_places_that_are_not(tiny_server: Server, method: str, path: str, status: int, kind: str) -> None:
    response = tiny_server.http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == kind
    assert error["message"]


def test_the_openai_client_raises_its_own_classes(tiny_server: Server) -> None:
    with tiny_server.openai() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="tiny", prompt="a", max_tokens=4000)
        assert (bad.value.status_code, bad.value.code, bad.value.param) == (400, LONG, "max_tokens")
        assert bad.value.type == "invalid_request_error"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="nobody", messages=MESSAGES, stream=True)
        assert (unknown.value.status_code, unknown.value.code) == (404, "model_not_found")


def test_a_server_without_an_admin_key_is_closed_to_administration(tiny_server: Server, tiny_adapter: Any) -> None:
    for key in (None, "a guess"):
        for endpoint, body in (
            ("load", {"lora_name": "x", "lora_path": str(tiny_adapter)}),
            ("unload", {"lora_name": "tuned"}),
        ):
            response = tiny_server.post(f"/v1/{endpoint}_lora_adapter", body, key)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_closed")
    assert set(tiny_server.models) == {"tiny", "tuned"}


def test_after_all_refusals_nothing_is_held(tiny_server: Server) -> None:
    tiny_server.wait_until_idle(5)
    assert tiny_server.complete(**body_for(COMPLETIONS, {"ignore_eos": True}))["usage"]["completion_tokens"] == 2
