"""From a folder to a version in memory that has passed every check, and that nobody sees yet.

Must not know: names' meaning, other versions, HTTP, how log-probabilities are computed.
"""

from __future__ import annotations

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
from motet.adapters.lowering import Lowering, lower
from motet.adapters.mixture import obstacle
from motet.adapters.origin import Origin, Resolve
from motet.adapters.receipt import Receipt, receipt
from motet.adapters.residency import Residency
from motet.adapters.spec import Declared
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


class Publishing:
    """Prepares versions.

    Args:
        cache, check, score, resolve: as in `Registry`.

    Note: any number of threads may prepare at once.
    """

    def __init__(
        self,
        base: BaseModel,
        residency: Residency,
        leases: Leases,
        derived: Derived,
        cache: LoweredCache | None,
        check: Check | None,
        score: Score | None,
        resolve: Resolve,
    ) -> None:
        self._base, self._residency, self._leases, self._derived = base, residency, leases, derived
        self._cache, self._check, self._score, self._resolve = cache, check, score, resolve

    def examine(self, folder: Path, declared: Declared) -> tuple[Lowering, Receipt]:
        """Read, check and lower an adapter without placing it.

        Raises:
            AdapterError: the adapter is refused.
        """
        lowering = lower(folder, declared, self._base, self._cache)
        return lowering, receipt(lowering, self._base, self._residency.bytes_needed)

    def lowered(self, version: AdapterVersion, origin: Origin) -> Lowered:
        """What a version was lowered to: from the cache, or by lowering its source again.

        Raises:
            SourceChangedError: the source holds something else by now.
            AdapterError: the source can no longer be read.
        """
        cached = self._cache.get(self._base.fingerprint, version.digest) if self._cache else None
        if cached is not None:
            return cached
        with self._resolve(origin) as (folder, declared):
            found = lower(folder, declared, self._base, self._cache)
        if found.digest != version.digest:
            raise SourceChangedError(
                f"adapter {version.name!r} is published with digest {version.digest}, but its source has digest "
                f"{found.digest} by now; load it again to serve what its source holds"
            )
        return found.lowered

    def prepare(self, name: str, origin: Origin, expected: Digest | None = None) -> Prepared:
        """Read, check, lower and place an adapter; it stays until it is retired.

        Args:
            expected: the digest that it must have.

        Raises:
            SourceChangedError: it has another one.
            AdapterError: the adapter is refused; nothing is left of it.

        Note: waits for the engine where the folder has golden log-probabilities, and where a lossy form is asked for.
        """
        with self._resolve(origin) as (folder, declared):
            return self._prepared(name, folder, declared, expected)

    def _prepared(self, name: str, folder: Path, declared: Declared, expected: Digest | None) -> Prepared:
        lowering, facts = self.examine(folder, declared)
        if expected is not None and lowering.digest != expected:
            raise SourceChangedError(
                f"the source of adapter {name!r} has digest {lowering.digest}, not {expected}; give the digest that it "
                "has, or publish what it holds as a new version"
            )
        vouched = golden.read(folder, lowering.lowered) if self._check else None
        exact_logprobs = None
        if lowering.exact is not None and self._score is not None:
            slot = self._derived.place_beside(lowering.exact.lowered)
            exact = Resident(AdapterVersion(name, lowering.exact.digest), slot)
            exact_logprobs = self._scored_exactly(exact, vouched)
            vouched = None  # they are the exact form's
        resident = self._place(name, lowering)
        try:
            if self._check is not None and vouched is not None:
                self._check(vouched, lambda: self._leases.take(resident))
            if self._score is not None and exact_logprobs is not None:
                facts = facts.measured(exact_logprobs, self._score(lambda: self._leases.take(resident)))
        except BaseException:
            self._leases.retire(resident)  # a lease of the check may still be on its way back
            raise
        return Prepared(resident, facts)

    def _place(self, name: str, lowering: Lowering) -> Resident:
        lowered = lowering.lowered
        gate, unmixable = None if lowered.gate is None else build(lowered.gate), obstacle(lowered)
        try:
            slot = self._derived.place(lowered)
        except ArenaFullError as error:
            exact = lowering.exact or lowering
            raise ArenaFullError(f"{error}{offer(exact.lowered, self._base, self._residency.bytes_needed)}") from None
        return Resident(AdapterVersion(name, lowering.digest), slot, lowering.own, gate, unmixable, lowering.head)

    def _scored_exactly(self, exact: Resident, vouched: Golden | None) -> Sequence[Sequence[float]]:
        """What an unpublished exact form says of the fixed texts, for the last time; golden values are checked too."""
        assert self._score is not None
        try:
            if self._check is not None and vouched is not None:
                self._check(vouched, lambda: self._leases.take(exact))
            return self._score(lambda: self._leases.take(exact))
        finally:
            self._leases.retire(exact)
