"""Adapters that requests make of others, merges that are no sum: made once, kept while there is room.

Must not know: how they are made, requests. They have no name of their own, so nobody finds them but by the request that
makes them; the least recently used one without a lease goes first. Nothing can make them again while they exist, so the
host keeps them as long.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from motet.adapters.effects import Lowered
from motet.adapters.errors import HostFullError
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.packed import Packed
from motet.adapters.supply import Again
from motet.adapters.tiers import Tiers
from motet.adapters.trimming import Trimmed
from motet.adapters.version import AdapterVersion

MOST = 16
Make = Callable[[], tuple[Lowered, Trimmed | None]]
"""What is to be served, and what trimming took of it."""


class Derived:
    """What was made, by version.

    Note: every method may be called from any thread. While one is made, those who ask for it wait; others do not.
    """

    def __init__(self, tiers: Tiers, leases: Leases) -> None:
        self._tiers, self._leases = tiers, leases
        self._lock = threading.Lock()
        self._made: OrderedDict[AdapterVersion, Resident] = OrderedDict()
        self._making: dict[AdapterVersion, threading.Lock] = {}

    def find(self, version: AdapterVersion) -> Lease | None:
        """A lease on the version where it is there."""
        with self._lock:
            return self._taken(version)

    def acquire(self, version: AdapterVersion, make: Make) -> Lease:
        """A lease on the version, which is made where it is not there yet.

        Raises:
            ArenaFullError: it does not fit on the device.
            HostFullError: there is no room for it, even without every other one that nobody uses.
            AdapterError: what `make` raises.
        """
        with self._lock:
            making = self._making.setdefault(version, threading.Lock())
        with making:
            try:
                return self.find(version) or self._new(version, *make())
            finally:
                with self._lock:
                    self._making.pop(version, None)

    def drop(self, version: AdapterVersion) -> None:
        """Drop it with its last lease; whoever asks later has it made again. Nothing where it was not made."""
        with self._lock:
            resident = self._made.pop(version, None)
        if resident is not None:
            self._leases.retire(resident)

    def admit(self, resident: Resident, packed: Packed, again: Again | None) -> None:
        """Take in any version; what nobody uses here gives way to what must stay of it.

        Raises:
            ArenaFullError, HostFullError: see `Tiers.admit`.
        """
        try:
            self._tiers.admit(resident, packed, again)
        except HostFullError:
            with self._lock:
                self._admit(resident, packed, again)

    def _new(self, version: AdapterVersion, lowered: Lowered, trimmed: Trimmed | None) -> Lease:
        packed = self._tiers.residency.pack(lowered)
        with self._lock:
            if version not in self._made:  # after a failure, two may have made it
                resident = Resident(version, trimmed=trimmed)
                self._admit(resident, packed, None)
                self._made[version] = resident
            lease = self._taken(version)
            assert lease is not None
            return lease

    def _taken(self, version: AdapterVersion) -> Lease | None:
        """A lease on what was made, now the latest; the caller holds the lock."""
        if version not in self._made:
            return None
        lease = self._leases.take(self._made[version])
        self._made.move_to_end(version)
        while len(self._made) > MOST and self._drop_one():
            pass
        return lease

    def _admit(self, resident: Resident, packed: Packed, again: Again | None) -> None:
        while True:
            try:
                return self._tiers.admit(resident, packed, again)
            except HostFullError:
                if not self._drop_one():
                    raise

    def _drop_one(self) -> bool:
        """Drop the least recently used one without a lease; False when there is none."""
        for version, resident in self._made.items():
            if resident.leases == 0:
                del self._made[version]
                self._leases.retire(resident)
                return True
        return False
