"""Every error has one status and one code, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from motet.adapters import errors, source
from motet.adapters.errors import AdapterError
from motet.server.api.errors import ApiError, bad_request, error_body, from_adapter_error, install

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AdapterError)]
OWN_STATUS: dict[type[AdapterError], tuple[int, str]] = {
    errors.AdapterNotFoundError: (404, "model_not_found"),
    errors.SourceNotFoundError: (404, "adapter_source_not_found"),
    errors.UnsafePathError: (403, "adapter_path_forbidden"),
    errors.ForbiddenSourceError: (403, "adapter_source_forbidden"),
    errors.InvalidSourceError: (400, "adapter_source_invalid"),
    errors.SourceUnavailableError: (503, "adapter_source_unavailable"),
    errors.StoreFullError: (507, "adapter_downloads_full"),
    errors.AdapterExistsError: (400, "adapter_exists"),
    errors.SourceChangedError: (409, "adapter_source_changed"),
    errors.VersionNotServedError: (404, "version_not_served"),
    errors.VersionConflictError: (409, "version_conflict"),
    errors.NameBusyError: (423, "publish_in_progress"),
    errors.PublishesFullError: (429, "publishes_full"),
    errors.AdapterFailedError: (503, "adapter_failed"),
    errors.CatalogueError: (503, "catalogue_unavailable"),
    errors.GoldenError: (400, "adapter_golden_mismatch"),
    errors.GateError: (400, "gate_refused"),
    errors.ArenaFullError: (507, "adapter_memory_full"),
    errors.HostFullError: (507, "host_memory_full"),
}


def ask(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def raising(error: Exception) -> httpx.Response:
    app = FastAPI()
    install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    return ask(app, "GET", "/")


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_adapter_error_has_a_status_and_a_code(kind: type[AdapterError]) -> None:
    status, code = OWN_STATUS.get(kind, (400, "adapter_refused"))
    of_field = issubclass(kind, errors.GateError)
    error = kind("gate", "the message") if of_field else kind("the message")
    found = from_adapter_error(error, "lora_path")
    param = "gate" if of_field else "lora_path"
    assert (found.status, found.code, found.param, found.message) == (status, code, param, "the message")
    response = raising(error)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


def test_the_tree_is_complete() -> None:
    assert len(TREE) > 15
    assert OWN_STATUS.keys() <= set(TREE)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (409, "conflict_error"),
        (418, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
        (507, "server_error"),
    ],
)
def test_the_shape_is_openais(status: int, kind: str) -> None:
    response = raising(ApiError(status, "a message", code="a_code", param="a.param"))
    assert response.status_code == status
    assert response.json() == {"error": {"message": "a message", "type": kind, "param": "a.param", "code": "a_code"}}
    assert response.json() == error_body(status, "a message", "a_code", "a.param")


def test_headers() -> None:
    assert raising(ApiError(429, "later", retry_after_s=7)).headers["retry-after"] == "7"
    assert raising(ApiError(401, "who")).headers["www-authenticate"] == "Bearer"
    assert "retry-after" not in raising(bad_request("no")).headers


def test_a_bug_tells_nothing() -> None:
    response = raising(RuntimeError("/srv/secret/path and a key"))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_no_message_of_a_source_carries_a_path_of_the_server(tmp_path: Path) -> None:
    root = tmp_path / "secret-root"
    folder = root / "adapter"
    messages = []

    def attempt(path: Path) -> None:
        with pytest.raises(AdapterError) as error:
            source.read(source.confine(path, [root]))
        messages.append(from_adapter_error(error.value).message)

    root.mkdir()
    for path in (folder, Path("adapter"), Path("/etc/passwd"), Path("../x"), tmp_path):
        attempt(path)
    folder.mkdir()
    attempt(folder)
    config, weights = folder / source.CONFIG_FILE, folder / source.WEIGHTS_FILE
    config.write_text("{")
    attempt(folder)
    for content in (b"", b"x" * 64, (10**6).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        weights.write_bytes(content)
        attempt(folder)
    config.write_text("{}")
    attempt(folder)
    weights.unlink()
    attempt(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    attempt(folder)
    weights.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("x")
    attempt(folder)
    assert len(messages) > 12
    for message in messages:
        assert "secret-root" not in message
        assert str(tmp_path) not in message


class _Inner(BaseModel):
    number: int


class _Asked(BaseModel):
    text: str | list[str] | list[int] = ""
    inner: _Inner | None = None
    several: list[_Inner] = []
    needed: int


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "needed"),
        ({"needed": "x"}, "needed"),
        ({"needed": 1, "text": 5}, "text"),
        ({"needed": 1, "text": {"a": 1}}, "text"),
        ({"needed": 1, "text": [1, None]}, "text.0"),
        ({"needed": 1, "inner": {}}, "inner.number"),
        ({"needed": 1, "inner": {"number": "x"}}, "inner.number"),
        ({"needed": 1, "inner": []}, "inner"),
        ({"needed": 1, "several": [{"number": 1}, {"number": None}]}, "several.1.number"),
        ({"needed": 1, "several": [{"number": 1}, {}]}, "several.1.number"),
        ([], None),
        ("{", None),
        ("17 characters {{{", None),
    ],
)
def test_a_validation_error_names_the_field(body: Any, param: str | None) -> None:
    app = FastAPI()
    install(app)

    @app.post("/")
    async def take(asked: _Asked) -> None:
        raise AssertionError

    content = body if isinstance(body, str) else json.dumps(body)
    response = ask(app, "POST", "/", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, "invalid_request", "invalid_request_error")
