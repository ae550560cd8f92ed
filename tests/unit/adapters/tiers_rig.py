"""Tiers with room for a few adapters, asked as the engine asks them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from motet.adapters.cache import LoweredCache
from motet.adapters.effects import Lowered
from motet.adapters.host import HostTier
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion, Digest
from tests.support.bases import residency_of
from tests.support.lowered import BASE, DEVICE_BYTES, HOST_BYTES, lowered

DEADLINE_S = 20.0


class Rig:
    """Tiers with room for some adapters of rank one, and every adapter's own value."""

    def __init__(self, device: int, host: int, cache: LoweredCache | None = None) -> None:
        self.tiers = Tiers(residency_of(BASE, device * DEVICE_BYTES), HostTier(host * HOST_BYTES), cache, "base")
        self.leases = Leases(self.tiers.drop)
        self.again: list[int] = []
        self.error: Exception | None = None
        self.news = threading.Condition()
        self.tiers.listen(self._wake)

    def admit(self, value: int, rank: int = 1) -> Lease:
        def again() -> Lowered:
            self.again.append(value)
            if self.error is not None:
                raise self.error
            return lowered(value, rank)

        resident = Resident(AdapterVersion(str(value), Digest(f"{value:064x}")))
        self.tiers.admit(resident, self.tiers.residency.pack(lowered(value, rank)), again)
        return self.leases.take(resident)

    def bring(self, *leases: Lease) -> None:
        """Want and hold, as the engine does."""
        self.tiers.want(leases)
        self.eventually(lambda: self.tiers.hold(leases))
        self.tiers.want([])

    def use(self, lease: Lease) -> None:
        self.bring(lease)
        assert self.value(lease) == float(lease.version.name)
        self.tiers.let_go([lease])

    def value(self, lease: Lease) -> float:
        """What lies on the device: all values of the pair are equal."""
        residency = self.tiers.residency
        at = residency.addresses([lease.slot])
        rank = int(at.rank[0, 0])
        values = [residency.arena.view(int(one[0, 0]), torch.Size((rank, 4))) for one in (at.a_first, at.b_first)]
        (found,) = {float(value) for tensor in values for value in tensor.reshape(-1)}
        return found

    def eventually(self, look: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        with self.news:
            while not look():
                assert time.monotonic() < deadline_s
                self.news.wait(0.01)

    def there(self, leases: list[Lease]) -> list[bool]:
        return [lease.resident.slot is not None for lease in leases]

    def _wake(self) -> None:
        with self.news:
            self.news.notify_all()
