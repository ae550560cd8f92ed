"""Carries events from the step thread to the event loop: one thread crossing per step for all generations together.

Must not know: torch, HTTP, text.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence

from motet.server.engine.types import GenerationId, TokenEvent


class Stream:
    """The events of one request's generations, in order of arrival, until each has sent its finish reason."""

    def __init__(self, generations: Sequence[GenerationId]) -> None:
        self.generations = tuple(generations)
        self.unfinished = set(generations)
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()

    def put(self, event: TokenEvent) -> None:
        """Append an event; event-loop thread only."""
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while self.unfinished:
            event = await self._events.get()
            if event.finish is not None:
                self.unfinished.discard(event.generation)
            yield event


class Streams:
    """The open streams.

    Note: `publish` is for the step thread, everything else for the event loop's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open: dict[GenerationId, Stream] = {}
        self._ids = itertools.count()

    def open(self, generations: int) -> Stream:
        """A stream for new generations, listening before they are submitted."""
        stream = Stream([GenerationId(next(self._ids)) for _ in range(generations)])
        self._open.update(dict.fromkeys(stream.generations, stream))
        return stream

    def close(self, stream: Stream) -> None:
        """Stop listening; later events of its generations are dropped."""
        for generation in stream.generations:
            self._open.pop(generation, None)

    def __len__(self) -> int:
        return len(self._open)

    def publish(self, events: Sequence[TokenEvent]) -> None:
        """Hand a step's events to their streams."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            stream = self._open.get(event.generation)
            if stream is None:
                continue
            stream.put(event)
            if event.finish is not None:
                del self._open[event.generation]
