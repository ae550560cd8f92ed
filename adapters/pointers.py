"""What each name means at this moment, in memory, and which replaced versions requests still run on.

Must not know: files, how a version is made, who changes names, what outlives the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from motet.adapters.catalogue import Named, Quota
from motet.adapters.errors import AdapterFailedError, AdapterNotFoundError, VersionNotServedError
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.origin import Origin
from motet.adapters.receipt import Receipt
from motet.adapters.standing import AdapterInfo, Standing, State
from motet.adapters.version import Digest, exactly


@dataclass(slots=True, eq=False)
class Entry:
    """What a name means."""

    resident: Resident
    receipt: Receipt
    origin: Origin
    published_s: float
    quota: Quota

    @property
    def info(self) -> AdapterInfo:
        """For those who look."""
        resident = self.resident
        return AdapterInfo(
            version=resident.version,
            receipt=self.receipt,
            published_s=self.published_s,
            leases=resident.leases,
            head=resident.head,
            pinned=resident.pinned,
            quota=self.quota,
            used_s=resident.last_used_s,
        )


class Pointers:
    """The names that are published, or should be.

    Args:
        bytes_of: what a version takes now, by tier.

    Note: every method may be called from any thread, and none waits for anything but the others.
    """

    def __init__(self, leases: Leases, bytes_of: Callable[[Resident], Mapping[str, int]]) -> None:
        self._leases, self._bytes_of = leases, bytes_of
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._failed: dict[str, str] = {}
        self._retired: list[Resident] = []
        """Versions that no name points to and that still have leases."""
        self.swaps = 0
        """How often a name moved from one version to another."""

    def take(self, asked: str) -> Lease:
        """A lease on what is asked for: a name, or `name@digest`; a name of that spelling wins.

        Raises:
            AdapterNotFoundError: the name is not published, or means another version.
            AdapterFailedError: the name could not be restored.
        """
        with self._lock:
            return self._leases.take(self._asked(asked).resident)

    def entry(self, name: str) -> Entry:
        """What a name means.

        Raises:
            AdapterNotFoundError: the name is not published.
            AdapterFailedError: the name could not be restored.
        """
        with self._lock:
            return self._entry(name)

    def every(self) -> list[Entry]:
        """What all published names mean, by name."""
        with self._lock:
            return [self._entries[name] for name in sorted(self._entries)]

    def move(self, name: str, entry: Entry) -> Resident | None:
        """Let the name mean this from now on; the version before, which is dropped with its last lease."""
        with self._lock:
            old = self._entries.get(name)
            self._entries[name] = entry
            self._failed.pop(name, None)
            self._retired += [] if old is None else [old.resident]
            self.swaps += old is not None and old.resident.version != entry.resident.version
        return self._retire(old)

    def drop(self, name: str) -> Resident | None:
        """Let the name mean nothing; the version before, as for `move`."""
        with self._lock:
            old = self._entries.pop(name, None)
            self._failed.pop(name, None)
            self._retired += [] if old is None else [old.resident]
        return self._retire(old)

    def release(self, lease: Lease) -> None:
        """End a lease."""
        self._leases.release(lease)
        if lease.resident.retired:
            self._forget_drained()

    def fail(self, name: str, why: str) -> None:
        """Answer for the name with this error."""
        with self._lock:
            self._failed[name] = why

    def standing(self, name: str, named: Named | None, changing: bool) -> Standing | None:
        """What there is to say of a name; None where that is nothing.

        Args:
            named: what the catalogue says.
            changing: whether somebody changes it now.
        """
        with self._lock:
            entry, error = self._entries.get(name), self._failed.get(name)
            residents = [one for one in self._retired if one.version.name == name]
        residents += [entry.resident] if entry is not None else []
        if not (residents or error is not None or changing):
            return None
        leases = dict[Digest, int]()
        for one in residents:
            leases[one.version.digest] = leases.get(one.version.digest, 0) + one.leases
        return Standing(
            name=name,
            state=State.READY if entry else State.FAILED if error else State.LOADING if changing else State.DRAINING,
            info=None if entry is None else entry.info,
            error=error,
            pinned=named is not None and named.pinned,
            quota={} if named is None else named.quota,
            versions=() if named is None else named.versions,
            leases=leases,
            bytes={} if entry is None else self._bytes_of(entry.resident),
        )

    def draining(self) -> Collection[str]:
        """Names with replaced or removed versions that requests still run on."""
        with self._lock:
            return {one.version.name for one in self._retired}

    def leases_before(self, name: str) -> int:
        """Leases on versions that the name meant before."""
        with self._lock:
            return sum(one.leases for one in self._retired if one.version.name == name)

    def _retire(self, old: Entry | None) -> Resident | None:
        if old is None:
            return None
        self._leases.retire(old.resident)
        self._forget_drained()
        return old.resident

    def _forget_drained(self) -> None:
        with self._lock:
            self._retired = [one for one in self._retired if one.leases]

    def _asked(self, asked: str) -> Entry:
        """The caller holds the lock."""
        exact = exactly(asked)
        if exact is None or asked in self._entries or asked in self._failed:
            return self._entry(asked)
        entry = self._entry(exact[0])
        version = entry.resident.version
        if not version.answers_to(asked):
            raise VersionNotServedError(
                f"adapter {version.name!r} is served as version {version.digest}, not as {exact[1]}; ask for that, or "
                "for the name alone"
            )
        return entry

    def _entry(self, name: str) -> Entry:
        """The caller holds the lock."""
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        if name in self._failed:
            raise AdapterFailedError(f"adapter {name!r} could not be restored: {self._failed[name]}")
        raise unknown(name)


def unknown(name: str) -> AdapterNotFoundError:
    """That the name means nothing."""
    return AdapterNotFoundError(f"adapter {name!r} is not loaded; GET /v1/models lists what is")
