"""The device tier: which versions are in the arena, who may be evicted for whom, and the moves themselves.

Must not know: where packed adapters come from, queues, names. A version is evicted only while nothing holds it; what is
wanted more urgently, and what is pinned, stays.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator

from motet.adapters.errors import ArenaFullError
from motet.adapters.lease import Resident
from motet.adapters.packed import Packed
from motet.adapters.residency import Residency
from motet.adapters.version import Slot


class Device:
    """The versions on the device, the least recently used first.

    Args:
        lock: guards `Resident.slot` and `Resident.holds`; never held while anything is copied.

    Attributes:
        evictions: by reason: "room" for another, "compaction" of a pinned one that comes back.
    """

    def __init__(self, residency: Residency, lock: threading.Condition, clock: Callable[[], float] = time.time) -> None:
        self.residency = residency
        self.evictions: Counter[str] = Counter()
        self._lock = lock
        self._clock = clock
        self._moving = threading.Lock()
        self._present: OrderedDict[Resident, None] = OrderedDict()
        self._closing: set[Resident] = set()

    def hold(self, residents: Collection[Resident]) -> bool:
        """Keep all of them, or none; the caller holds the lock."""
        if any(one.slot is None or one in self._closing for one in residents):
            return False
        for one in residents:
            one.holds += 1
            self._used(one)
        return True

    def let_go(self, residents: Collection[Resident]) -> bool:
        """End a hold; whether one may be evicted now. The caller holds the lock."""
        for one in residents:
            assert one.holds > 0, f"{one.version.short} was let go more often than it was held"
            one.holds -= 1
            self._used(one)
        return any(one.holds == 0 for one in residents)

    def room(self, resident: Resident, urgent: Collection[Resident]) -> bool:
        """Whether a version fits once all that may be evicted for it is; the caller holds the lock."""
        possible = sum(one.device_bytes for one in self._victims(urgent))
        return self.residency.used_bytes - possible + resident.device_bytes <= self.residency.budget_bytes

    def close(self, resident: Resident, urgent: Collection[Resident]) -> None:
        """Let nobody new hold the least recently used, until one that waits fits; the caller holds the lock."""
        missing = resident.device_bytes
        for one in self._present:
            if missing > 0 and one.holds and not one.pinned and one not in urgent and one not in self._closing:
                self._closing.add(one)
                missing -= one.device_bytes

    def open(self) -> bool:
        """Everybody may hold what is there; False where that was so. The caller holds the lock."""
        was_closed = bool(self._closing)
        self._closing.clear()
        return was_closed

    def place(self, resident: Resident, packed: Packed, urgent: Collection[Resident] | None) -> bool:
        """Copy a version to the device; False where there is no room.

        Args:
            urgent: what must not be evicted for it; None evicts nothing.
        """
        slot = self._placed(lambda: self.residency.place_packed(packed), urgent)
        if slot is None:
            return False
        with self._lock:
            assert resident.slot is None
            resident.slot = slot
            self._present[resident] = None
        return True

    def place_beside(self, resident: Resident, place: Callable[[], Slot]) -> bool:
        """As `place`, of a version that is never evicted and takes what room others leave or give."""
        slot = self._placed(place, ())
        resident.slot = slot
        return slot is not None

    def drop(self, resident: Resident) -> None:
        """Free the place of a version that nothing uses; the caller holds the lock."""
        assert resident.holds == 0, f"{resident.version.short} is dropped while generations compute with it"
        self._present.pop(resident, None)
        self._closing.discard(resident)
        slot, resident.slot = resident.slot, None
        if slot is not None:
            self.residency.release(slot)

    def _placed(self, place: Callable[[], Slot], urgent: Collection[Resident] | None) -> Slot | None:
        with self._moving:
            while True:
                try:
                    return place()
                except ArenaFullError:
                    if urgent is None or not self._evict_one(urgent):
                        return None

    def _evict_one(self, urgent: Collection[Resident]) -> bool:
        with self._lock:
            reason = "room"
            victim = next(self._victims(urgent), None)
            if victim is None:  # bytes are free, but no gap is: what nobody uses may move, even where it is pinned
                reason = "compaction"
                victim = next((one for one in self._present if not one.holds and one not in urgent), None)
            if victim is None:
                return False
            self.drop(victim)
            self.evictions[reason] += 1
            return True

    def _victims(self, urgent: Collection[Resident]) -> Iterator[Resident]:
        return (one for one in self._present if not (one.holds or one.pinned or one in urgent))

    def _used(self, resident: Resident) -> None:
        resident.last_used_s = self._clock()
        if resident in self._present:
            self._present.move_to_end(resident)
