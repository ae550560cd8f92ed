"""Names, versions and leases: which adapter a name means now, and how long a version must stay.

Must not know: HTTP, the scheduler, kernels, how a version is made, where names are kept. A name points to a version; a
request resolves it once and holds a lease until it ends. Publishing moves the pointer in one assignment, after the
catalogue has it on the disk; a version that no name points to is freed with its last lease.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from motet.adapters.base import BaseModel
from motet.adapters.cache import LoweredCache
from motet.adapters.catalogue import Act, Catalogue, Named
from motet.adapters.condition import ANY, KNOWN, NEW, NO_TERMS, Condition, Terms
from motet.adapters.derived import Derived
from motet.adapters.effects import Lowered
from motet.adapters.errors import AdapterError, AdapterNotFoundError, NameBusyError, PublishesFullError
from motet.adapters.host import HOST_BYTES, HostTier
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.names import check_name
from motet.adapters.origin import Origin, Resolve, folders
from motet.adapters.pointers import Entry, Pointers, unknown
from motet.adapters.publishing import Check, Prepared, Publishing, Score
from motet.adapters.receipt import Receipt
from motet.adapters.residency import Residency
from motet.adapters.spec import NOTHING_DECLARED, Declared
from motet.adapters.standing import AdapterInfo, Standing
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion

PUBLISHES = 2
"""At once: a singular value decomposition takes a processor."""


class Registry:
    """The published adapters.

    Args:
        cache: keeps what was lowered; None lowers every time.
        check: asked before an adapter with golden log-probabilities is published; None where nothing is published for
            requests, as in `motet adapters inspect`.
        score: asked for both forms of an adapter before a lossy one is published; None where nothing is.
        tiers: over the residency and the cache; by default with room for HOST_BYTES.
        catalogue: where names are kept; None keeps them in memory.
        resolve: finds what is published or restored.

    Note: every method may be called from any thread. Nothing that requests wait for is held while files are read and
    lowered, or the catalogue is written.
    """

    def __init__(
        self,
        base: BaseModel,
        residency: Residency,
        cache: LoweredCache | None = None,
        check: Check | None = None,
        score: Score | None = None,
        tiers: Tiers | None = None,
        catalogue: Catalogue | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self.base = base
        self.residency = residency
        self.tiers = tiers or Tiers(residency, HostTier(HOST_BYTES), cache, base.fingerprint)
        self.leases = Leases(self.tiers.drop)
        self.derived = Derived(self.tiers, self.leases)
        self.catalogue = catalogue or Catalogue(None, base.fingerprint)
        self._publishing = Publishing(
            base, self.tiers, self.leases, self.derived, cache, check, score, resolve or folders(())
        )
        self.pointers = Pointers(self.leases, self.tiers.bytes_of)
        self._lock = threading.Lock()
        self._changing: dict[str, bool] = {}
        """Name → whether a version is being prepared for it."""

    def load(
        self, name: str, folder: Path, declared: Declared = NOTHING_DECLARED, *, replace: bool = False
    ) -> AdapterInfo:
        """Publish a folder of this machine; `publish` says the rest.

        Args:
            replace: whether a published name may move to the new version.
        """
        return self.publish(name, Origin.of(folder, declared), Terms(ANY if replace else NEW))

    def publish(self, name: str, origin: Origin, terms: Terms) -> AdapterInfo:
        """Read, check, lower and place an adapter, then let `name` mean it; requests that run stay on the old version.

        Raises:
            InvalidNameError, AdapterExistsError, VersionConflictError: before anything is read.
            NameBusyError, PublishesFullError: others are at it.
            AdapterError: the adapter is refused, or the catalogue cannot be written; nothing is visible to requests.

        Note: waits for the engine where the folder has golden log-probabilities, and where a lossy form is asked for.
        """
        check_name(name, self.base.name)
        act = Act(terms.actor, "publish", name)
        with self._change(act, terms.condition, prepares=True) as named:
            prepared = self._publishing.prepare(name, origin, terms.digest, _pinned(named, terms))
            return self._move(act, named, prepared, terms)

    def rollback(self, name: str, to: str | None, terms: Terms) -> AdapterInfo:
        """Publish a kept version again, exactly.

        Args:
            to: first digits of its digest; None is the version before the current one.

        Raises:
            AdapterNotFoundError: the name is not published, or the version is not kept.
            SourceChangedError: the version's source holds something else by now.
            AdapterError: as `publish`.
        """
        act = Act(terms.actor, "rollback", name)
        with self._change(act, terms.condition, prepares=True) as named:
            KNOWN.require(name, named)
            assert named is not None
            version = named.version(to)
            pinned = _pinned(named, terms)
            prepared = self._publishing.prepare(name, version.origin, version.digest, pinned)
            return self._move(act, named, prepared, terms)

    def restore(self, report: Callable[[str], None], besides: Collection[str] = ()) -> None:
        """Serve what the catalogue has. A name that cannot be restored answers with its error until it is published.

        Args:
            report: hears each name before it is loaded.
            besides: names to leave out: they are about to be published.
        """
        for named in self.catalogue.names():
            if named.name in besides:
                continue
            report(named.name)
            current = named.current
            try:
                check_name(named.name, self.base.name)
                prepared = self._publishing.prepare(named.name, current.origin, current.digest, named.pinned)
            except AdapterError as error:
                self.pointers.fail(named.name, str(error))
                continue
            entry = Entry(prepared.resident, prepared.receipt, current.origin, current.published_s, named.quota)
            self.pointers.move(named.name, entry)

    def unload(self, name: str, terms: Terms = NO_TERMS) -> AdapterVersion:
        """Take the name away, and what it meant before; each version is freed when its last lease ends.

        Raises:
            AdapterNotFoundError: the name is not published.
            VersionConflictError, NameBusyError, CatalogueError: nothing changed.
        """
        act = Act(terms.actor, "delete", name)
        with self._change(act, terms.condition, prepares=False) as named:
            KNOWN.require(name, named)
            assert named is not None
            self.catalogue.remove(act)
            self._unpin(self.pointers.drop(name))
            return AdapterVersion(name, named.current.digest)

    def examine(self, folder: Path, declared: Declared = NOTHING_DECLARED) -> tuple[Lowered, Receipt]:
        """Read, check and lower an adapter without placing it.

        Raises:
            AdapterError: the adapter is refused.
        """
        lowering, receipt = self._publishing.examine(folder, declared)
        return lowering.lowered, receipt

    def lowered(self, name: str) -> tuple[AdapterVersion, Lowered]:
        """What the published version was lowered to: from the cache, or by lowering its source again.

        Raises:
            AdapterNotFoundError: the name is not published.
            SourceChangedError: the source holds something else by now.
            AdapterError: the source can no longer be read.
        """
        entry = self.pointers.entry(name)
        version = entry.resident.version
        return version, self._publishing.lowered(version, entry.origin)

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

    def acquire(self, name: str) -> Lease:
        """Resolve a name, once, for one request; `name@digest` is that version or nothing, unless it is itself a name.

        Raises:
            AdapterNotFoundError: the name is not published, or means another version.
            AdapterFailedError: the name could not be restored.
        """
        return self.pointers.take(name)

    def renew(self, lease: Lease) -> Lease:
        """Another lease on the same version, for another generation of the same request."""
        return self.leases.take(lease.resident)

    def release(self, lease: Lease) -> None:
        """End a lease; each lease ends exactly once."""
        self.pointers.release(lease)

    def published(self) -> list[AdapterInfo]:
        """All published adapters, by name."""
        return [entry.info for entry in self.pointers.every()]

    def get(self, name: str) -> AdapterInfo:
        """One published adapter.

        Raises:
            AdapterNotFoundError: the name is not published.
            AdapterFailedError: the name could not be restored.
        """
        return self.pointers.entry(name).info

    def standings(self) -> list[Standing]:
        """Every name of which there is something to say, in order. Reads the catalogue."""
        known = {named.name: named for named in self.catalogue.names()}
        with self._lock:
            changing = set(self._changing)
        names = sorted({*known, *changing, *self.pointers.draining()})
        found = [self.pointers.standing(name, known.get(name), name in changing) for name in names]
        return [one for one in found if one is not None]

    def standing(self, name: str) -> Standing:
        """One of them.

        Raises:
            AdapterNotFoundError: there is nothing to say of the name.
        """
        named = self.catalogue.find(name)
        with self._lock:
            changing = name in self._changing
        found = self.pointers.standing(name, named, changing)
        if found is None:
            raise unknown(name)
        return found

    def draining(self, name: str) -> int:
        """How many leases there are on versions that the name meant before."""
        return self.pointers.leases_before(name)

    @contextlib.contextmanager
    def _change(self, act: Act, condition: Condition, prepares: bool) -> Iterator[Named | None]:
        """Change a name alone; what it means now, once that is as it must be. Failures go to the audit trail."""
        with self._lock:
            if act.name in self._changing:
                raise NameBusyError(f"adapter {act.name!r} is being changed by another request; try again after it")
            if prepares and sum(self._changing.values()) >= PUBLISHES:
                raise PublishesFullError(
                    f"{PUBLISHES} adapters are being published, as many as may be at once; try again later"
                )
            self._changing[act.name] = prepares
        try:
            named = self.catalogue.find(act.name)
            condition.require(act.name, named)
            yield named
        except AdapterError as error:
            with contextlib.suppress(AdapterError):  # it may be the catalogue itself that fails
                self.catalogue.refused(act, str(error))
            raise
        finally:
            with self._lock:
                del self._changing[act.name]

    def _move(self, act: Act, named: Named | None, prepared: Prepared, terms: Terms) -> AdapterInfo:
        """Let the name mean the version: on the disk first, then for requests."""
        resident = prepared.resident
        quota = ({} if named is None else named.quota) if terms.quota is None else terms.quota
        try:
            at_s = self.catalogue.publish(act, resident.version.digest, prepared.origin, resident.pinned, quota)
        except BaseException:
            self.leases.retire(resident)
            raise
        entry = Entry(resident, prepared.receipt, prepared.origin, at_s, quota)
        self._unpin(self.pointers.move(act.name, entry))
        if terms.preload:
            self.tiers.preload(resident)
        return entry.info

    def _unpin(self, old: Resident | None) -> None:
        """Requests may still run on it, but nobody new will."""
        if old is not None and old.pinned:
            self.tiers.unpin(old)


def _pinned(named: Named | None, terms: Terms) -> bool:
    return (named is not None and named.pinned) if terms.pinned is None else terms.pinned
