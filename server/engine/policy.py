"""Whose generation comes next, and whose gives way when blocks run out.

Must not know: blocks, memory, tensors, threads.

A *party* is what shares are given to: an adapter by its name, whichever version, or the base model. `Fcfs` has none.
`Fair` counts the service of each: a prompt's tokens when it is first admitted, less those the prefix cache spares, and
every drawn token, which costs twice as much, divided by the party's weight. The smallest counter comes next. A party
that begins to wait is lifted to the smallest counter of those that wait already, so that nobody saves up service; and
as counters are remembered, every party's turn comes, however many others there are.

Source: virtual token counters, arXiv 2401.00588, algorithm 2; costs 1 and 2 are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Protocol

from motet.server.engine.types import Generation

PROMPT_COST = 1.0
DRAWN_COST = 2.0
MOST_COUNTERS = 1024
"""Beyond as many, counters are dropped that would be lifted anyway when their party comes back."""

Order = tuple[float, int]
"""Smaller comes first; the largest gives way first."""


class Policy(Protocol):
    """Orders generations, and is told what becomes of them.

    Note: used by the engine thread only.
    """

    def begins(self, party: str, waiting: Collection[str]) -> None:
        """A party queues a generation; `waiting` are the parties that have some in the queue already."""

    def empties(self, party: str) -> None:
        """A party's last generation left the queue."""

    def admitted(self, generation: Generation) -> None:
        """A generation runs for the first time."""

    def drew(self, generation: Generation) -> None:
        """A generation drew a token."""

    def order(self, generation: Generation) -> Order:
        """Its place among all that wait or run, as things stand."""


class Fcfs:
    """First come, first served."""

    def begins(self, party: str, waiting: Collection[str]) -> None:
        """Of no consequence here, as are all of these."""

    def empties(self, party: str) -> None: ...

    def admitted(self, generation: Generation) -> None: ...

    def drew(self, generation: Generation) -> None: ...

    def order(self, generation: Generation) -> Order:
        return 0.0, generation.arrival


class Fair:
    """Weighted fair shares of the computed tokens.

    Args:
        weight: of a party; twice the weight is twice the share. May change at any time.
    """

    def __init__(self, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        self._weight = weight
        self._counters: dict[str, float] = {}
        self._floor = 0.0
        self._latest: str | None = None

    @property
    def counters(self) -> Mapping[str, float]:
        """Service of each party, in tokens by their cost, divided by its weight."""
        return MappingProxyType(self._counters)

    def begins(self, party: str, waiting: Collection[str]) -> None:
        if party in waiting:
            return
        latest = self._floor if self._latest is None else self._counters.get(self._latest, self._floor)
        self._floor = max(self._floor, min((self._counters[other] for other in waiting), default=latest))
        if len(self._counters) >= MOST_COUNTERS:
            self._counters = {
                name: counter for name, counter in self._counters.items() if counter > self._floor or name in waiting
            }
        self._counters[party] = max(self._counters.get(party, 0.0), self._floor)

    def empties(self, party: str) -> None:
        """Where that leaves the queue empty, the next to come starts where this one is then."""
        self._latest = party

    def admitted(self, generation: Generation) -> None:
        self._charge(generation.party, PROMPT_COST * (generation.prompt_length - (generation.cached_tokens or 0)))

    def drew(self, generation: Generation) -> None:
        self._charge(generation.party, DRAWN_COST)

    def order(self, generation: Generation) -> Order:
        return self._counters.get(generation.party, self._floor), generation.arrival

    def _charge(self, party: str, cost: float) -> None:
        weight = self._weight(party)
        assert weight > 0
        assert math.isfinite(weight)
        self._counters[party] = self._counters.get(party, self._floor) + cost / weight
