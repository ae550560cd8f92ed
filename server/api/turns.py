"""Costly makings, merges and trimmed or mixed weights: one at a time for each key, and few that wait.

Must not know: what is made.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

MOST_IN_LINE = 8
"""Of one key, the one that is being made included."""


class TurnError(Exception):
    """A key has too many in line."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(slots=True, eq=False)
class _Line:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    length: int = 0


@dataclass(slots=True, eq=False)
class Turns:
    """Used by one event loop."""

    _lines: dict[str, _Line] = field(default_factory=dict)
    _latest_s: float = 1.0

    def require_place(self, label: str) -> None:
        """Require that the key's line is not full.

        Raises:
            TurnError: it is.
        """
        line = self._lines.get(label)
        if line is not None and line.length >= MOST_IN_LINE:
            raise TurnError(
                f"{line.length} merges of API key {label!r} are made or wait already (limit {MOST_IN_LINE}); try again "
                "when one is done",
                max(1, math.ceil(self._latest_s)),
            )

    @asynccontextmanager
    async def turn(self, label: str) -> AsyncIterator[None]:
        """Wait for the key's others, then make.

        Raises:
            TurnError: too many wait.
        """
        self.require_place(label)
        line = self._lines.setdefault(label, _Line())
        line.length += 1
        try:
            async with line.lock:
                started_s = time.monotonic()
                yield
                self._latest_s = time.monotonic() - started_s
        finally:
            line.length -= 1
            if line.length == 0:
                del self._lines[label]
