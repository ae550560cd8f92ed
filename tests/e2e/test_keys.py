"""A server with inference keys and an admin key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.process import ADMIN_KEY, Server

KEYS = ("first-key", "second-key")
MESSAGES: Any = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "api").write_text("\n  ".join(("", *KEYS, "")))
    (folder / "admin").write_text(ADMIN_KEY)
    files = ["--api-key-file", str(folder / "api"), "--admin-key-file", str(folder / "admin")]
    server = Server(["--model", str(tiny_model), "--name", "tiny", *files], folder / "log")
    try:
        yield server.wait_until_ready()
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("key", ["wrong", "first-ke", "first-key\tsecond-key", ""])
def test_no_valid_key(keyed: Server, key: str) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}".strip()}
    asked = [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/v1/classify")]
    asked += [("POST", "/v1/adapters/a/merges"), ("GET", "/v1/adapters/a/merges"), ("GET", "/v1/adapters/a/merges/b")]
    for method, path in (*asked, ("DELETE", "/v1/adapters/a/merges/b"), ("POST", "/v1/decisions")):
        for sent in (headers, {}, {"Authorization": f"Basic {KEYS[0]}"}, {"X-API-Key": KEYS[0]}):
            response = keyed.http.request(method, path, json=body, headers=sent)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_the_openai_client_without_a_valid_key(keyed: Server) -> None:
    with keyed.openai("wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize("key", [*KEYS, ADMIN_KEY])
def test_a_valid_key(keyed: Server, key: str) -> None:
    with keyed.openai(key) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage
        with client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, stream=True) as stream:
            assert list(stream)


@pytest.mark.parametrize("key", [*KEYS, None])
def test_an_inference_key_does_not_administer(keyed: Server, key: str | None) -> None:
    for endpoint, body in (("load", {"lora_name": "x", "lora_path": "x"}), ("unload", {"lora_name": "x"})):
        response = keyed.post(f"/v1/{endpoint}_lora_adapter", body, key)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("key", [*KEYS, None])
def test_an_inference_key_neither_lists_nor_deletes_merges(keyed: Server, key: str | None) -> None:
    """They are everybody's, and their labels may be somebody's; whoever has an id may look it up and use it."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for method, path in (("GET", "/v1/adapters/a/merges"), ("DELETE", "/v1/adapters/a/merges/b")):
        response = keyed.http.request(method, path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        response = keyed.http.request(method, path, headers={"Authorization": f"Bearer {ADMIN_KEY}"})
        assert response.status_code == 404
    response = keyed.http.get("/v1/adapters/a/merges/b", headers=headers)
    assert response.status_code == (401 if key is None else 404)


def test_without_a_root_nothing_is_loaded(keyed: Server, tiny_adapter: Path) -> None:
    response = keyed.load("x", tiny_adapter)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "adapter_path_forbidden")


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
def test_probes_are_open(keyed: Server, path: str) -> None:
    assert keyed.http.get(path).status_code == 200
