"""Every response says which version served it, and a request may ask for one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server.api.rig import Running, during

CHOICES = [{"value": "a"}, {"value": "b"}]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "abc"}], "prompt": None}


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_in_the_body_or_every_chunk_and_in_the_header(adapter: Path, endpoint: str, stream: bool) -> None:
    async def scenario(running: Running) -> None:
        digest = running.registry.get("adapted").version.digest
        input_: dict[str, Any] = {"prompt": "abc"} if endpoint == "completions" else {"messages": CHAT["messages"]}
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        for asked in ("adapted", f"adapted@{digest[:12]}", f"adapted@{digest}"):
            body = {"model": asked, "max_tokens": 3, **input_, **more}
            response = await running.client.post(f"/v1/{endpoint}", json=body)
            assert response.status_code == 200, response.text
            assert response.headers["x-motet-adapter"] == f"adapted@{digest}"
            found = events(response.text) if stream else [response.json()]
            assert len(found) > (3 if stream else 0)
            for one in found:
                assert one["adapter"] == {"name": "adapted", "version": digest}
                assert one["model"] == asked
                assert digest[:12] in one["system_fingerprint"]
        base = await running.client.post(f"/v1/{endpoint}", json={"model": "base", "max_tokens": 3, **input_})
        assert "adapter" not in base.json()
        assert "x-motet-adapter" not in base.headers

    during(adapter, scenario)


def test_a_mixture_names_all(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        version = running.registry.load("second", adapter).version
        parts = [{"name": name, "weight": 1} for name in ("adapted", f"second@{version.digest[:12]}")]
        response = await running.post(model="base", adapters=parts)
        assert response.json()["adapters"] == [
            {"name": "adapted", "version": version.digest},
            {"name": "second", "version": version.digest},
        ]
        assert response.headers["x-motet-adapter"] == f"adapted@{version.digest}, second@{version.digest}"

    during(adapter, scenario)


@pytest.mark.parametrize("endpoint", ["decisions", "completions", "classify"])
def test_a_version_that_is_not_served_is_not_found(adapter: Path, endpoint: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "decisions": {"input": "x", "questions": [{"type": "choice", "instructions": "?", "choices": CHOICES}]},
        "completions": {"prompt": "abc"},
        "classify": {"input": "x"},
    }

    async def scenario(running: Running) -> None:
        old = running.registry.get("adapted").version.digest
        other = shutil.copytree(adapter, adapter.parent / "other")
        file = other / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 2}))
        running.registry.load("adapted", other, replace=True)
        for asked, code in ((f"adapted@{old}", "version_not_served"), (f"nobody@{old}", "model_not_found")):
            response = await running.client.post(f"/v1/{endpoint}", json={"model": asked, **bodies[endpoint]})
            assert response.status_code == 404, response.text
            assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, "model")
        assert running.runner.versions == set()

    during(adapter, scenario)
