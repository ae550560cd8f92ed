"""Adapters come and go while the server runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.process import ADMIN_KEY, Server, eventually

PROMPT = "Write one sentence about the sea.\n"
NAME = "late"


@pytest.fixture(autouse=True)
def leaves_nothing_behind(server: Server) -> Iterator[None]:
    """Whatever a test loads, afterwards the models and the memory are as before."""
    models, used = set(server.models), server.metrics["motet_adapter_memory_bytes"]
    yield
    if NAME in server.models:
        server.unload(NAME)
    assert set(server.models) == models
    eventually(lambda: server.metrics["motet_adapter_memory_bytes"] == used)


def text(server: Server, model: str, tokens: int = 8) -> str:
    answer = server.complete(model=model, prompt=PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
    said: str = answer["choices"][0]["text"]
    return said


def test_a_loaded_adapter_answers_until_it_is_unloaded(server: Server, adapter_root: Path) -> None:
    before = server.metrics
    response = server.load(NAME, adapter_root / "random-c")
    assert (response.status_code, response.text) == (200, f"Success: LoRA adapter '{NAME}' added successfully.")
    assert response.headers["content-type"].startswith("text/plain")
    model = server.models[NAME]
    assert (model["parent"], model["root"], model["adapter"]["rank"]) == (server.base, NAME, 16)
    assert server.metrics["motet_adapter_memory_bytes"] == (
        before["motet_adapter_memory_bytes"] + model["adapter"]["bytes"]
    )
    assert server.metrics["motet_adapters_resident"] == before["motet_adapters_resident"] + 1
    assert text(server, NAME) not in {text(server, server.base), text(server, "tenant/a")}

    response = server.unload(NAME)
    assert (response.status_code, response.text) == (200, f"Success: LoRA adapter '{NAME}' removed successfully.")
    with server.openai() as client:
        with pytest.raises(openai.NotFoundError) as refusal:
            client.completions.create(model=NAME, prompt=PROMPT)
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(NAME)


def test_a_path_below_a_root_may_be_relative(server: Server) -> None:
    assert server.load(NAME, "random-b").status_code == 200
    assert text(server, NAME) == text(server, "tenant/b")


def test_a_name_is_loaded_once(server: Server, adapter_root: Path) -> None:
    assert server.load(NAME, adapter_root / "random-c").status_code == 200
    version = server.models[NAME]["adapter"]["version"]
    again = server.load(NAME, adapter_root / "random-a")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "adapter_exists")
    assert server.models[NAME]["adapter"]["version"] == version


def test_load_inplace_moves_the_name_and_running_requests_stay(server: Server, adapter_root: Path) -> None:
    assert server.load(NAME, adapter_root / "random-a").status_code == 200
    old, old_bytes = text(server, NAME, 24), server.metrics["motet_adapter_memory_bytes"]
    with (
        server.openai() as client,
        client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
        ) as stream,
    ):
        pieces = [next(stream).choices[0].text]
        assert server.load(NAME, adapter_root / "random-b", load_inplace=True).status_code == 200
        assert server.metrics["motet_running"] == 1, "the replacement came too late to say anything"
        assert server.metrics["motet_adapter_memory_bytes"] > old_bytes, "both versions are needed"
        assert text(server, NAME) == text(server, "tenant/b")
        pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == old
    assert server.models[NAME]["adapter"]["version"] == server.models["tenant/b"]["adapter"]["version"]


def test_unloading_waits_for_running_requests(server: Server, adapter_root: Path) -> None:
    assert server.load(NAME, adapter_root / "random-c").status_code == 200
    whole, loaded = text(server, NAME, 24), server.metrics["motet_adapter_memory_bytes"]
    size = server.models[NAME]["adapter"]["bytes"]
    with (
        server.openai() as client,
        client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
        ) as stream,
    ):
        pieces = [next(stream).choices[0].text]
        assert server.unload(NAME).status_code == 200
        assert NAME not in server.models
        assert server.post("/v1/completions", {"model": NAME, "prompt": "a"}).status_code == 404
        now = server.metrics
        assert (now["motet_running"], now["motet_adapter_memory_bytes"]) == (1, loaded)
        pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == whole
    eventually(lambda: server.metrics["motet_adapter_memory_bytes"] == loaded - size)


def test_unloading_what_is_not_loaded(server: Server) -> None:
    response = server.unload("nobody")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("key", [None, "wrong", ADMIN_KEY + "x", ADMIN_KEY[:-1]])
@pytest.mark.parametrize("endpoint", ["load", "unload"])
def test_administration_needs_the_admin_key(server: Server, adapter_root: Path, key: str | None, endpoint: str) -> None:
    body = {"lora_name": "tenant/a"}
    if endpoint == "load":
        body = {"lora_name": NAME, "lora_path": str(adapter_root / "random-c")}
    response = server.post(f"/v1/{endpoint}_lora_adapter", body, key)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def refused(server: Server, path: Path | str, status: int, code: str | None) -> str:
    """The message, after checking that nothing of the adapter became visible."""
    used = server.metrics["motet_adapter_memory_bytes"]
    response = server.load(NAME, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert NAME not in server.models
    assert server.post("/v1/completions", {"model": NAME, "prompt": "a"}).status_code == 404
    assert server.metrics["motet_adapter_memory_bytes"] == used
    message: str = error["message"]
    return message


def test_a_path_outside_the_roots_is_forbidden(server: Server, adapter_root: Path, tmp_path: Path) -> None:
    outside = shutil.copytree(adapter_root / "random-c", tmp_path / "outside")
    link = adapter_root / "link"
    link.symlink_to(outside)
    try:
        for path in (outside, "../outside", link, adapter_root / ".." / "outside", "/etc", "/does/not/exist"):
            message = refused(server, path, 403, "adapter_path_forbidden")
            assert str(adapter_root) not in message
    finally:
        link.unlink()


def test_a_path_where_nothing_is(server: Server, adapter_root: Path) -> None:
    for path in ("nothing", adapter_root / "nothing", adapter_root):
        message = refused(server, path, 404, "adapter_source_not_found")
        assert str(adapter_root) not in message


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "a/" * 5000], ids=["a zero byte", "a long name", "a long path"])
def test_a_path_that_cannot_be_one(server: Server, path: str) -> None:
    refused(server, path, 404, "adapter_source_not_found")


CORRUPT: dict[str, Callable[[Path], object]] = {
    "a truncated file": lambda folder: _cut(folder / "adapter_model.safetensors"),
    "not safetensors": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no tensors in here at all"),
    "a pickle": lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    "no JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "an unknown key": lambda folder: _configure(folder, "invented_by_someone", 1),
    "another rank": lambda folder: _configure(folder, "r", 5),
    "another method": lambda folder: _configure(folder, "peft_type", "LOHA"),
}


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _configure(folder: Path, key: str, value: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


@pytest.mark.parametrize("fault", CORRUPT)
def test_a_corrupt_adapter_is_refused_whole(server: Server, adapter_root: Path, fault: str) -> None:
    folder = shutil.copytree(adapter_root / "random-c", adapter_root / "corrupt")
    try:
        CORRUPT[fault](folder)
        message = refused(server, folder, 400, "adapter_refused")
    finally:
        shutil.rmtree(folder)
    assert str(adapter_root) not in message


@pytest.mark.parametrize("name", ["a b", "../x", "ä", "x" * 129])
def test_names_that_adapters_may_not_have(server: Server, adapter_root: Path, name: str) -> None:
    response = server.load(name, adapter_root / "random-c")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_refused")
    assert name not in server.models


def test_the_base_keeps_its_name(server: Server, adapter_root: Path) -> None:
    response = server.load(server.base, adapter_root / "random-c", load_inplace=True)
    assert response.status_code == 400
    assert server.models[server.base]["parent"] is None


def test_a_refused_request_leaves_no_lease(server: Server, adapter_root: Path) -> None:
    """A lease that nobody ends would keep the adapter's memory for ever."""
    used = server.metrics["motet_adapter_memory_bytes"]
    assert server.load(NAME, adapter_root / "random-c").status_code == 200
    for fault in ({"stop": ""}, {"stop": ["a"] * 99}, {"logit_bias": {"x": 1}}, {"max_tokens": 10**6}, {"n": 0}):
        response = server.post("/v1/completions", {"model": NAME, "prompt": "a", "stream": True, **fault})
        assert response.status_code == 400, fault
    assert server.unload(NAME).status_code == 200
    assert server.metrics["motet_adapter_memory_bytes"] == used


def test_the_admin_key_opens_inference_too(server: Server) -> None:
    with server.openai(ADMIN_KEY) as client:
        assert client.completions.create(model="tenant/a", prompt="a", max_tokens=1).usage
