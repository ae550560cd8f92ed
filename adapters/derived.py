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
from motet.adapters.version import AdapterVersion, Slot

MOST = 16


class Derived:
    """What was made, by version.

    Note: every method may be called from any thread; while one is made, others wait.
    """

    def __init__(self, residency: Residency, leases: Leases) -> None:
        self._residency, self._leases = residency, leases
        self._lock = threading.Lock()
        self._made: OrderedDict[AdapterVersion, Resident] = OrderedDict()

    def acquire(self, version: AdapterVersion, make: Callable[[], Lowered]) -> Lease:
        """A lease on the version, which is made where it is not there yet.

        Raises:
            ArenaFullError: there is no room, even without every other one that nobody uses.
            AdapterError: what `make` raises.
        """
        with self._lock:
            if version not in self._made:
                self._made[version] = Resident(version, self._placed(make()))
            self._made.move_to_end(version)
            while len(self._made) > MOST and self._drop_one(but=version):
                pass
            return self._leases.take(self._made[version])

    def place(self, lowered: Lowered) -> Slot:
        """Place any adapter; what nobody uses here gives way to it.

        Raises:
            ArenaFullError: there is no room all the same.
        """
        try:
            return self._residency.place(lowered)
        except ArenaFullError:
            with self._lock:
                return self._placed(lowered)

    def _placed(self, lowered: Lowered) -> Slot:
        while True:
            try:
                return self._residency.place(lowered)
            except ArenaFullError:
                if not self._drop_one():
                    raise

    def _drop_one(self, but: AdapterVersion | None = None) -> bool:
        """Free the least recently used one without a lease; False when there is none."""
        for version, resident in self._made.items():
            if resident.leases == 0 and version != but:
                del self._made[version]
                self._leases.retire(resident)
                return True
        return False
