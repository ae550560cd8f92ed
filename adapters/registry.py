"""Names, versions and leases: which adapter a name means now, and how long a version must stay.

Must not know: HTTP, the scheduler, kernels. A name points to a version; a request resolves it once and holds a lease
until it ends. Publishing moves the pointer in one assignment; a version that no name points to is freed with its last
lease.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from motet.adapters import methods, source
from motet.adapters.base import BaseModel
from motet.adapters.effects import Lowered
from motet.adapters.errors import AdapterExistsError, AdapterNotFoundError, InvalidNameError
from motet.adapters.receipt import Receipt, receipt
from motet.adapters.residency import Residency
from motet.adapters.version import AdapterVersion, Slot

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


@dataclass(slots=True, eq=False)
class _Entry:
    version: AdapterVersion
    slot: Slot
    receipt: Receipt
    published_s: float
    leases: int = 0
    retired: bool = False


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known about a published adapter.

    Attributes:
        published_s: Unix time of publication.
        leases: requests that use the version now.
    """

    version: AdapterVersion
    receipt: Receipt
    published_s: float
    leases: int


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """The right to compute with one version until it is released."""

    version: AdapterVersion
    slot: Slot
    _entry: _Entry = field(repr=False)


class Registry:
    """The published adapters.

    Note: every method may be called from any thread. Files are read and lowered outside of the lock, so that running
    requests never wait for a load.
    """

    def __init__(self, base: BaseModel, residency: Residency) -> None:
        self.base = base
        self.residency = residency
        self._lock = threading.Lock()
        self._published: dict[str, _Entry] = {}

    def load(self, name: str, folder: Path, *, replace: bool = False) -> AdapterInfo:
        """Read, check, lower and place an adapter, then publish it under `name`.

        Args:
            folder: an already confined path.
            replace: whether a published name may move to the new version; requests that run finish on the old one.

        Raises:
            InvalidNameError, AdapterExistsError: before anything is read.
            AdapterError: the adapter is refused; nothing is visible to requests.
        """
        self._check_name(name, replace)
        lowered, facts = self.examine(folder)
        slot = self.residency.place(lowered)
        entry = _Entry(AdapterVersion(name, facts.digest), slot, facts, time.time())
        try:
            with self._lock:
                self._check_name(name, replace)
                old = self._published.get(name)
                self._published[name] = entry
        except AdapterExistsError:
            self.residency.release(slot)
            raise
        if old is not None:
            self._retire(old)
        return self._info(entry)

    def examine(self, folder: Path) -> tuple[Lowered, Receipt]:
        """Read, check and lower an adapter without placing it.

        Raises:
            AdapterError: the adapter is refused.
        """
        files = source.read(folder)
        lowered = methods.lower(files, self.base)
        return lowered, receipt(lowered, files.digest, self.base, self.residency.bytes_needed(lowered))

    def unload(self, name: str) -> AdapterInfo:
        """Take the name away; the version is freed when its last lease ends.

        Raises:
            AdapterNotFoundError: the name is not published.
        """
        with self._lock:
            entry = self._entry(name)
            del self._published[name]
        self._retire(entry)
        return self._info(entry)

    def acquire(self, name: str) -> Lease:
        """Resolve a name, once, for one request.

        Raises:
            AdapterNotFoundError: the name is not published.
        """
        with self._lock:
            entry = self._entry(name)
            entry.leases += 1
        return Lease(entry.version, entry.slot, entry)

    def renew(self, lease: Lease) -> Lease:
        """Another lease on the same version, for another generation of the same request."""
        with self._lock:
            lease._entry.leases += 1
        return Lease(lease.version, lease.slot, lease._entry)

    def release(self, lease: Lease) -> None:
        """End a lease; each lease ends exactly once."""
        entry = lease._entry
        with self._lock:
            assert entry.leases > 0, f"lease on {entry.version.short} was released twice"
            entry.leases -= 1
            free = entry.retired and entry.leases == 0
        if free:
            self.residency.release(entry.slot)

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

    def _retire(self, entry: _Entry) -> None:
        with self._lock:
            entry.retired = True
            free = entry.leases == 0
        if free:
            self.residency.release(entry.slot)

    def _entry(self, name: str) -> _Entry:
        """The published entry of a name; the caller holds the lock."""
        entry = self._published.get(name)
        if entry is None:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded; GET /v1/models lists what is")
        return entry

    @staticmethod
    def _info(entry: _Entry) -> AdapterInfo:
        return AdapterInfo(entry.version, entry.receipt, entry.published_s, entry.leases)
