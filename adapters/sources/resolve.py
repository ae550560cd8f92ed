"""One way from a source, as people write it, to a folder of this machine.

Must not know: names, versions, requests. Before a byte is asked for, the source is on the list of allowed ones; before
a folder is given out, all of it has arrived and what is pinned is verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

from motet.adapters.bounded import DEFAULT_LIMITS, Limits
from motet.adapters.errors import CorruptSourceError, SourceError, SourceNotFoundError
from motet.adapters.origin import Found, Origin, placed
from motet.adapters.source import confine
from motet.adapters.sources.address import Address, AllowList, is_archive, is_remote, parse, split_pin
from motet.adapters.sources.archive import unpack
from motet.adapters.sources.download import Download
from motet.adapters.sources.objects import FileSystems, ObjectPlace, file_system
from motet.adapters.sources.oci import RegistryPlace
from motet.adapters.sources.remote import Deadline, Remote
from motet.adapters.sources.store import Staging, Store
from motet.adapters.sources.web import Web
from motet.adapters.sources.website import WebPlace


@dataclass(frozen=True, slots=True)
class Fetched:
    """A source as a folder. It stays where it is until `close`, and after that while it is published.

    Attributes:
        uri: the source in its one form; for a path, as it was given.
        revision: what it means now: a commit, a manifest's digest; None where there is no name for it.
        pinned: the source that means this revision for ever, where there is one; else the source.
    """

    folder: Path
    uri: str
    revision: str | None
    pinned: str
    _store: Store | None = None

    def close(self) -> None:
        """The folder is published by now, or not needed; once."""
        if self._store is not None:
            self._store.release(self.folder)

    def __enter__(self) -> Fetched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Sources:
    """All places that adapters may come from.

    Args:
        roots: folders below which paths may lie.
        allowed: beginnings of remote sources that are allowed.
        store: where downloads are kept.
        floating: whether branches and tags may stand where a commit or a digest does.
        timeout_s: of one fetch, unless the caller says otherwise.
        systems: makes the file systems of the hub and of object stores.

    Raises:
        InvalidSourceError: `allowed` has something that is no beginning of a source.

    Note: may be used from any thread; two fetches of one source at once download it once.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        allowed: Sequence[str],
        store: Store,
        *,
        floating: bool = False,
        timeout_s: float = 600,
        limits: Limits = DEFAULT_LIMITS,
        systems: FileSystems = file_system,
    ) -> None:
        self._roots, self._allowed, self._store = roots, AllowList(allowed), store
        self._floating, self._timeout_s, self._limits, self._systems = floating, timeout_s, limits, systems
        self._trust = httpx.create_ssl_context()
        self._lock = threading.Lock()
        self._speaking: set[Web] = set()

    def require_allowed(self, source: str) -> None:
        """Refuse a source that would be refused before a byte of it is asked for.

        Raises:
            InvalidSourceError, ForbiddenSourceError: it would.
        """
        if is_remote(source):
            self._allowed.require(parse(source, floating=self._floating).uri)

    def close(self) -> None:
        """End every fetch that speaks to a web server or a registry, as its deadline would."""
        with self._lock:
            for web in self._speaking:
                web.cut()

    @contextlib.contextmanager
    def folders(self, origin: Origin) -> Iterator[Found]:
        """As `origin.Resolve` says: what each part of an origin means now."""
        with contextlib.ExitStack() as held:

            def place(source: str) -> tuple[Path, str]:
                fetched = held.enter_context(self.fetch(source))
                return fetched.folder, fetched.pinned

            yield placed(origin, place)

    def kept(self, origins: Iterable[Origin]) -> frozenset[Path]:
        """The folders that sources were last found to be, where they are still there."""
        sources = {part for one in origins if not one.trusted for part in (one.source, one.initial, one.residual)}
        found = (self._kept(source) for source in sources if source is not None)
        return frozenset(folder for folder in found if folder is not None)

    def fetch(self, source: str, timeout_s: float | None = None) -> Fetched:
        """The source as a folder.

        Args:
            source: a path below a root, or hf://, s3://, gs://, http://, https://, oci://; an archive may end in
                #sha256=….

        Raises:
            SourceError: it is not allowed, not there, not what it must be, or does not arrive in time.
        """
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)
        if not is_remote(source):
            return self._local(source, deadline)
        address = parse(source, floating=self._floating)
        self._allowed.require(address.uri)
        key = _key(address)
        if found := self._known(address, key):
            return found
        with self._store.staging(key, deadline, resume_files=address.fixed) as stage:
            if found := self._known(address, key):
                return found
            with Web(self._allowed, deadline, self._trust) as web, self._listed(web):
                remote = self._open(address, web)
                self._bring(remote, stage, deadline)
            pinned = address.pinned(remote.revision)
            folder = self._store.keep(stage, key, _key(parse(pinned, floating=self._floating)))
            return Fetched(folder, address.uri, remote.revision, pinned, self._store)

    def _known(self, address: Address, key: str) -> Fetched | None:
        """What an earlier fetch of a source that cannot change left."""
        folder = self._store.find(key) if address.fixed else None
        if folder is None:
            return None
        return Fetched(folder, address.uri, address.revision, address.pinned(address.revision), self._store)

    def _kept(self, source: str) -> Path | None:
        try:
            if is_remote(source):
                return self._store.last(_key(parse(source, floating=True)))
            place = confine(Path(split_pin(source)[0] if "#sha256=" in source else source), self._roots)
            return self._store.last(_digest(place)) if place.is_file() else None
        except (SourceError, OSError):
            return None

    @contextlib.contextmanager
    def _listed(self, web: Web) -> Iterator[None]:
        with self._lock:
            self._speaking.add(web)
        try:
            yield
        finally:
            with self._lock:
                self._speaking.discard(web)

    def _open(self, address: Address, web: Web) -> Remote:
        if address.scheme == "oci":
            return RegistryPlace(address, web)
        if address.scheme in ("http", "https"):
            return WebPlace(address, web)
        return ObjectPlace(address, web.deadline, self._systems)

    def _bring(self, remote: Remote, stage: Staging, deadline: Deadline) -> None:
        files = remote.files()
        if not files:
            raise SourceNotFoundError("at the source there is no file of an adapter; check its folder")
        download = Download(remote, stage.pieces, stage.take, self._limits, deadline)
        if not is_archive(files[0].name):
            download.all(files, stage.files)
            return
        download.all(files, stage.pieces)
        archive = stage.pieces / files[0].name
        try:
            unpack(archive, stage.files, self._limits, deadline, stage.take)
        finally:
            archive.unlink()

    def _local(self, source: str, deadline: Deadline) -> Fetched:
        path, pin = split_pin(source) if "#sha256=" in source else (source, None)
        place = confine(Path(path), self._roots)
        if not (place.is_file() and is_archive(place.name)):
            return Fetched(place, source, None, source)
        size = place.stat().st_size
        if size > self._limits.archive_bytes:
            raise CorruptSourceError(f"the archive has {size:,} bytes, more than {self._limits.archive_bytes:,}")
        digest = _digest(place)
        if pin not in (None, digest):
            raise CorruptSourceError(f"the archive has SHA-256 {digest}, not {pin}, by which it is pinned")
        if (known := self._store.find(digest)) is not None:
            return Fetched(known, source, None, source, self._store)
        with self._store.staging(digest, deadline, resume_files=False) as stage:
            unpack(place, stage.files, self._limits, deadline, stage.take)
            return Fetched(self._store.keep(stage, digest), source, None, source, self._store)


def _key(address: Address) -> str:
    return hashlib.sha256(f"{address.uri} {address.sha256}".encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
