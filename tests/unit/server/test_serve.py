"""How the server is put together, where that is not visible from outside."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

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
