"""What is let in: never more than may wait, never more than a quota has, and all is given back however it ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from motet.server.api.errors import ApiError
from motet.server.api.keys import ANYONE, Keys
from motet.server.api.quotas import Quota
from motet.server.engine.scheduler import StepLimits
from tests.unit.server.api.rig import BODY, Running, during

ONE_AT_A_TIME = StepLimits(64, 1)


def test_the_bound_of_the_queue_holds_for_requests_that_come_at_once(adapter: Path) -> None:
    """Before the engine has seen any of them: one runs, three may wait."""

    async def scenario(started: Running) -> None:
        started.runner.steps_before_waiting = 0
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(started.post(max_tokens=2)) for _ in range(10)]
            await started.eventually(lambda: sum(task.done() for task in asked) == 6)
            await started.eventually(lambda: (started.scheduler.running, started.service.engine.queued) == (1, 3))
            started.runner.go_on.set()
        statuses = [task.result().status_code for task in asked]
        assert statuses == [200] * 4 + [429] * 6
        await started.nothing_is_held()

    during(adapter, scenario, limits=ONE_AT_A_TIME, max_waiting=3)


def test_a_request_is_let_in_with_all_its_generations_or_not_at_all(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.steps_before_waiting = 0
        async with asyncio.TaskGroup() as group:
            many = group.create_task(started.post(prompt=["a", "b"], n=2))
            await started.eventually(lambda: started.service.engine.queued == 3)
            refusal = await started.post(n=2)
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "queue_full")
            never = await started.post(n=6)
            assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
            assert "retry-after" not in never.headers
            one = group.create_task(started.post())
            await started.eventually(lambda: started.service.engine.queued == 4)
            started.runner.go_on.set()
        assert (many.result().status_code, one.result().status_code) == (200, 200)

    during(adapter, scenario, limits=ONE_AT_A_TIME, max_waiting=4)


def test_retry_after_tells_how_fast_the_latest_were(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        admission = started.service.admission
        now_s = 100.0
        admission.clock = lambda: now_s
        assert admission._until_free(5) == 1, "nothing is known yet"
        for _ in range(5):
            now_s += 2
            admission._ends.append((now_s, 1))
        assert admission._until_free(5) == 10
        assert admission._until_free(1000) == 60

    during(adapter, scenario)


QUOTAS: dict[str, tuple[Quota, int]] = {
    "requests": (Quota(requests_per_minute=1), 60),
    "tokens": (Quota(tokens_per_minute=10), 3),  # three tokens of the prompt and four drawn, twice: four are missing
}


@pytest.mark.parametrize("of_key", [False, True])
@pytest.mark.parametrize("case", QUOTAS)
def test_a_quota_that_is_used_up_is_a_429_with_the_seconds(adapter: Path, case: str, of_key: bool) -> None:
    async def scenario(started: Running) -> None:
        quota, least_s = QUOTAS[case]
        service = started.service
        service.key_quotas.set("anonymous", quota) if of_key else service.adapter_quotas.set("adapted", quota)
        assert (await started.post(ignore_eos=True)).status_code == 200
        for stream in (False, True):
            refusal = await started.post(ignore_eos=True, stream=stream)
            code = "key_quota_exceeded" if of_key else "adapter_quota_exceeded"
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, code)
            assert least_s <= int(refusal.headers["retry-after"]) <= 60
        base = await started.post(model="base")
        assert base.status_code == (429 if of_key else 200)
        await started.nothing_is_held()
        told = started.service.metrics.by_adapter.of("nobody")
        assert told.requests == {"finished": 1 + (not of_key), "refused": 2 + of_key}

    during(adapter, scenario)


def test_a_quota_counts_however_its_adapter_is_named(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.service.adapter_quotas.set("adapted", Quota(requests_per_minute=1))
        version = f"adapted@{started.registry.get('adapted').version.digest}"
        assert (await started.post(model=version)).status_code == 200
        for named in ("adapted", version):
            assert (await started.post(model=named)).status_code == 429
            mixture = {"model": "base", "adapters": [{"name": named, "weight": 0.5}]}
            assert (await started.post(**mixture)).status_code == 429
        await started.nothing_is_held()

    during(adapter, scenario)


def test_what_can_never_be_let_in_is_a_400(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.service.adapter_quotas.set("adapted", Quota(tokens_per_minute=6))
        refusal = await started.post()
        error = refusal.json()["error"]
        assert (refusal.status_code, error["code"], error["param"]) == (400, "adapter_quota_exceeded", "max_tokens")
        assert (await started.post(max_tokens=3)).status_code == 200

    during(adapter, scenario)


@pytest.mark.parametrize("end", ["finished", "stopped", "failed", "cancelled"])
def test_unused_tokens_come_back_however_a_request_ends(adapter: Path, end: str) -> None:
    """They were taken for 3 tokens of prompt and 40 drawn."""

    async def scenario(started: Running) -> None:
        quotas = started.service.adapter_quotas
        quotas.clock = lambda: 0.0
        quotas.set("adapted", Quota(tokens_per_minute=100))
        stop = {"stop": "e"} if end == "stopped" else {}
        started.runner.failing_steps = int(end == "failed")
        if end == "cancelled":
            started.runner.steps_before_waiting = 1
        asked = asyncio.create_task(started.post(max_tokens=40, ignore_eos=True, **stop))
        if end == "cancelled":
            await started.eventually(lambda: started.service.engine.state.steps == 1)
            assert quotas._buckets["adapted", "tokens"].level == 100 - 43
            asked.cancel()
            started.runner.go_on.set()
        await asyncio.wait([asked])
        await started.nothing_is_held()
        used = {"finished": 43, "stopped": 3 + 2, "failed": 3, "cancelled": 3 + 1}[end]
        assert 100 - quotas._buckets["adapted", "tokens"].level == used

    during(adapter, scenario)


def test_other_endpoints_owe_what_they_read(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        service = started.service
        service.adapter_quotas.set("adapted", Quota(tokens_per_minute=60))
        with service.counted(ANYONE, "adapted", "v") as ticket:
            ticket.tokens = 90
        with pytest.raises(ApiError) as error, service.counted(ANYONE, "adapted", "v"):
            raise AssertionError("let in")
        assert (error.value.status, error.value.retry_after_s) == (429, 30)
        with pytest.raises(RuntimeError), service.counted(ANYONE, "base", ""):
            raise RuntimeError
        assert service.metrics.by_adapter.of("nobody").requests == {"finished": 1, "refused": 1, "failed": 1}

    during(adapter, scenario)


def test_names_that_nobody_published_are_counted_nowhere(adapter: Path) -> None:
    """Or whoever makes up names would fill the memory."""

    async def scenario(started: Running) -> None:
        service = started.service
        service.adapter_quotas.given = {"*": Quota(requests_per_minute=9)}
        support = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
        for path, body in (
            ("/v1/completions", {**BODY, "model": "nobody"}),
            ("/v1/classify", {"model": "nobody", "input": "a"}),
            ("/v1/adapters/nobody/merges", {"support": support}),
        ):
            assert (await started.client.post(path, json=body)).status_code == 404
        assert not service.adapter_quotas._buckets
        assert not service.metrics.by_adapter._uses

    during(adapter, scenario)


# ------------------------------------------------------------------------------------- keys that see some adapters only


def test_what_a_key_may_not_see_does_not_exist_for_it(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        keys = ["mine adapters=adapt*", "other adapters=x,y/*", "odd adapters=adapted@*", "every"]
        started.service.keys = Keys(keys, ["root"])
        digest = started.registry.get("adapted").version.digest

        async def ask(key: str, method: str, path: str, **body: Any) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {key}"}
            response = await started.client.request(method, path, json=body or None, headers=headers)
            return response.status_code, response.json()

        seen = {}
        for key in ("mine", "other", "every", "root"):
            _, listed = await ask(key, "GET", "/v1/models")
            seen[key] = {card["id"] for card in listed["data"]}
        assert seen == {key: {"base"} if key == "other" else {"base", "adapted"} for key in seen}
        mixture = {"model": "base", "adapters": [{"name": "NAME", "weight": 1.0}]}
        support = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
        asked: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/v1/completions", {"model": "NAME", "prompt": "a"}),
            ("POST", "/v1/completions", {"model": "NAME", "prompt": "a", "stream": True}),
            ("POST", "/v1/completions", {"model": "NAME@0123456789ab", "prompt": "a"}),
            ("POST", "/v1/completions", {"model": "NAME", "prompt": "a", "merge": {"support": support}}),
            ("POST", "/v1/completions", {**mixture, "prompt": "a"}),
            ("POST", "/v1/classify", {"model": "NAME", "input": "a"}),
            ("POST", "/v1/decisions", {"model": "NAME", "input": "a", "questions": [{"type": "predicate"}]}),
            ("GET", "/v1/models/NAME", {}),
            ("POST", "/v1/adapters/NAME/merges", {"support": support}),
            ("GET", "/v1/adapters/NAME/merges/it", {}),
        ]
        for method, path, body in asked:
            answers = [
                await ask("other", method, path.replace("NAME", name), **_renamed(body, name))
                for name in ("adapted", "nobody1")
            ]
            hidden, unknown = (
                (status, str(said).replace(name, "NAME"))
                for (status, said), name in zip(answers, ("adapted", "nobody1"), strict=True)
            )
            assert hidden == unknown, path
            assert hidden[0] == 404 or "merges" in path or "decisions" in path, (path, hidden)
        for key, status in (("mine", 200), ("odd", 404)):
            for model in ("adapted", f"adapted@{digest}"):
                answer = await ask(key, "POST", "/v1/completions", model=model, prompt="a", max_tokens=1)
                assert answer[0] == status, "a pattern is of names, not of versions"
        await started.nothing_is_held()

    during(adapter, scenario)


def _renamed(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(one, name) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, name) for one in value]
    return value.replace("NAME", name) if isinstance(value, str) else value
