"""The generations that wait, by party, each party's in order of arrival.

Must not know: blocks, memory, what the policy goes by.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

from motet.server.engine.policy import Policy
from motet.server.engine.types import Generation, GenerationId

_arrival = attrgetter("arrival")


class Queue:
    """Used by the engine thread only."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._parties: dict[str, list[Generation]] = {}
        self._all: dict[GenerationId, Generation] = {}
        self._adapters: Counter[str] = Counter()

    @property
    def adapters(self) -> frozenset[str]:
        """Names of the adapters that are waited for."""
        return frozenset(self._adapters)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Generation]:
        """All of them, in order of arrival."""
        return iter(sorted(self._all.values(), key=_arrival))

    def __contains__(self, generation: Generation) -> bool:
        return generation.id in self._all

    def add(self, generation: Generation) -> None:
        """A new one, or one that was preempted and takes its place again."""
        self._policy.begins(generation.party, self._parties.keys())
        bisect.insort(self._parties.setdefault(generation.party, []), generation, key=_arrival)
        self._all[generation.id] = generation
        self._adapters.update(one.lease.version.name for one in generation.applied)

    def remove(self, generation_id: GenerationId) -> Generation | None:
        """Take one out; None when it does not wait."""
        generation = self._all.pop(generation_id, None)
        if generation is not None:
            self._adapters -= Counter(one.lease.version.name for one in generation.applied)
            party = self._parties[generation.party]
            party.remove(generation)
            if not party:
                del self._parties[generation.party]
                self._policy.empties(generation.party)
        return generation

    def heads(self) -> Iterator[Generation]:
        """The first of each party, most urgent first.

        Where the caller removes one, the party's next takes its turn among the rest, as the policy then says; a party
        whose first stays is passed over.
        """
        turns = [(self._policy.order(party[0]), party[0]) for party in self._parties.values()]
        heapq.heapify(turns)
        while turns:
            _, head = heapq.heappop(turns)
            yield head
            if head.id not in self._all and (party := self._parties.get(head.party)):
                heapq.heappush(turns, (self._policy.order(party[0]), party[0]))
