"""How long a resident adapter must stay: requests hold leases on it, and a retired one is freed with its last lease.

Must not know: names' meaning, files, requests.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from motet.adapters.gates.build import Gate
from motet.adapters.heads import HeadFile
from motet.adapters.residency import Residency
from motet.adapters.tokens import OwnTokenizer
from motet.adapters.trimming import Trimmed
from motet.adapters.version import AdapterVersion, Slot


@dataclass(slots=True, eq=False)
class Resident:
    """One version in adapter memory, and what requests need to know of it.

    Attributes:
        own: its own tokenizer; None where it has the base's.
        gate: what a request must find factors by; None where rank rows have none.
        unmixable: why it cannot be a part of a mixture; None where it can.
        head: what answers by labels; None where the adapter has only the base's output.
        trimmed: what trimming took of it; None where its weights are whole.
        leases, retired: changed by `Leases` alone.
    """

    version: AdapterVersion
    slot: Slot
    own: OwnTokenizer | None = None
    gate: Gate | None = None
    unmixable: str | None = None
    head: HeadFile | None = None
    trimmed: Trimmed | None = None
    leases: int = 0
    retired: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """The right to compute with one version until it is released."""

    resident: Resident = field(repr=False)

    @property
    def version(self) -> AdapterVersion:
        """What the name meant when it was resolved."""
        return self.resident.version

    @property
    def slot(self) -> Slot:
        """Where it is."""
        return self.resident.slot


class Leases:
    """Counts them.

    Note: every method may be called from any thread.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
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
            self._residency.release(lease.slot)

    def retire(self, resident: Resident) -> None:
        """Free a version, once it has no lease; nobody may take further ones."""
        with self._lock:
            resident.retired = True
            free = resident.leases == 0
        if free:
            self._residency.release(resident.slot)
