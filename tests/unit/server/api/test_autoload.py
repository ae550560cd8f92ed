"""A name that nobody has loaded is loaded once for all who ask, and not again at once when it cannot be."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    NameBusyError,
    SourceNotFoundError,
    SourceUnavailableError,
)
from motet.server.api import autoload
from motet.server.api.autoload import Autoload, Template
from motet.server.api.errors import ApiError
from motet.server.api.keys import Caller
from motet.server.api.labelling import leased
from motet.server.api.publishing import autoloading
from tests.unit.server.api.rig import Running, during

TEMPLATE = Template("s3://bucket/{name}")


class Loads:
    """What was asked to be loaded; each waits for `go_on`."""

    def __init__(self, error: AdapterError | None = None) -> None:
        self.error, self.asked = error, list[tuple[str, str]]()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, name: str, source: str) -> None:
        self.asked.append((name, source))
        await self.go_on.wait()
        if self.error is not None:
            raise self.error


def autoloads(loads: Loads, known: Callable[[str], bool] = lambda _: False, **more: Any) -> Autoload:
    return Autoload(TEMPLATE, loads, known, **{"wait_s": 10, **more})


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(bounded())


def test_all_who_ask_share_one_load() -> None:
    async def scenario() -> None:
        loads = Loads()
        loads.go_on.clear()
        one = autoloads(loads)
        asking = [asyncio.create_task(one.ensure("fr")) for _ in range(20)]
        await asyncio.sleep(0.01)
        asking[0].cancel()
        loads.go_on.set()
        assert [
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*asking, return_exceptions=True)
        ] == [
            True,
            *[False] * 19,
        ]
        assert loads.asked == [("fr", "s3://bucket/fr")]

    run(scenario)


def test_what_is_known_is_not_loaded() -> None:
    async def scenario() -> None:
        loads = Loads()
        await autoloads(loads, lambda name: name == "fr").ensure("fr")
        assert loads.asked == []

    run(scenario)


NAMES = [
    "..",
    "a..b",
    "../a",
    "a/b",
    "/a",
    "a@b",
    "a:b",
    "a#b",
    "a?b",
    "a%2fb",
    "a b",
    "a\\b",
    "",
    "é",
    "a\n",
    "-a",
    "x" * 129,
]


@pytest.mark.parametrize("name", [*NAMES, "{name}", "a\0"])
def test_names_that_would_lead_elsewhere(name: str) -> None:
    async def scenario() -> None:
        loads = Loads()
        await autoloads(loads).ensure(name)
        assert loads.asked == []

    run(scenario)


@pytest.mark.parametrize("error", [SourceNotFoundError("no"), ConfigError("bad")], ids=["absent", "refused"])
def test_a_failure_is_remembered_briefly(error: AdapterError) -> None:
    async def scenario() -> None:
        loads = Loads(error)
        one = autoloads(loads, remembered_s=0.2)

        async def ensure() -> None:
            if isinstance(error, SourceNotFoundError):
                await one.ensure("fr")
                return
            with pytest.raises(ApiError, match="bad") as refused:
                await one.ensure("fr")
            assert (refused.value.status, refused.value.code, refused.value.param) == (400, "adapter_refused", "model")

        for _ in range(3):
            await ensure()
        assert len(loads.asked) == 1
        await asyncio.sleep(0.25)
        await ensure()
        assert len(loads.asked) == 2

    run(scenario)


@pytest.mark.parametrize(
    ("error", "status"), [(NameBusyError("busy"), 423), (AdapterExistsError("there"), None)], ids=["busy", "there"]
)
def test_what_will_pass_is_not_remembered(error: AdapterError, status: int | None) -> None:
    async def scenario() -> None:
        loads = Loads(error)
        one = autoloads(loads)
        for _ in range(2):
            if status is None:
                await one.ensure("fr")
                continue
            with pytest.raises(ApiError) as refused:
                await one.ensure("fr")
            assert refused.value.status == status
        assert len(loads.asked) == 2

    run(scenario)


def test_a_source_that_does_not_answer_is_a_503() -> None:
    async def scenario() -> None:
        with pytest.raises(ApiError) as refused:
            await autoloads(Loads(SourceUnavailableError("down"))).ensure("fr")
        assert (refused.value.status, refused.value.retry_after_s) == (503, 5)

    run(scenario)


def test_patience_ends_and_the_load_goes_on() -> None:
    async def scenario() -> None:
        loads = Loads()
        loads.go_on.clear()
        one = autoloads(loads, wait_s=0.05)
        for _ in range(2):
            with pytest.raises(ApiError) as refused:
                await one.ensure("fr")
            assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (
                503,
                "adapter_loading",
                5,
            )
        loads.go_on.set()
        await one.ensure("fr")
        assert len(loads.asked) == 1

    run(scenario)


def test_the_number_of_loads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoload, "MOST_LOADING", 3)
    monkeypatch.setattr(autoload, "MOST_REMEMBERED", 3)

    async def scenario() -> None:
        loads = Loads(SourceNotFoundError("no"))
        loads.go_on.clear()
        one = autoloads(loads)
        asking = [asyncio.create_task(one.ensure(name)) for name in "abc"]
        await asyncio.sleep(0.01)
        assert len(loads.asked) == 1, "no place is left for administrators"
        with pytest.raises(ApiError, match="3 adapters are being loaded already"):
            await one.ensure("d")
        loads.go_on.set()
        await asyncio.gather(*asking)
        await one.ensure("d")
        await one.ensure("a")
        assert [name for name, _ in loads.asked] == ["a", "b", "c", "d", "a"], "a is forgotten for d"

    run(scenario)


def test_a_request_loads_what_it_names(adapter: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "late")
    asked: list[int] = []

    async def scenario(running: Running) -> None:
        def load(*arguments: Any) -> Any:
            asked.append(threading.get_ident())
            return true(*arguments)

        true, running.registry.publish = running.registry.publish, load  # type: ignore[method-assign]
        running.service.autoload = autoloading(running.service, Template("{name}"), 10)
        answers = await asyncio.gather(*(running.post(model="late") for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
        assert answers[0].json()["model"] == "late"
        assert len(asked) == 1
        assert running.registry.catalogue.audited(1)[0].actor == "autoload"
        for name in ("absent", "../late", "late@0"):
            refused = await running.post(model=name)
            assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        mixed = await running.post(model="base", adapters=[{"name": "absent", "weight": 1.0}])
        assert mixed.status_code == 404

    during(adapter, scenario)
    assert asked[0] != threading.get_ident()


def test_what_a_key_may_not_see_is_not_loaded_for_it(adapter: Path) -> None:
    shutil.copytree(adapter, adapter.parent / "late")

    async def scenario(running: Running) -> None:
        running.service.autoload = autoloading(running.service, Template("{name}"), 10)
        with pytest.raises(ApiError, match="'late' does not exist"):
            async with leased(running.service, "late", Caller("fr-only", adapters=("fr-*",))):
                pass
        assert not running.service.knows("late")
        async with leased(running.service, "late", Caller("late-only", adapters=("late",))):
            assert running.service.knows("late")

    during(adapter, scenario)
