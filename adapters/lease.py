"""How long a version must exist: requests hold leases on it, and a retired one is dropped with its last lease.

Must not know: names' meaning, files, requests, tiers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from motet.adapters.gates.build import Gate
from motet.adapters.heads import HeadFile
from motet.adapters.tokens import OwnTokenizer
from motet.adapters.trimming import Trimmed
from motet.adapters.version import AdapterVersion, Slot


@dataclass(slots=True, eq=False)
class Resident:
    """One version that exists, and what requests need to know of it.

    Attributes:
        own: its own tokenizer; None where it has the base's.
        gate: what a request must find factors by; None where rank rows have none.
        unmixable: why it cannot be a part of a mixture; None where it can.
        head: what answers by labels; None where the adapter has only the base's output.
        trimmed: what trimming took of it; None where its weights are whole.
        vocabulary: one past the largest token id that it serves; None where that is the base's.
        leases, retired: changed by `Leases` alone.
        slot: where it is on the device; None while it is not there. This and the rest are changed by `Tiers` alone.
        holds: generations that keep it on the device.
        pinned: it stays on the device without them.
        last_used_s: Unix time at which a generation last began or ended with it; None where none did.
        device_bytes: what it takes there.
        failure: why it could not be brought there, and when; None where it could, or nobody tried.
    """

    version: AdapterVersion
    own: OwnTokenizer | None = None
    gate: Gate | None = None
    unmixable: str | None = None
    head: HeadFile | None = None
    trimmed: Trimmed | None = None
    vocabulary: int | None = None
    leases: int = 0
    retired: bool = False
    slot: Slot | None = None
    holds: int = 0
    pinned: bool = False
    last_used_s: float | None = None
    device_bytes: int = 0
    failure: tuple[str, float] | None = None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Lease:
    """The right to compute with one version until it is released."""

    resident: Resident = field(repr=False)

    @property
    def version(self) -> AdapterVersion:
        """What the name meant when it was resolved."""
        return self.resident.version

    @property
    def slot(self) -> Slot:
        """Where it is on the device; only while it is held there."""
        slot = self.resident.slot
        assert slot is not None, f"{self.version.short} is not on the device"
        return slot


class Leases:
    """Counts them.

    Args:
        drop: called once for every version that is retired and has no lease any more.

    Note: every method may be called from any thread.
    """

    def __init__(self, drop: Callable[[Resident], None]) -> None:
        self._drop = drop
        self._lock = threading.Lock()

    def take(self, resident: Resident) -> Lease:
        """A lease on a version that is published, or on which the caller holds a lease."""
        with self._lock:
            resident.leases += 1
        return Lease(resident)

    def release(self, lease: Lease) -> None:
        """End a lease; each lease ends exactly once."""
        with self._lock:
            assert lease.resident.leases > 0, f"lease on {lease.version.short} was released twice"
            lease.resident.leases -= 1
            free = lease.resident.retired and lease.resident.leases == 0
        if free:
            self._drop(lease.resident)

    def retire(self, resident: Resident) -> None:
        """Drop a version, once it has no lease; nobody may take further ones."""
        with self._lock:
            resident.retired = True
            free = resident.leases == 0
        if free:
            self._drop(resident)


def residents_of(leases: Sequence[object]) -> list[Resident]:
    """Of leases of the registry: the engine knows them by fewer words."""
    residents: list[Resident] = []
    for lease in leases:
        assert isinstance(lease, Lease)
        residents.append(lease.resident)
    return residents
