"""/v1/adapters: what it says, on which terms it changes, whom it refuses. A runner of our own computes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from motet.adapters.catalogue import Act
from motet.adapters.golden import GOLDEN_FILE
from motet.adapters.origin import Origin
from motet.adapters.version import Digest
from tests.unit.server.api.rig import ADMIN_KEY, BODY, Running, during, logprob_of

ACTOR = f"key-{hashlib.sha256(ADMIN_KEY.encode()).hexdigest()[:12]}"


@pytest.fixture(autouse=True)
def other(adapter: Path) -> Path:
    """A second source, "other", beside the one of "adapted"."""
    folder = shutil.copytree(adapter, adapter.parent / "other")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 2}))
    return folder


async def put(running: Running, name: str, source: str, headers: Any = None, **more: Any) -> httpx.Response:
    return await running.administer("PUT", f"/v1/adapters/{name}", headers, source=source, **more)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_what_is_published_is_listed_with_its_receipt(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        response = await put(running, "tenant/a:1", "other", pin=True, quota={"weight": 2, "tokens_per_minute": 60})
        card = response.json()
        digest = card["version"]
        assert (response.status_code, response.headers["etag"]) == (200, f'"{digest}"')
        assert digest == running.registry.get("tenant/a:1").version.digest
        assert {
            key: card[key] for key in ("name", "state", "error", "method", "rank", "exact", "leases", "pinned")
        } == {
            "name": "tenant/a:1",
            "state": "ready",
            "error": None,
            "method": "lora",
            "rank": 1,
            "exact": True,
            "leases": 0,
            "pinned": True,
        }
        assert card["quota"] == {"weight": 2, "tokens_per_minute": 60}
        assert (card["bytes"]["device"], card["bytes"]["disk"]) == (32, 0), "A [1, 4] and B [4, 1] in float32; no cache"
        assert card["bytes"]["host"] >= 32
        assert [(one["version"], one["leases"]) for one in card["versions"]] == [(digest, 0)]
        assert card["receipt"]["digest"] == digest
        assert card["receipt"]["relative_norms"]["q_proj"] == pytest.approx(2 * 4), "the rig's base has a norm of one"
        one = await running.administer("GET", "/v1/adapters/tenant/a:1")
        assert (one.json(), one.headers["etag"]) == (card, f'"{digest}"')
        listed = (await running.administer("GET", "/v1/adapters")).json()
        assert [entry["name"] for entry in listed["data"]] == ["adapted", "tenant/a:1"]
        assert listed["data"][1] == {key: value for key, value in card.items() if key != "receipt"}
        assert card["last_used_at"] is None
        await running.post(model="tenant/a:1")
        used = (await running.administer("GET", "/v1/adapters/tenant/a:1")).json()["last_used_at"]
        assert used >= card["versions"][0]["published_at"] > 1.7e9

    during(adapter, scenario)


def test_conditions(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        assert (await put(running, "fr", "adapter", {"If-None-Match": "*"})).status_code == 200
        first = running.registry.get("fr").version.digest
        refusal = await put(running, "fr", "other", {"If-None-Match": "*"})
        assert code(refusal) == (409, "version_conflict")
        assert "If-None-Match" in refusal.json()["error"]["message"]
        second = (await put(running, "fr", "other", {"If-Match": f'"{first}"'})).json()["version"]
        assert second != first
        for method, path, body in (
            ("PUT", "/adapters/fr", {"source": "adapter"}),
            ("POST", "/adapters/fr/rollback", {}),
            ("DELETE", "/adapters/fr", {}),
        ):
            response = await running.administer(method, f"/v1{path}", {"If-Match": f'"{first}"'}, **body)
            assert code(response) == (409, "version_conflict"), method
            assert second in response.json()["error"]["message"]
        assert code(await put(running, "new", "other", {"If-Match": "*"})) == (404, "model_not_found")
        assert (await put(running, "fr", "adapter", {"If-Match": "*"})).json()["version"] == first
        assert (await running.administer("DELETE", "/v1/adapters/fr", {"If-Match": first})).status_code == 200

    during(adapter, scenario)


@pytest.mark.parametrize(
    "headers",
    [
        {"If-Match": '"abc"'},
        {"If-Match": ""},
        {"If-Match": f'W/"{"a" * 64}"'},
        {"If-Match": f'"{"a" * 64}", "{"b" * 64}"'},
        {"If-None-Match": f'"{"a" * 64}"'},
        {"If-None-Match": "*", "If-Match": "*"},
    ],
)
def test_a_condition_that_is_not_honoured_is_refused(adapter: Path, headers: dict[str, str]) -> None:
    async def scenario(running: Running) -> None:
        response = await put(running, "fr", "other", headers)
        assert (response.status_code, response.json()["error"]["param"]) in {(400, "If-Match"), (400, "If-None-Match")}
        assert len(running.registry.published()) == 1

    during(adapter, scenario)


def test_a_promised_digest(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        digest = running.registry.get("adapted").version.digest
        assert code(await put(running, "fr", "other", sha256=digest)) == (409, "adapter_source_changed")
        assert (await put(running, "fr", "adapter", sha256=digest)).json()["version"] == digest

    during(adapter, scenario)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sha256": "abc"},
        {"sha256": "A" * 64},
        {"source": ""},
        {"quota": {"weight": 0}},
        {"quota": {"requests_per_minute": -1}},
        {"quota": {"per_hour": 1}},
        {"pin": "maybe"},
        {"approximate": "2bit"},
        {"unknown": 1},
    ],
)
def test_a_wrong_body_is_refused_by_field(adapter: Path, wrong: dict[str, Any]) -> None:
    async def scenario(running: Running) -> None:
        response = await put(running, "fr", **{"source": "other", **wrong})
        assert response.status_code == 400
        assert next(iter(wrong)) in response.json()["error"]["message"]
        assert len(running.registry.published()) == 1

    during(adapter, scenario)


def test_rollback(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        first = running.registry.get("adapted").version.digest
        assert code(await running.administer("POST", "/v1/adapters/adapted/rollback")) == (404, "model_not_found")
        second = (await put(running, "adapted", "other")).json()["version"]
        back = await running.administer("POST", "/v1/adapters/adapted/rollback", {"If-Match": second})
        assert (back.status_code, back.json()["version"], back.headers["etag"]) == (200, first, f'"{first}"')
        assert [one["version"] for one in back.json()["versions"]] == [first, second]
        again = await running.administer("POST", "/v1/adapters/adapted/rollback", version=second[:12])
        assert again.json()["receipt"]["digest"] == second
        for wrong in ("abc", "z" * 12, "a" * 65):
            assert (await running.administer("POST", "/v1/adapters/adapted/rollback", version=wrong)).status_code == 400
        shutil.rmtree(adapter)
        assert code(await running.administer("POST", "/v1/adapters/adapted/rollback"))[0] == 404
        assert running.registry.get("adapted").version.digest == second

    during(adapter, scenario)


def test_a_removed_name_drains(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        running.runner.steps_before_waiting = 2
        answer = asyncio.create_task(running.post())
        await running.eventually(lambda: running.registry.get("adapted").leases == 1)
        gone = (await running.administer("DELETE", "/v1/adapters/adapted")).json()
        assert (gone["name"], gone["leases"]) == ("adapted", 1)
        assert (await running.post()).status_code == 404
        card = (await running.administer("GET", "/v1/adapters")).json()["data"][0]
        assert (card["name"], card["state"], card["leases"], card["version"]) == ("adapted", "draining", 1, None)
        assert card["versions"] == [{"version": gone["version"], "published_at": None, "leases": 1}]
        running.runner.go_on.set()
        assert (await answer).json()["adapter"] == {"name": "adapted", "version": gone["version"]}
        await running.eventually(lambda: running.registry.standings() == [])
        assert code(await running.administer("DELETE", "/v1/adapters/adapted")) == (404, "model_not_found")

    during(adapter, scenario)


def test_a_removal_may_wait_until_the_name_has_drained(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        running.runner.steps_before_waiting = 2
        answer = asyncio.create_task(running.post())
        await running.eventually(lambda: running.registry.get("adapted").leases == 1)
        removal = asyncio.create_task(running.administer("DELETE", "/v1/adapters/adapted?wait_s=20"))
        await running.eventually(lambda: running.registry.published() == [])
        assert not removal.done()
        running.runner.go_on.set()
        assert (await removal).json()["leases"] == 0
        assert (await answer).status_code == 200
        for wait_s in ("-1", "601", "soon"):
            assert (await running.administer("DELETE", f"/v1/adapters/adapted?wait_s={wait_s}")).status_code == 400

    during(adapter, scenario)


def test_who_is_at_it_already_is_not_disturbed(adapter: Path, other: Path) -> None:
    """The check of the golden values waits for the engine, and the engine for us."""
    golden = {"tolerance": 0.5, "prompts": [{"tokens": [1, 2], "logprobs": [logprob_of(2)]}]}
    (other / GOLDEN_FILE).write_text(json.dumps(golden))

    async def scenario(running: Running) -> None:
        running.runner.steps_before_waiting = 0
        first = asyncio.create_task(put(running, "fr", "other"))
        second = asyncio.create_task(put(running, "de", "other"))
        await running.eventually(lambda: running.scheduler.running + running.scheduler.waiting >= 1)
        await running.eventually(lambda: len(running.registry.standings()) == 3)
        states = {one["name"]: one["state"] for one in (await running.administer("GET", "/v1/adapters")).json()["data"]}
        assert states == {"adapted": "ready", "fr": "loading", "de": "loading"}
        for method in ("PUT", "DELETE"):
            body = {"source": "adapter"} if method == "PUT" else {}
            assert code(await running.administer(method, "/v1/adapters/fr", **body)) == (423, "publish_in_progress")
        full = await put(running, "it", "adapter")
        assert code(full) == (429, "publishes_full")
        assert int(full.headers["retry-after"]) > 0
        running.runner.go_on.set()
        assert [(await one).status_code for one in (first, second)] == [200, 200]
        assert (await put(running, "it", "adapter")).status_code == 200

    during(adapter, scenario)


def test_a_name_that_failed_is_listed_and_answers_503(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        act = Act("start", "publish", "lost")
        running.registry.catalogue.publish(act, Digest("a" * 64), Origin("absent"), False, {})
        running.registry.restore(lambda name: None, besides={"adapted"})
        card = (await running.administer("GET", "/v1/adapters/lost")).json()
        assert (card["state"], card["version"], card["receipt"]) == ("failed", "a" * 64, None)
        assert "'absent' is below none of the adapter roots" in card["error"]
        for response in (await running.post(model="lost"), await running.client.get("/v1/models/lost")):
            assert code(response) == (503, "adapter_failed")
            assert card["error"] in response.json()["error"]["message"]
        assert running.runner.versions == set(), "nothing was computed, with the base least of all"
        assert "lost" not in (await running.client.get("/v1/models")).text

    during(adapter, scenario)


def test_the_audit_trail(adapter: Path) -> None:
    async def scenario(running: Running) -> None:
        digest = (await put(running, "fr", "other")).json()["version"]
        await running.administer("POST", "/v1/unload_lora_adapter", lora_name="fr")
        await running.administer("POST", "/v1/load_lora_adapter", lora_name="fr", lora_path="absent")
        response = await running.administer("GET", "/v1/audit")
        lines = response.json()["data"]
        said = [(line["actor"], line["action"], line["name"], line["old"], line["new"]) for line in lines]
        assert said[:3] == [
            (ACTOR, "publish", "fr", None, None),
            (ACTOR, "delete", "fr", digest, None),
            (ACTOR, "publish", "fr", None, digest),
        ]
        assert said[3][:3] == ("start", "publish", "adapted")
        assert [line["outcome"] for line in lines[1:]] == ["done"] * 3
        assert "absent" in lines[0]["outcome"]
        assert ADMIN_KEY not in response.text
        page = (await running.administer("GET", f"/v1/audit?limit=2&before={lines[0]['id']}")).json()["data"]
        assert page == lines[1:3]
        for query in ("limit=0", "limit=1001", "before=0", "before=x"):
            assert (await running.administer("GET", f"/v1/audit?{query}")).status_code == 400

    during(adapter, scenario)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters"),
        ("GET", "/v1/adapters/adapted"),
        ("PUT", "/v1/adapters/adapted"),
        ("DELETE", "/v1/adapters/adapted"),
        ("POST", "/v1/adapters/adapted/rollback"),
        ("GET", "/v1/audit"),
    ],
)
def test_everything_here_needs_the_admin_key(adapter: Path, method: str, path: str) -> None:
    async def scenario(running: Running) -> None:
        body = {"source": "other"} if method == "PUT" else None
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            response = await running.client.request(method, path, json=body, headers=headers)
            assert code(response) == (401, "invalid_api_key")
        assert (await running.post()).json()["adapter"]["name"] == BODY["model"]

    during(adapter, scenario)
