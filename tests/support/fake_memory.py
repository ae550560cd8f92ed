"""A memory without adapters: which versions are on the device is told by the test, and who holds them is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from motet.adapters.version import AdapterVersion
from motet.server.engine.types import Lease


class FakeMemory:
    """See `motet.server.engine.types.Memory`. Everything is on the device but what is `absent`.

    Attributes:
        held: how often each lease is held now.
        wanted: the latest list, and how often one was given.
        failures: why a version cannot be brought.
    """

    def __init__(self) -> None:
        self.absent: set[AdapterVersion] = set()
        self.held: Counter[Lease] = Counter()
        self.wanted: list[AdapterVersion] = []
        self.wants = 0
        self.failures: dict[AdapterVersion, str] = {}

    def hold(self, leases: Sequence[Lease]) -> bool:
        assert leases, "generations without adapters never touch the memory"
        if any(lease.version in self.absent for lease in leases):
            return False
        self.held.update(leases)
        return True

    def let_go(self, leases: Sequence[Lease]) -> None:
        self.held.subtract(leases)
        assert min(self.held.values()) >= 0, "let go more often than held"
        self.held = +self.held

    def want(self, leases: Sequence[Lease]) -> None:
        self.wanted = [lease.version for lease in leases]
        self.wants += 1

    def failure(self, lease: Lease) -> str | None:
        return self.failures.get(lease.version)


class SmallMemory(FakeMemory):
    """Holds so many versions; what is wanted comes with `tick`, the first that has room, one at a time."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.there: dict[AdapterVersion, None] = {}
        """The least recently held first."""

    def hold(self, leases: Sequence[Lease]) -> bool:
        assert leases, "generations without adapters never touch the memory"
        if any(lease.version not in self.there for lease in leases):
            return False
        for lease in leases:
            self.there[lease.version] = self.there.pop(lease.version)
        self.held.update(leases)
        return True

    def tick(self) -> None:
        """Time passes: a load ends."""
        held = {lease.version for lease in self.held}
        for place, version in enumerate(self.wanted):
            if version in self.there:
                continue
            kept = held.union(self.wanted[:place])
            if len(self.there) == self.capacity:
                victim = next((one for one in self.there if one not in kept), None)
                if victim is None:
                    return
                del self.there[victim]
            self.there[version] = None
            return
