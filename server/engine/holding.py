"""Adapters on the device for the generations that run: who holds them, who waits for them, and who lost patience.

Must not know: blocks, rows, shares, how adapters get there.

One whose adapters are not there is passed over, so that it blocks nobody while they are brought. Others could pass for
ever, and keep the room taken that it needs; so after `PATIENCE_S` no adapter of a later arrival is held before its own.
That holds whatever the memory does. motet.adapters.tiers makes room sooner, and only where it is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from motet.server.engine.types import MOST_WANTED, Generation, GenerationId, Lease, Memory

PATIENCE_S = 30.0
"""Longer than an adapter takes that has to be lowered again: while that lasts, nobody should wait for it."""


class Holding:
    """Speaks to the memory. Used by the engine thread only.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, memory: Memory, clock: Callable[[], float]) -> None:
        self._memory, self._clock = memory, clock
        self._blocked: dict[GenerationId, tuple[Generation, float]] = {}
        self._wanted = False

    def hold(self, generation: Generation) -> bool:
        """Whether its adapters are on the device, to stay; where not, its patience begins to end."""
        leases = _leases(generation)
        if not leases or self._memory.hold(leases):
            return True
        self._blocked.setdefault(generation.id, (generation, self._clock()))
        return False

    def let_go(self, generation: Generation) -> None:
        if leases := _leases(generation):
            self._memory.let_go(leases)

    def failure(self, generation: Generation) -> str | None:
        """Why its adapters cannot be brought."""
        failures = (self._memory.failure(lease) for lease in _leases(generation))
        return next((why for why in failures if why is not None), None)

    def settled(self, generation: Generation) -> None:
        """It runs, or is gone."""
        self._blocked.pop(generation.id, None)

    def impatient(self) -> Generation | None:
        """The one that has been passed over longest, where that is too long."""
        generation, since_s = next(iter(self._blocked.values()), (None, 0.0))
        return None if generation is None or self._clock() - since_s < PATIENCE_S else generation

    def want(self, queue: Iterable[Generation]) -> None:
        """Tell the memory what is needed, each version once; silent while nothing is.

        Args:
            queue: most urgent first. Those that were passed over come before it, in the order in which they first were:
                a memory that keeps what is wanted before, and makes room for the first, needs an order that stays.
        """
        wanted: dict[object, Lease] = {}
        passed_over = [generation for generation, _ in self._blocked.values()]
        for generation in itertools.chain(passed_over, queue):
            for lease in _leases(generation):
                wanted.setdefault(lease.version, lease)
            if len(wanted) >= MOST_WANTED:
                break
        if wanted or self._wanted:
            self._memory.want(list(wanted.values())[:MOST_WANTED])
        self._wanted = bool(wanted)


def _leases(generation: Generation) -> list[Lease]:
    return [one.lease for one in generation.applied]
