"""How the server is put together, where that is not visible from outside."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from motet.server import serve
from motet.server.engine.blocks import BlockPool
from motet.server.engine.engine import Engine
from motet.server.engine.scheduler import Scheduler, StepLimits
from motet.server.serve import own_the_processors
from tests.support.fake_memory import FakeMemory
from tests.support.fake_runner import FakeRunner


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
def test_only_the_step_thread_computes_on_all_processors() -> None:
    """Else OpenMP has more threads than processors, stops spinning at barriers, and steps take half as long again."""
    seen: dict[str, int] = {}

    def prepare() -> None:
        torch.set_num_threads(3)
        seen["steps"] = torch.get_num_threads()

    scheduler = Scheduler(BlockPool(4, 4), StepLimits(rows=4, generations=1), FakeMemory())
    engine = Engine(scheduler, FakeRunner(4), lambda events: None, lambda lease: None, prepare)
    own_the_processors(engine)
    loader = threading.Thread(target=lambda: seen.update(loader=torch.get_num_threads()))
    loader.start()
    loader.join()
    engine.stop()
    assert seen == {"steps": 3, "loader": 1}
    assert torch.get_num_threads() == 1


def test_an_engine_that_cannot_be_prepared_says_why() -> None:
    scheduler = Scheduler(BlockPool(4, 4), StepLimits(rows=4, generations=1), FakeMemory())

    def prepare() -> None:
        raise MemoryError("no room to warm up")

    engine = Engine(scheduler, FakeRunner(4), lambda events: None, lambda lease: None, prepare)
    with pytest.raises(MemoryError, match="no room to warm up"):
        engine.start()


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_collections_pass_over_what_was_there_when_the_server_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a full one looks through all of torch, and every stream waits for it."""
    loaded = [object()]  # a list is what the collector looks after
    looked_after = []
    service = SimpleNamespace(registry=SimpleNamespace(published=list), apply_quotas=lambda published: None)
    assembled = SimpleNamespace(adapters=(), report=None, limits=SimpleNamespace(body_timeout_s=1))
    config = SimpleNamespace(host="127.0.0.1", port=0, log_level="info", drain_timeout=0)

    @contextlib.asynccontextmanager
    async def opened(*arguments: object) -> AsyncIterator[Any]:
        yield service

    class Server:
        def __init__(self, settings: object, service: object, drain_s: float, ready: Callable[[], None]) -> None:
            self._ready = ready

        async def serve(self) -> None:
            looked_after.append(any(one is loaded for one in gc.get_objects()))
            self._ready()

    async def said(service: object) -> None:
        looked_after.append(any(one is loaded for one in gc.get_objects()))

    for name, fake in {"opened": opened, "DrainingServer": Server, "warm_up": said}.items():
        monkeypatch.setattr(serve, name, fake)
    monkeypatch.setattr(serve, "publish_first", lambda *arguments: None)
    monkeypatch.setattr(serve, "create_app", lambda *arguments: None)
    serve.run(config, assembled, lambda names: None)  # type: ignore[arg-type]
    assert looked_after == [True, False]
