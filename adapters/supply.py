"""Where packed adapters come from: the host, else the disk, else their lowered form, made again from the source.

Must not know: the device, who asks, how anything is lowered.

    source → lowered (disk) → packed (disk) → packed (host)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from motet.adapters.cache import LoweredCache, PackedKey
from motet.adapters.effects import Lowered
from motet.adapters.host import HostTier
from motet.adapters.lease import Resident
from motet.adapters.packed import Packed
from motet.adapters.residency import Residency

Tier = Literal["source", "disk", "host", "device"]
Again = Callable[[], Lowered]
"""Lowers a version once more; raises AdapterError where its source is gone or holds something else."""


class Moves:
    """How often versions moved between tiers, and how long that took.

    Attributes:
        loads: (from, to) → how many.
        load_s: (from, to) → seconds of all of them together.
    """

    def __init__(self) -> None:
        self.loads: Counter[tuple[Tier, Tier]] = Counter()
        self.load_s: dict[tuple[Tier, Tier], float] = {}

    def count(self, source: Tier, target: Tier, began_s: float) -> None:
        """A move that ends now.

        Args:
            began_s: of time.perf_counter.
        """
        way = source, target
        self.loads[way] += 1
        self.load_s[way] = self.load_s.get(way, 0.0) + time.perf_counter() - began_s


class Supply:
    """Host and disk.

    Args:
        cache: None where every version is lowered again once the host has given it up.
        fingerprint: of the base.

    Note: every method may be called from any thread.
    """

    def __init__(
        self, residency: Residency, host: HostTier, cache: LoweredCache | None, fingerprint: str, moves: Moves
    ) -> None:
        self.host = host
        self._residency, self._cache, self._fingerprint, self._moves = residency, cache, fingerprint, moves

    def take_in(self, resident: Resident, packed: Packed, again: Again | None) -> None:
        """Keep a new version on both.

        Args:
            again: None where nothing can make it again: the host keeps it as long as it exists.

        Raises:
            HostFullError: what must stay of it does not fit into the host memory.
        """
        fixed_bytes = sum(part.bytes for part in (resident.head, resident.gate) if part is not None)
        self.host.fix(resident, fixed_bytes, packed if again is None else None)
        if again is not None:
            self.host.put(resident, packed)
            if self._cache is not None:
                self._cache.put_packed(self._key(resident), packed)

    def fetch(self, resident: Resident, again: Again | None) -> Packed:
        """The packed form, from the nearest tier that has it; the host has it then, where it fits.

        Raises:
            AdapterError: nothing has it, and it cannot be made again.
        """
        packed = self.host.get(resident)
        if packed is not None:
            return packed
        assert again is not None, f"the host gave up {resident.version.short}, which nothing can make again"
        began_s = time.perf_counter()
        source: Tier = "disk"
        if self._cache is not None:
            packed = self._cache.get_packed(self._key(resident), self.host.make_room)
        if packed is None:
            source = "source"
            packed = self._residency.pack(again())
            if self._cache is not None:
                self._cache.put_packed(self._key(resident), packed)
        self.host.put(resident, packed)
        self._moves.count(source, "host", began_s)
        return packed

    def bytes_of(self, resident: Resident) -> dict[str, int]:
        """What a version takes now on either."""
        disk = 0 if self._cache is None else self._cache.bytes_of(self._key(resident))
        return {"host": self.host.bytes_of(resident), "disk": disk}

    def _key(self, resident: Resident) -> PackedKey:
        arena = self._residency.arena
        return PackedKey(self._fingerprint, resident.version.digest, arena.units_NU.dtype, arena.unit)
