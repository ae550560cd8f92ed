"""Events reach their stream, in order, once, through one crossing per step."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence

import pytest

from motet.server.engine.stream import Stream, Streams
from motet.server.engine.types import FinishReason, GenerationId, TokenEvent


def token(generation: GenerationId, token: int, finish: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(generation, token, finish=finish)


def publish_from_another_thread(streams: Streams, steps: Sequence[Sequence[TokenEvent]]) -> None:
    def publish() -> None:
        for events in steps:
            streams.publish(events)

    thread = threading.Thread(target=publish)
    thread.start()
    thread.join()


async def received(stream: Stream) -> list[TokenEvent]:
    async with asyncio.timeout(10):
        return [event async for event in stream]


def test_events_arrive_in_order_until_every_generation_has_finished() -> None:
    async def main() -> None:
        streams = Streams(asyncio.get_running_loop())
        stream = streams.open(2)
        a, b = stream.generations
        steps = [
            [token(a, 1), token(b, 2)],
            [token(b, 3, FinishReason.STOP), token(a, 4)],
            [token(a, 5, FinishReason.LENGTH)],
        ]
        publish_from_another_thread(streams, steps)
        assert await received(stream) == [event for step in steps for event in step]
        assert not stream.unfinished
        assert len(streams) == 0

    asyncio.run(main())


def test_streams_do_not_hear_each_other() -> None:
    async def main() -> None:
        streams = Streams(asyncio.get_running_loop())
        one, two = streams.open(1), streams.open(2)
        generations = [*one.generations, *two.generations]
        assert len(set(generations)) == 3
        publish_from_another_thread(streams, [[token(id, id, FinishReason.STOP) for id in generations]])
        assert [event.generation for event in await received(one)] == list(one.generations)
        assert [event.generation for event in await received(two)] == list(two.generations)

    asyncio.run(main())


def test_reader_waits_for_events_that_come_later() -> None:
    async def main() -> None:
        streams = Streams(asyncio.get_running_loop())
        stream = streams.open(1)
        reader = asyncio.create_task(received(stream))
        await asyncio.sleep(0)
        assert not reader.done()
        publish_from_another_thread(streams, [[token(stream.generations[0], 1, FinishReason.STOP)]])
        assert len(await reader) == 1

    asyncio.run(main())


def test_one_crossing_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop, crossings = asyncio.get_running_loop(), itertools.count()
        cross = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (next(crossings), cross(*args))[1])
        streams = Streams(loop)
        stream = streams.open(20)
        streams.publish([token(id, 1, FinishReason.STOP) for id in stream.generations])
        assert next(crossings) == 1
        assert len(await received(stream)) == 20

    asyncio.run(main())


def test_closed_stream_hears_nothing_more() -> None:
    async def main() -> None:
        streams = Streams(asyncio.get_running_loop())
        closed, other = streams.open(2), streams.open(1)
        streams.close(closed)
        streams.close(closed)
        assert len(streams) == 1
        publish_from_another_thread(
            streams, [[token(id, 1, FinishReason.STOP) for id in (*closed.generations, *other.generations)]]
        )
        assert len(await received(other)) == 1
        assert closed.unfinished == set(closed.generations)

    asyncio.run(main())


def test_event_after_the_end_is_dropped() -> None:
    async def main() -> None:
        streams = Streams(asyncio.get_running_loop())
        stream, other = streams.open(1), streams.open(1)
        id = stream.generations[0]
        publish_from_another_thread(
            streams,
            [[token(id, 1, FinishReason.STOP), token(id, 2)], [token(other.generations[0], 3, FinishReason.STOP)]],
        )
        await received(other)
        assert [event.token for event in await received(stream)] == [1]

    asyncio.run(main())


def test_publishing_to_a_closed_loop_does_nothing() -> None:
    loop = asyncio.new_event_loop()
    streams = Streams(loop)
    stream = streams.open(1)
    loop.close()
    streams.publish([token(stream.generations[0], 1)])
