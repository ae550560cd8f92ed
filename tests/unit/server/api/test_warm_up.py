"""Base and adapters say a word before the server is ready, and leave no trace of it."""

from __future__ import annotations

from pathlib import Path

from motet.server.api.warm_up import warm_up
from tests.unit.server.api.rig import Running, during


async def speakers(started: Running, longest_s: float = 60) -> set[str | None]:
    await warm_up(started.service, longest_s)
    await started.nothing_is_held()
    return {None if version is None else version.name for version in started.runner.versions}


def test_base_and_adapters_say_a_word_that_is_counted_nowhere(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        assert await speakers(started) == {None, "adapted"}
        assert not started.outcomes()
        assert not started.service.metrics.by_adapter._uses

    during(adapter, scenario)


def test_no_word_is_begun_after_the_time_is_over(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        assert await speakers(started, longest_s=-1) == set()

    during(adapter, scenario)


def test_whoever_fails_keeps_nobody_else_from_speaking(adapter: Path) -> None:
    async def scenario(started: Running) -> None:
        started.runner.failing_steps = 1
        assert await speakers(started) == {None, "adapted"}
        assert (await started.post()).status_code == 200

    during(adapter, scenario)
