"""Names, versions and leases: which adapter a name means now, and how long a version must stay.

Must not know: HTTP, the scheduler, kernels, how log-probabilities are computed. A name points to a version; a request
resolves it once and holds a lease until it ends. Publishing moves the pointer in one assignment; a version that no name
points to is freed with its last lease.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.adapters import golden
from motet.adapters.approximate import offer
from motet.adapters.base import BaseModel
from motet.adapters.cache import LoweredCache
from motet.adapters.derived import Derived
from motet.adapters.effects import Lowered
from motet.adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ArenaFullError,
    InvalidNameError,
)
from motet.adapters.gates.build import build
from motet.adapters.golden import Golden
from motet.adapters.heads import HeadFile
from motet.adapters.host import HOST_BYTES, HostTier
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.loader import Background
from motet.adapters.lowering import Lowering, lower, lower_again
from motet.adapters.mixture import obstacle
from motet.adapters.packed import Packed
from motet.adapters.receipt import Receipt, receipt
from motet.adapters.residency import Residency
from motet.adapters.spec import NOTHING_DECLARED, Declared
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    resident: Resident
    receipt: Receipt
    folder: Path
    declared: Declared
    published_s: float


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known about a published adapter.

    Attributes:
        published_s: Unix time of publication.
        leases: requests that use the version now.
        head: its output head, where it has one.
    """

    version: AdapterVersion
    receipt: Receipt
    published_s: float
    leases: int
    head: HeadFile | None = None


Check = Callable[[Golden, Callable[[], Lease]], None]
"""Computes golden log-probabilities through the engine, with leases that each call of the second argument gives.

Raises GoldenError when they are not as expected; every lease it took, it has released or handed on.
"""
Score = Callable[[Callable[[], Lease]], Sequence[Sequence[float]]]
"""Log-probabilities of the tokens of fixed texts through the engine, with leases as for Check.

Raises UnmeasuredError when they cannot be computed.
"""


class Registry:
    """The published adapters.

    Args:
        cache: keeps what was lowered; None lowers every time.
        check: asked before an adapter with golden log-probabilities is published; None where nothing is published for
            requests, as in `motet adapters inspect`.
        score: asked for both forms of an adapter before a lossy one is published; None where nothing is.
        tiers: over the residency and the cache; by default with room for HOST_BYTES.

    Note: every method may be called from any thread. Files are read and lowered outside of the lock, so that running
    requests never wait for a load.
    """

    def __init__(
        self,
        base: BaseModel,
        residency: Residency,
        cache: LoweredCache | None = None,
        check: Check | None = None,
        score: Score | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self.base = base
        self.residency = residency
        self._cache = cache
        self._check = check
        self._score = score
        self.tiers = tiers or Tiers(residency, HostTier(HOST_BYTES), cache, base.fingerprint)
        self.leases = Leases(self.tiers.drop)
        self.derived = Derived(self.tiers, self.leases)
        self._background = Background()
        self._lock = threading.Lock()
        self._published: dict[str, _Entry] = {}

    def load(
        self, name: str, folder: Path, declared: Declared = NOTHING_DECLARED, *, replace: bool = False
    ) -> AdapterInfo:
        """Read, check, lower and place an adapter, then publish it under `name`.

        Args:
            folder: an already confined path, as are those in `declared`.
            replace: whether a published name may move to the new version; requests that run finish on the old one.

        Raises:
            InvalidNameError, AdapterExistsError: before anything is read.
            AdapterError: the adapter is refused; nothing is visible to requests.

        Note: waits for the engine where the folder has golden log-probabilities, and where a lossy form is asked for.
        """
        self._check_name(name, replace)
        lowering, facts, packed = self._background.run(lambda: self._lowered(folder, declared))
        vouched = golden.read(folder, lowering.lowered) if self._check else None
        exact_logprobs = None
        if lowering.exact is not None and self._score is not None:
            exact = Resident(AdapterVersion(name, lowering.exact.digest))
            self.tiers.place_beside(exact, lowering.exact.lowered)
            exact_logprobs = self._scored_exactly(exact, vouched)
            vouched = None  # they are the exact form's
        resident = self._admit(AdapterVersion(name, lowering.digest), lowering, packed, folder, declared)
        try:
            if self._check is not None and vouched is not None:
                self._check(vouched, lambda: self.leases.take(resident))
            if self._score is not None and exact_logprobs is not None:
                facts = facts.measured(exact_logprobs, self._score(lambda: self.leases.take(resident)))
            with self._lock:
                self._check_name(name, replace)
                old = self._published.get(name)
                entry = _Entry(resident, facts, folder, declared, time.time())
                self._published[name] = entry
        except BaseException:
            self.leases.retire(resident)  # a lease of the check may still be on its way back
            raise
        if old is not None:
            self.leases.retire(old.resident)
        return self._info(entry)

    def examine(self, folder: Path, declared: Declared = NOTHING_DECLARED) -> tuple[Lowered, Receipt]:
        """Read, check and lower an adapter without placing it.

        Raises:
            AdapterError: the adapter is refused.
        """
        lowering = lower(folder, declared, self.base, self._cache)
        return lowering.lowered, receipt(lowering, self.base, self.residency.bytes_needed)

    def lowered(self, name: str) -> tuple[AdapterVersion, Lowered]:
        """What the published version was lowered to: from the cache, or by lowering its source again.

        Raises:
            AdapterNotFoundError: the name is not published.
            SourceChangedError: the source holds something else by now.
            AdapterError: the source can no longer be read.
        """
        with self._lock:
            entry = self._entry(name)
        version = entry.resident.version
        return version, lower_again(version, entry.folder, entry.declared, self.base, self._cache)

    def lowered_version(self, version: AdapterVersion) -> Lowered:
        """What a published version was lowered to.

        Raises:
            AdapterNotFoundError: its name means another version by now, or none.
            AdapterError: the source holds something else by now, or can no longer be read.
        """
        found, lowered = self.lowered(version.name)
        if found != version:
            raise AdapterNotFoundError(f"adapter {version.name!r} was replaced meanwhile; ask again")
        return lowered

    def unload(self, name: str) -> AdapterInfo:
        """Take the name away; the version is freed when its last lease ends.

        Raises:
            AdapterNotFoundError: the name is not published.
        """
        with self._lock:
            entry = self._entry(name)
            del self._published[name]
        self.leases.retire(entry.resident)
        return self._info(entry)

    def acquire(self, name: str) -> Lease:
        """Resolve a name, once, for one request.

        Raises:
            AdapterNotFoundError: the name is not published.
        """
        with self._lock:
            return self.leases.take(self._entry(name).resident)

    def renew(self, lease: Lease) -> Lease:
        """Another lease on the same version, for another generation of the same request."""
        return self.leases.take(lease.resident)

    def release(self, lease: Lease) -> None:
        """End a lease; each lease ends exactly once."""
        self.leases.release(lease)

    def published(self) -> list[AdapterInfo]:
        """All published adapters, by name."""
        with self._lock:
            entries = [self._published[name] for name in sorted(self._published)]
        return [self._info(entry) for entry in entries]

    def get(self, name: str) -> AdapterInfo:
        """One published adapter.

        Raises:
            AdapterNotFoundError: the name is not published.
        """
        with self._lock:
            return self._info(self._entry(name))

    def _lowered(self, folder: Path, declared: Declared) -> tuple[Lowering, Receipt, Packed]:
        lowering = lower(folder, declared, self.base, self._cache)
        facts = receipt(lowering, self.base, self.residency.bytes_needed)
        return lowering, facts, self.residency.pack(lowering.lowered)

    def _admit(
        self, version: AdapterVersion, lowering: Lowering, packed: Packed, folder: Path, declared: Declared
    ) -> Resident:
        lowered = lowering.lowered
        gate, unmixable = None if lowered.gate is None else build(lowered.gate), obstacle(lowered)
        resident = Resident(version, lowering.own, gate, unmixable, lowering.head)
        again = functools.partial(lower_again, version, folder, declared, self.base, self._cache)
        try:
            self._background.run(lambda: self.derived.admit(resident, packed, again))
        except ArenaFullError as error:
            exact = lowering.exact or lowering
            raise ArenaFullError(f"{error}{offer(exact.lowered, self.base, self.residency.bytes_needed)}") from None
        return resident

    def _scored_exactly(self, exact: Resident, vouched: Golden | None) -> Sequence[Sequence[float]]:
        """What an unpublished exact form says of the fixed texts, for the last time; golden values are checked too."""
        assert self._score is not None
        try:
            if self._check is not None and vouched is not None:
                self._check(vouched, lambda: self.leases.take(exact))
            return self._score(lambda: self.leases.take(exact))
        finally:
            self.leases.retire(exact)

    def _check_name(self, name: str, replace: bool) -> None:
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidNameError(
                f"adapter name {name!r} is not allowed; use up to 128 letters, digits and . _ : / @ + -, and begin "
                "with a letter or digit"
            )
        if name == self.base.name:
            raise InvalidNameError(f"adapter name {name!r} is the base model's name; choose another")
        if not replace and name in self._published:
            raise AdapterExistsError(
                f"adapter {name!r} is already loaded; unload it first, or ask for replacement (load_inplace)"
            )

    def _entry(self, name: str) -> _Entry:
        """The published entry of a name; the caller holds the lock."""
        entry = self._published.get(name)
        if entry is None:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded; GET /v1/models lists what is")
        return entry

    @staticmethod
    def _info(entry: _Entry) -> AdapterInfo:
        resident = entry.resident
        return AdapterInfo(resident.version, entry.receipt, entry.published_s, resident.leases, resident.head)
