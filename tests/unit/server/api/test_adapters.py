"""Administration: what is declared at a load, and reading back what is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from motet.adapters import source
from motet.adapters.lowered_file import dump, parse
from motet.adapters.methods import lower
from tests.unit.server.api.rig import Running, during

LOAD: dict[str, Any] = {"lora_name": "late", "lora_path": "adapter"}


def test_what_is_served_can_be_read_back(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        response = await running.administer("GET", "/v1/adapters/adapted/lowered")
        assert response.status_code == 200
        version = running.registry.get("adapted").version
        assert response.headers["x-motet-adapter"] == f"adapted@{version.digest}"
        expected = lower(source.read(adapter), running.registry.base)
        assert response.content == dump(expected)
        assert list(parse(response.content).effects) == ["q_proj"]

    during(adapter, scenario)


def test_a_name_with_slashes(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        await running.administer("POST", "/v1/load_lora_adapter", **{**LOAD, "lora_name": "tenant/lowered/a:1"})
        response = await running.administer("GET", "/v1/adapters/tenant/lowered/a:1/lowered")
        assert response.headers["x-motet-adapter"].startswith("tenant/lowered/a:1@")

    during(adapter, scenario)


def test_a_source_that_changed_is_a_conflict_of_two_digests(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 2}))
        response = await running.administer("GET", "/v1/adapters/adapted/lowered")
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (409, "adapter_source_changed")
        for digest in (running.registry.get("adapted").version.digest, source.read(adapter).digest):
            assert digest in error["message"]

    during(adapter, scenario)


def test_the_base_as_adapters_see_it(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        assert (await running.administer("GET", "/v1/base")).json() == {
            "name": "base",
            "fingerprint": "0" * 64,
            "dtype": "float32",
            "weights": "exact",
            "targets": ["q_proj"],
            "other_modules": [],
            "embedding": None,
        }

    during(adapter, scenario)


@pytest.mark.parametrize("path", ["/v1/base", "/v1/adapters/adapted/lowered"])
def test_reading_needs_the_admin_key(adapter: Path, path: str) -> None:
    async def scenario(running: Running) -> None:
        assert (await running.client.get(path)).status_code == 401

    during(adapter, scenario)


def test_what_is_not_loaded_cannot_be_read(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        response = await running.administer("GET", "/v1/adapters/nobody/lowered")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")

    during(adapter, scenario)


def test_declarations_are_part_of_the_version(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        for name, declared in (("plain", {}), ("declared", {"trained_on_base": True})):
            response = await running.administer(
                "POST", "/v1/load_lora_adapter", **{**LOAD, "lora_name": name, **declared}
            )
            assert response.status_code == 200, response.text
        digests = {name: running.registry.get(name).version.digest for name in ("adapted", "plain", "declared")}
        assert digests["plain"] == digests["adapted"] != digests["declared"]

    during(adapter, scenario)


@pytest.mark.parametrize("key", ["initial_path", "residual_path"])
def test_declared_folders_are_confined_too(adapter: Path, tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    outside = shutil.copytree(adapter, tmp_path_factory.mktemp("outside") / "adapter")

    async def scenario(running: Running) -> None:
        for path, status in ((str(outside), 403), ("../elsewhere", 403), ("nothing", 404), ("", 400)):
            response = await running.administer("POST", "/v1/load_lora_adapter", **LOAD, **{key: path})
            assert response.status_code == status, (path, response.text)
            assert str(adapter.parent) not in response.text
        assert [info.version.name for info in running.registry.published()] == ["adapted"]

    during(adapter, scenario)


def test_a_contradiction_is_refused(adapter: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "first")

    async def scenario(running: Running) -> None:
        body = {**LOAD, "initial_path": "first", "trained_on_base": True}
        response = await running.administer("POST", "/v1/load_lora_adapter", **body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_refused")
        assert "trained_on_base contradicts" in response.json()["error"]["message"]

    during(adapter, scenario)
