"""The host tier: packed adapters in the server's own memory, the least recently used given up first, within a budget.

Must not know: where they come from or go to. Beside what may be given up it counts what must stay while its owner
exists: heads, gates, and what nothing else could make again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from motet.adapters.errors import HostFullError
from motet.adapters.packed import Packed

HOST_BYTES = 4 << 30
"""Where nobody says how much."""


class HostTier:
    """Packed adapters by their owner.

    Args:
        budget_bytes: of everything together.

    Attributes:
        evictions: packed forms that were given up for others.

    Note: every method may be called from any thread, and none waits.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.evictions = 0
        self._lock = threading.Lock()
        self._packed: OrderedDict[Hashable, Packed] = OrderedDict()
        self._kept: dict[Hashable, Packed] = {}
        self._fixed: dict[Hashable, int] = {}
        self._used = 0

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._used

    def bytes_of(self, owner: Hashable) -> int:
        """What an owner takes here."""
        with self._lock:
            return self._fixed.get(owner, 0) + (self._packed[owner].bytes if owner in self._packed else 0)

    def fix(self, owner: Hashable, bytes_: int, kept: Packed | None = None) -> None:
        """Count what stays until the owner is dropped; others make room.

        Args:
            bytes_: of what lies elsewhere.
            kept: a packed form that is not to be given up.

        Raises:
            HostFullError: together with what else must stay it exceeds the budget; nothing was changed.
        """
        bytes_ += 0 if kept is None else kept.bytes
        with self._lock:
            fixed = sum(self._fixed.values())
            if fixed + bytes_ > self.budget_bytes:
                raise HostFullError(
                    f"the adapter needs {bytes_:,} bytes of host memory for as long as it is there; {fixed:,} of the "
                    f"{self.budget_bytes:,} bytes are taken like that: unload an adapter or raise --host-memory"
                )
            self._make_room(bytes_)
            self._fixed[owner] = self._fixed.get(owner, 0) + bytes_
            self._used += bytes_
            if kept is not None:
                self._kept[owner] = kept

    def get(self, owner: Hashable) -> Packed | None:
        """The packed form, where it is here; now the latest used."""
        with self._lock:
            if owner in self._packed:
                self._packed.move_to_end(owner)
            return self._packed.get(owner) or self._kept.get(owner)

    def make_room(self, bytes_: int) -> bool:
        """Give up what keeps a packed form of this size from being put; False where that is not enough."""
        with self._lock:
            if sum(self._fixed.values()) + bytes_ > self.budget_bytes:
                return False
            self._make_room(bytes_)
            return True

    def put(self, owner: Hashable, packed: Packed) -> bool:
        """Keep a packed form; False where it would not fit even alone."""
        with self._lock:
            if owner in self._packed:
                return True
            if sum(self._fixed.values()) + packed.bytes > self.budget_bytes:
                return False
            self._make_room(packed.bytes)
            self._packed[owner] = packed
            self._used += packed.bytes
            return True

    def drop(self, owner: Hashable) -> None:
        """Forget everything of an owner that is gone."""
        with self._lock:
            packed = self._packed.pop(owner, None)
            self._kept.pop(owner, None)
            self._used -= self._fixed.pop(owner, 0) + (0 if packed is None else packed.bytes)

    def _make_room(self, needed_bytes: int) -> None:
        """The caller holds the lock, and knows that there is room without the packed forms."""
        while self._used + needed_bytes > self.budget_bytes:
            _, packed = self._packed.popitem(last=False)
            self._used -= packed.bytes
            self.evictions += 1
