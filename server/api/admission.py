"""Whether new work is taken: the queue's room, and the quotas of the adapters and of who asks.

Must not know: prompts, how requests look.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from motet.server.api.errors import ApiError
from motet.server.api.keys import Caller
from motet.server.api.quotas import QuotaError, Quotas, Taken
from motet.server.engine.engine import Engine

REMEMBERED = 64
"""Latest ends of generations that the throughput is measured by."""
MOST_RETRY_S = 60


@dataclass(slots=True)
class Ticket:
    """One request that was let in.

    Attributes:
        tokens: what it read and drew; whoever serves it says so before it ends.
        generations: how many of its generations ended.
    """

    tokens: int = 0
    generations: int = 0


@dataclass(slots=True, eq=False)
class Admission:
    """Used by the event loop.

    Attributes:
        max_waiting: generations that may wait; more are answered 429.
        adapters, keys: their quotas.
    """

    engine: Engine
    max_waiting: int
    adapters: Quotas
    keys: Quotas
    clock: Callable[[], float] = time.monotonic
    _ends: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def most(self) -> int:
        """Generations that may run and wait together."""
        return self.max_waiting + self.engine.most_running

    def require_room(self, generations: int) -> None:
        """Refuse what does not fit into the queue.

        Raises:
            ApiError: 429, or 400 where it never fits.
        """
        if generations > self.most:
            message = f"the request is {generations} generations; at most {self.most} run and wait here: send fewer"
            raise ApiError(400, message, code="queue_full", param="n")
        room = self.engine.room(self.max_waiting)
        if generations > room:
            raise ApiError(
                429,
                f"{self.engine.queued} generations wait already (limit {self.max_waiting}) and the request is "
                f"{generations}; try again later",
                code="queue_full",
                retry_after_s=self._until_free(generations - max(0, room)),
            )

    @contextmanager
    def admitted(self, caller: Caller, adapters: Sequence[str], tokens: int, generations: int = 1) -> Iterator[Ticket]:
        """Let a request in until the block is left.

        Args:
            adapters: names whose quotas count, each once.
            tokens: what it may need at most; 0 where nobody knows, and what it used is then owed.

        Raises:
            ApiError: 429, or 400 where waiting is of no use; nothing was taken then.
        """
        ticket = self.enter(caller, adapters, tokens, generations)
        try:
            yield ticket[0]
        finally:
            self.leave(*ticket)

    def enter(
        self, caller: Caller, adapters: Sequence[str], tokens: int, generations: int = 1
    ) -> tuple[Ticket, Taken, Taken]:
        """As `admitted`, for those that call `leave` themselves."""
        self.require_room(generations)
        names = tuple(dict.fromkeys(adapters))
        for quotas, asked, code in (
            (self.adapters, names, "adapter_quota_exceeded"),
            (self.keys, (caller.label,), "key_quota_exceeded"),
        ):
            try:
                quotas.require(asked, tokens)
            except QuotaError as error:
                wait_s = error.retry_after_s
                if wait_s is None:
                    raise ApiError(400, str(error), code=code, param="max_tokens") from error
                raise ApiError(429, str(error), code=code, retry_after_s=math.ceil(wait_s)) from error
        return Ticket(), self.adapters.take(names, tokens), self.keys.take((caller.label,), tokens)

    def leave(self, ticket: Ticket, of_adapters: Taken, of_key: Taken) -> None:
        """The request ended, however it did."""
        self.adapters.give_back(of_adapters, ticket.tokens)
        self.keys.give_back(of_key, ticket.tokens)
        if ticket.generations:
            self._ends.append((self.clock(), ticket.generations))

    def _until_free(self, generations: int) -> int:
        """Seconds until as many have ended, by how fast the latest did; 1 where nothing is known."""
        if len(self._ends) < 2:
            return 1
        first_s, ended = self._ends[0][0], sum(count for _, count in self._ends) - self._ends[0][1]
        rate = ended / max(self.clock() - first_s, 1e-3)
        return min(MOST_RETRY_S, max(1, math.ceil(generations / rate)))
