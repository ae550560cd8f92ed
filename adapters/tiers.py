"""Source, disk, host, device: where every version is, and how it comes to the device when a generation needs it there.

    source → lowered (disk) → packed (disk) → packed (host) → arena (device)

Must not know: requests, names' meaning, steps, how anything is lowered. The step thread asks and tells; all that takes
time is done by the loader's thread, or by that of whoever publishes.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from motet.adapters import refusals
from motet.adapters.cache import LoweredCache
from motet.adapters.device import Device
from motet.adapters.effects import Lowered
from motet.adapters.errors import AdapterError, ArenaFullError
from motet.adapters.host import HostTier
from motet.adapters.lease import Lease, Resident, residents_of
from motet.adapters.loader import Loader
from motet.adapters.packed import Packed
from motet.adapters.residency import Residency
from motet.adapters.supply import Again, Moves, Supply

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long one that finds no room waits for others to end, before nobody new may use what is in its way."""
RETRY_S = 10.0
"""How long a failure is told before the next request tries again."""


class Tiers:
    """See `motet.server.engine.types.Memory`.

    Args:
        cache: the disk tier; None where every version is lowered again once the host has given it up.
        fingerprint: of the base.

    Note: every method may be called from any thread; those that the engine calls never wait for a move.
    """

    def __init__(
        self, residency: Residency, host: HostTier, cache: LoweredCache | None = None, fingerprint: str = ""
    ) -> None:
        self.residency, self.host, self.moves = residency, host, Moves()
        self._supply = Supply(residency, host, cache, fingerprint, self.moves)
        self._changed = threading.Condition()
        self._device = Device(residency, self._changed)
        self._loader = Loader(self._turn)
        self._wake: Callable[[], None] = lambda: None
        self._again: dict[Resident, Again | None] = {}
        self._wanted: list[Resident] = []
        self._preloads: OrderedDict[Resident, None] = OrderedDict()
        self._pinned: set[Resident] = set()
        self._blocked: tuple[Resident, float] | None = None
        self._stuck = False
        self._impossible: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()
        self._stopping = False

    def listen(self, wake: Callable[[], None]) -> None:
        """Call this, in the loader's thread, whenever a version arrived or failed."""
        self._wake = wake

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loader's thread after what it does now."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._loader.join(timeout_s)

    # ------------------------------------------------------------------------------------------ what the engine calls

    def hold(self, leases: Sequence[object]) -> bool:
        """Keep all of these versions on the device until let_go; False, and nothing held, while one is not there."""
        residents = residents_of(leases)
        with self._changed:
            if self._device.hold(residents):
                return True
            if (why := self._together(residents)) is not None:
                self._impossible.update(dict.fromkeys(leases, why))
            return False

    def let_go(self, leases: Sequence[object]) -> None:
        """End what one successful `hold` of the same leases began."""
        residents = residents_of(leases)
        with self._changed:
            if self._device.let_go(residents) and self._blocked is not None:
                self._tell()

    def want(self, leases: Sequence[object]) -> None:
        """What queued generations need next, most urgent first; replaces the last such list."""
        wanted = list(dict.fromkeys(residents_of(leases)))
        with self._changed:
            if wanted == self._wanted:
                return
            self._wanted = wanted
            if self._blocked is not None or any(one.slot is None for one in wanted):
                self._tell()

    def failure(self, lease: object) -> str | None:
        """Why a version cannot be brought to the device; forgotten after RETRY_S."""
        (resident,) = residents_of([lease])
        with self._changed:
            if resident.failure is not None and time.monotonic() - resident.failure[1] > RETRY_S:
                resident.failure = None
                self._tell()
            return self._impossible.get(lease) if resident.failure is None else resident.failure[0]

    # ------------------------------------------------------------------------------------ what the registry calls

    def admit(self, resident: Resident, packed: Packed, again: Again | None) -> None:
        """Take in a new version: to the host, to the disk, and to the device where there is room without evicting.

        Args:
            again: None where nothing can make it again: the host keeps it as long as it exists.

        Raises:
            ArenaFullError: it does not fit on the device beside what is pinned there.
            HostFullError: what must stay of it does not fit into the host memory.
        """
        resident.device_bytes, resident.vocabulary = packed.units_NU.nbytes, packed.vocabulary
        with self._changed:
            self._require_room(resident)
        self._supply.take_in(resident, packed, again)
        with self._changed:
            self._again[resident] = again
        self._device.place(resident, packed, None)

    def require_together(self, leases: Sequence[Lease]) -> None:
        """Require that a request may hold all of these at the same time.

        Raises:
            ArenaFullError: they do not fit on the device beside what is pinned there.
        """
        with self._changed:
            if (why := self._together(residents_of(leases))) is not None:
                raise ArenaFullError(why)

    def place_beside(self, resident: Resident, lowered: Lowered) -> None:
        """Place a version that is there for a moment only; see `Residency.place_beside`.

        Raises:
            ArenaFullError: there is no room.
        """
        if not self._device.place_beside(resident, lambda: self.residency.place_beside(lowered)):
            needed, budget = self.residency.bytes_needed(lowered), self.residency.budget_bytes
            raise ArenaFullError(refusals.no_room_beside(needed, budget))

    def drop(self, resident: Resident) -> None:
        """Free all that a version takes in memory; it has no lease any more."""
        with self._changed:
            self._again.pop(resident, None)
            self._preloads.pop(resident, None)
            self._pinned.discard(resident)
            self._device.drop(resident)
            if self._blocked is not None:
                self._tell()
        self.host.drop(resident)

    def pin(self, resident: Resident) -> None:
        """Bring a version to the device, to stay there.

        Raises:
            ArenaFullError: the largest version that is not pinned would have no room left.
        """
        with self._changed:
            unpinned = (one.device_bytes for one in self._again if not (one.pinned or one is resident))
            largest, pinned = max(unpinned, default=0), self._pinned_bytes(resident) + resident.device_bytes
            if pinned + largest > self.residency.budget_bytes:
                raise ArenaFullError(refusals.unpinnable(resident, pinned, largest, self.residency.budget_bytes))
            resident.pinned = True
            self._pinned.add(resident)
            if resident.slot is None:
                self._tell()

    def unpin(self, resident: Resident) -> None:
        """Let a version be evicted again."""
        with self._changed:
            resident.pinned = False
            self._pinned.discard(resident)
            if self._blocked is not None:
                self._tell()

    def preload(self, resident: Resident) -> None:
        """Bring a version to the device once nothing more urgent is to be brought there."""
        with self._changed:
            if resident.slot is None and resident in self._again:
                self._preloads[resident] = None
                self._tell()

    # ------------------------------------------------------------------------------------------------ what people ask

    def bytes_of(self, resident: Resident) -> Mapping[str, int]:
        """What a version takes now, by tier."""
        return {"device": 0 if resident.slot is None else resident.device_bytes, **self._supply.bytes_of(resident)}

    def residents(self) -> list[Resident]:
        """Every version that exists."""
        with self._changed:
            return list(self._again)

    @property
    def evictions(self) -> Mapping[tuple[str, str], int]:
        """(tier, reason) → how many."""
        device = {("device", reason): count for reason, count in self._device.evictions.items()}
        return {**device, ("host", "room"): self.host.evictions}

    # ------------------------------------------------------------------------------------------ the loader's thread

    def _turn(self) -> bool:
        """Bring what is most urgent, or wait; False once stopping."""
        with self._changed:
            while (found := self._next()) is None and not self._stopping:
                self._changed.wait(None if self._blocked is None else PATIENCE_S)
            if self._stopping or found is None:
                return False
            resident, urgent = found
            again = self._again[resident]
        placed, failure = False, None
        try:
            packed = self._supply.fetch(resident, again)
            began_s = time.perf_counter()
            placed = self._device.place(resident, packed, urgent)
            if placed:
                self.moves.count("host", "device", began_s)
        except AdapterError as error:
            failure = str(error)
        except Exception:
            logger.exception("adapter %s cannot be brought to the device", resident.version.short)
            failure = f"adapter {resident.version.name!r} cannot be read; the server's log says why"
        with self._changed:
            if failure is not None:
                resident.failure = failure, time.monotonic()
            if placed or failure is not None:
                self._preloads.pop(resident, None)
                self._unblock()
            self._stuck = not placed and failure is None  # bytes are free, but no gap is
            if resident not in self._again:  # dropped meanwhile
                self._device.drop(resident)
                self.host.drop(resident)
        self._wake()
        return True

    def _next(self) -> tuple[Resident, Sequence[Resident]] | None:
        """What to bring now, and what must not give way to it; the caller holds the lock."""
        queue = [*self._wanted, *self._pinned, *self._preloads]
        for place, resident in enumerate(queue):
            if resident.slot is not None or resident.failure is not None or resident not in self._again:
                continue
            urgent = queue[:place]
            if self._device.room(resident, urgent) and not self._stuck:
                return resident, urgent
            self._block(resident, urgent)
            return None
        self._unblock()
        return None

    def _block(self, resident: Resident, urgent: Sequence[Resident]) -> None:
        """It waits for room; after a while nobody new may use what is in its way."""
        now_s = time.monotonic()
        if self._blocked is None or self._blocked[0] is not resident:
            self._unblock()
            self._blocked = resident, now_s
        elif now_s - self._blocked[1] >= PATIENCE_S:
            self._device.close(resident, urgent)
            self._blocked = resident, now_s

    def _unblock(self) -> None:
        self._blocked = None
        if self._device.open():
            self._wake()

    def _tell(self) -> None:
        """Something changed that the loader may have waited for; the caller holds the lock."""
        self._stuck = False
        self._loader.start()
        self._changed.notify_all()

    def _require_room(self, resident: Resident) -> None:
        pinned, budget = self._pinned_bytes(resident), self.residency.budget_bytes
        if resident.device_bytes + pinned > budget:
            raise ArenaFullError(refusals.too_large(resident, pinned, budget))

    def _together(self, residents: Sequence[Resident]) -> str | None:
        needed, budget = sum(one.device_bytes for one in self._pinned | set(residents)), self.residency.budget_bytes
        return refusals.too_many(residents, needed, budget) if needed > budget else None

    def _pinned_bytes(self, but: Resident) -> int:
        return sum(one.device_bytes for one in self._pinned if one is not but)
