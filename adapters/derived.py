"""Adapters that requests make of others, merges that are no sum: made once, kept while there is room.

Must not know: how they are made, requests. They have no name of their own, so nobody finds them but by the request that
makes them; the least recently used one without a lease goes first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from motet.adapters.effects import Lowered
from motet.adapters.errors import ArenaFullError
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.residency import Residency
from motet.adapters.trimming import Trimmed
from motet.adapters.version import AdapterVersion, Slot

MOST = 16
Make = Callable[[], tuple[Lowered, Trimmed | None]]
"""What is to be placed, and what trimming took of it."""


class Derived:
    """What was made, by version.

    Note: every method may be called from any thread. While one is made, those who ask for it wait; others do not.
    """

    def __init__(self, residency: Residency, leases: Leases) -> None:
        self._residency, self._leases = residency, leases
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
            ArenaFullError: there is no room, even without every other one that nobody uses.
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
        """Free it with its last lease; whoever asks later has it made again. Nothing where it was not made."""
        with self._lock:
            resident = self._made.pop(version, None)
        if resident is not None:
            self._leases.retire(resident)

    def place(self, lowered: Lowered) -> Slot:
        """Place any adapter; what nobody uses here gives way to it.

        Raises:
            ArenaFullError: there is no room all the same.
        """
        return self._with_room(self._residency.place, lowered)

    def place_beside(self, lowered: Lowered) -> Slot:
        """As `place`, with replaced parameters beside the arena; see `Residency.place_beside`.

        Raises:
            ArenaFullError: there is no room all the same.
        """
        return self._with_room(self._residency.place_beside, lowered)

    def _with_room(self, place: Callable[[Lowered], Slot], lowered: Lowered) -> Slot:
        try:
            return place(lowered)
        except ArenaFullError:
            with self._lock:
                return self._placed(lowered, place)

    def _new(self, version: AdapterVersion, lowered: Lowered, trimmed: Trimmed | None) -> Lease:
        with self._lock:
            if version not in self._made:  # after a failure, two may have made it
                slot = self._placed(lowered, self._residency.place)
                self._made[version] = Resident(version, slot, trimmed=trimmed)
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

    def _placed(self, lowered: Lowered, place: Callable[[Lowered], Slot]) -> Slot:
        while True:
            try:
                return place(lowered)
            except ArenaFullError:
                if not self._drop_one():
                    raise

    def _drop_one(self) -> bool:
        """Free the least recently used one without a lease; False when there is none."""
        for version, resident in self._made.items():
            if resident.leases == 0:
                del self._made[version]
                self._leases.retire(resident)
                return True
        return False
