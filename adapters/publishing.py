"""From a folder to a version in memory that has passed every check, and that nobody sees yet.

Must not know: names' meaning, other versions, HTTP, how log-probabilities are computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.adapters import golden
from motet.adapters.approximate import offer
from motet.adapters.base import BaseModel
from motet.adapters.cache import LoweredCache
from motet.adapters.derived import Derived
from motet.adapters.effects import Lowered
from motet.adapters.errors import ArenaFullError, SourceChangedError
from motet.adapters.gates.build import build
from motet.adapters.golden import Golden
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.loader import Background
from motet.adapters.lowering import Lowering, lower
from motet.adapters.mixture import obstacle
from motet.adapters.origin import Origin, Resolve
from motet.adapters.packed import Packed
from motet.adapters.receipt import Receipt, receipt
from motet.adapters.spec import Declared
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion, Digest

Check = Callable[[Golden, Callable[[], Lease]], None]
"""Computes golden log-probabilities through the engine, with leases that each call of the second argument gives.

Raises GoldenError when they are not as expected; every lease it took, it has released or handed on.
"""
Score = Callable[[Callable[[], Lease]], Sequence[Sequence[float]]]
"""Log-probabilities of the tokens of fixed texts through the engine, with leases as for Check.

Raises UnmeasuredError when they cannot be computed.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A version that may be published, or retired where it is not."""

    resident: Resident
    receipt: Receipt
    origin: Origin


class Publishing:
    """Prepares versions.

    Args:
        cache, check, score, resolve: as in `Registry`.

    Note: any number of threads may prepare at once; one lowers.
    """

    def __init__(
        self,
        base: BaseModel,
        tiers: Tiers,
        leases: Leases,
        derived: Derived,
        cache: LoweredCache | None,
        check: Check | None,
        score: Score | None,
        resolve: Resolve,
    ) -> None:
        self._base, self._tiers, self._leases, self._derived = base, tiers, leases, derived
        self._cache, self._check, self._score, self._resolve = cache, check, score, resolve
        self._background = Background()

    def examine(self, folder: Path, declared: Declared) -> tuple[Lowering, Receipt]:
        """Read, check and lower an adapter without placing it.

        Raises:
            AdapterError: the adapter is refused.
        """
        lowering = lower(folder, declared, self._base, self._cache)
        return lowering, receipt(lowering, self._base, self._tiers.residency.bytes_needed)

    def lowered(self, version: AdapterVersion, origin: Origin) -> Lowered:
        """What a version was lowered to: from the cache, or by lowering its source again.

        Raises:
            SourceChangedError: the source holds something else by now.
            AdapterError: the source can no longer be read.
        """
        cached = self._cache.get(self._base.fingerprint, version.digest) if self._cache else None
        if cached is not None:
            return cached
        with self._resolve(origin) as found:
            lowering = lower(found.folder, found.declared, self._base, self._cache)
        if lowering.digest != version.digest:
            raise SourceChangedError(
                f"adapter {version.name!r} is published with digest {version.digest}, but its source has digest "
                f"{lowering.digest} by now; load it again to serve what its source holds"
            )
        return lowering.lowered

    def prepare(self, name: str, origin: Origin, expected: Digest | None, pinned: bool) -> Prepared:
        """Read, check, lower and take in an adapter; it exists until it is retired.

        Args:
            expected: the digest that it must have.
            pinned: whether it is to stay on the device.

        Raises:
            SourceChangedError: it has another one.
            AdapterError: the adapter is refused; nothing is left of it.

        Note: waits for the engine where the folder has golden log-probabilities, and where a lossy form is asked for.
        """
        with self._resolve(origin) as found:
            folder, declared = found.folder, found.declared
            lowering, facts, packed = self._background.run(lambda: self._packed(folder, declared))
            vouched = golden.read(found.folder, lowering.lowered) if self._check else None
        if expected is not None and lowering.digest != expected:
            raise SourceChangedError(
                f"the source of adapter {name!r} has digest {lowering.digest}, not {expected}; give the digest that it "
                "has, or publish what it holds as a new version"
            )
        exact_logprobs = None
        if lowering.exact is not None and self._score is not None:
            exact = Resident(AdapterVersion(name, lowering.exact.digest))
            self._tiers.place_beside(exact, lowering.exact.lowered)
            exact_logprobs = self._scored_exactly(exact, vouched)
            vouched = None  # they are the exact form's
        resident = self._admit(name, lowering, packed, found.origin)
        try:
            if pinned:
                self._tiers.pin(resident)
            if self._check is not None and vouched is not None:
                self._check(vouched, lambda: self._leases.take(resident))
            if self._score is not None and exact_logprobs is not None:
                facts = facts.measured(exact_logprobs, self._score(lambda: self._leases.take(resident)))
        except BaseException:
            self._leases.retire(resident)  # a lease of the check may still be on its way back
            raise
        return Prepared(resident, facts, found.origin)

    def _packed(self, folder: Path, declared: Declared) -> tuple[Lowering, Receipt, Packed]:
        lowering, facts = self.examine(folder, declared)
        return lowering, facts, self._tiers.residency.pack(lowering.lowered)

    def _admit(self, name: str, lowering: Lowering, packed: Packed, origin: Origin) -> Resident:
        lowered, version = lowering.lowered, AdapterVersion(name, lowering.digest)
        gate, unmixable = None if lowered.gate is None else build(lowered.gate), obstacle(lowered)
        resident = Resident(version, lowering.own, gate, unmixable, lowering.head)
        again = functools.partial(self.lowered, version, origin)
        try:
            self._background.run(lambda: self._derived.admit(resident, packed, again))
        except ArenaFullError as error:
            exact, needed = lowering.exact or lowering, self._tiers.residency.bytes_needed
            raise ArenaFullError(f"{error}{offer(exact.lowered, self._base, needed)}") from None
        return resident

    def _scored_exactly(self, exact: Resident, vouched: Golden | None) -> Sequence[Sequence[float]]:
        """What an unpublished exact form says of the fixed texts, for the last time; golden values are checked too."""
        assert self._score is not None
        try:
            if self._check is not None and vouched is not None:
                self._check(vouched, lambda: self._leases.take(exact))
            return self._score(lambda: self._leases.take(exact))
        finally:
            self._leases.retire(exact)
