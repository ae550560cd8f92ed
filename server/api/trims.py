"""Merges with trimmed weights: materialised once by their content, on a thread of their own, one after the other.

Must not know: HTTP, support sets, how weights are trimmed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from motet.adapters import trimming
from motet.adapters.effects import Lowered
from motet.adapters.errors import ArenaFullError
from motet.adapters.gates.pool import PoolGate
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from motet.adapters.trimming import Trimmed
from motet.adapters.version import AdapterVersion, Digest


@dataclass(slots=True, eq=False)
class Trims:
    """What merges of pools are trimmed to.

    Note: used by one event loop. A decomposition takes seconds: one runs at a time, beside the steps.
    """

    registry: Registry
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def require_possible(self, gate: PoolGate, share: float) -> None:
        """Require what can be told before anything is computed.

        Raises:
            GateError: the share is out of range, or leaves nothing of a target.
            ArenaFullError: the weights would not fit if they were alone.
        """
        registry = self.registry
        trimming.ranks(gate.targets, share, registry.base)
        needed = registry.residency.bytes_needed(trimming.outline(gate.targets, registry.base))
        if needed > registry.residency.budget_bytes:
            raise ArenaFullError(
                f"the trimmed weights need {needed:,} bytes; adapter memory has {registry.residency.budget_bytes:,}: "
                "merge without trim, or raise --adapter-memory"
            )

    async def lease(self, pool: AdapterVersion, alpha: Sequence[float], share: float) -> Lease:
        """A lease on a pool's merge with trimmed weights; the caller holds one on the pool.

        Raises:
            AdapterNotFoundError: the pool's name means another version by now, or none.
            ArenaFullError: there is no room.
        """

        def make() -> tuple[Lowered, Trimmed]:
            return trimming.trimmed(self.registry.lowered_version(pool), alpha, share, self.registry.base)

        derived, version = self.registry.derived, version_of(pool, alpha, share)
        if (lease := await asyncio.to_thread(derived.find, version)) is not None:
            return lease
        async with self._turn:
            return await asyncio.to_thread(derived.acquire, version, make)

    async def drop(self, pool: AdapterVersion, alpha: Sequence[float], share: float) -> None:
        """Free it once nobody uses it; another merge of the same weights has it made again."""
        await asyncio.to_thread(self.registry.derived.drop, version_of(pool, alpha, share))


def version_of(pool: AdapterVersion, alpha: Sequence[float], share: float) -> AdapterVersion:
    """What a trimmed merge is called: equal weights of equal content have one name."""
    digest = hashlib.sha256(repr((pool.digest, tuple(alpha), float(share))).encode()).hexdigest()
    return AdapterVersion(f"trim({pool.name})", Digest(digest))
