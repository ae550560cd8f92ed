from __future__ import annotations

import asyncio

import pytest

from motet.server.api.turns import MOST_IN_LINE, TurnError, Turns


def test_one_at_a_time_for_each_key_and_others_beside_it() -> None:
    async def play() -> None:
        turns, running, most = Turns(), dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)
        together = 0

        async def make(label: str) -> None:
            nonlocal together
            async with turns.turn(label):
                running[label] += 1
                most[label] = max(most[label], running[label])
                together = max(together, sum(running.values()))
                await asyncio.sleep(0.01)
                running[label] -= 1

        await asyncio.gather(*(make(label) for label in "aabbab"))
        assert (most, together) == ({"a": 1, "b": 1}, 2)
        assert not turns._lines

    asyncio.run(play())


def test_a_full_line_is_refused_and_a_place_in_it_ends_with_its_task() -> None:
    async def play() -> None:
        turns, go_on = Turns(), asyncio.Event()

        async def make() -> None:
            async with turns.turn("a"):
                await go_on.wait()

        line = [asyncio.create_task(make()) for _ in range(MOST_IN_LINE)]
        await asyncio.sleep(0)
        turns.require_place("b")
        with pytest.raises(TurnError, match="'a'") as error:
            turns.require_place("a")
        assert error.value.retry_after_s >= 1
        line.pop().cancel()
        await asyncio.sleep(0.01)
        turns.require_place("a")
        go_on.set()
        await asyncio.gather(*line)
        assert not turns._lines

    asyncio.run(play())
