"""The folder of downloads: whole adapters by their content, what of others has arrived so far, and a byte budget.

    contents/DIGEST/…     an adapter's files; DIGEST is of their names and bytes
    names/KEY             the digest of what a source was last found to hold
    partial/KEY/          a download that is not whole: files/…, and pieces to go on from

Must not know: where anything comes from, what the files mean. The least recently used is removed first, never what is
in use: held by a fetch, or named by `used`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from motet.adapters.errors import StoreFullError
from motet.adapters.sources.disk import disk_errors
from motet.adapters.sources.remote import Deadline

POLL_S = 0.05


@dataclass(eq=False)
class Staging:
    """A download under way, of which nobody else writes.

    Attributes:
        files: the folder that becomes the adapter's.
        pieces: beside it, for what is not whole.
        granted_bytes: what it may hold.
    """

    key: str
    files: Path
    pieces: Path
    take: Callable[[int], None]
    granted_bytes: int = field(default=0)


class Store:
    """The folder.

    Args:
        folder: made when the first adapter arrives.
        budget_bytes: of all files together.
        used: folders of published adapters.

    Note: every method may be called from any thread. Several processes may use one folder; while they do, none of them
    removes anything, because none knows what the others use.
    """

    def __init__(
        self, folder: Path, budget_bytes: int, used: Callable[[], Collection[Path]] = lambda: frozenset()
    ) -> None:
        self.folder = folder
        self._budget_bytes = budget_bytes
        self.used = used
        self._lock = threading.Lock()
        self._held: dict[Path, int] = {}
        self._active: dict[str, Staging] = {}
        self._kept_bytes = 0
        self._shared: int | None = None

    def last(self, key: str) -> Path | None:
        """The folder of what the key was last found to hold, whole or not."""
        try:
            return self.folder / "contents" / (self.folder / "names" / key).read_text()
        except FileNotFoundError:
            return None

    def find(self, key: str) -> Path | None:
        """The folder of what the key was last found to hold, held until `release`; None where it is not whole."""
        with disk_errors():
            folder = self.last(key)
            if folder is None:
                return None
            with self._lock:
                self._hold(folder)
            if folder.is_dir() and content_digest(folder) == folder.name:
                os.utime(folder)
                return folder
            self.release(folder)
            if folder.is_dir() and not self._protected(folder):
                _remove(folder)
        return None

    def release(self, folder: Path) -> None:
        """End one hold."""
        with self._lock:
            self._held[folder] -= 1
            if not self._held[folder]:
                del self._held[folder]

    @contextlib.contextmanager
    def staging(self, key: str, deadline: Deadline, *, resume_files: bool) -> Iterator[Staging]:
        """A place to download to, once nobody else downloads the same.

        Args:
            resume_files: whether files that an earlier download brought whole are still right.

        Raises:
            SourceUnavailableError: another download of the same takes too long.
            StoreFullError: the folder cannot be used.
        """
        place = self.folder / "partial" / key
        with disk_errors():
            self._open()
            place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_suffix(".lock"), deadline):
            stage = Staging(key, place / "files", place / "pieces", lambda size: self._grant(stage, size))
            with disk_errors():
                if not resume_files:
                    shutil.rmtree(stage.files, ignore_errors=True)
                for folder in (stage.files, stage.pieces):
                    folder.mkdir(parents=True, exist_ok=True)
                stage.granted_bytes = _size(place)
                with self._lock:
                    self._active[key] = stage
                    self._count()
            try:
                yield stage
            finally:
                with disk_errors(), self._lock:
                    del self._active[key]
                    if any(found.is_file() for found in place.rglob("*")):
                        os.utime(place)
                    else:
                        shutil.rmtree(place, ignore_errors=True)
                        place.with_suffix(".lock").unlink(missing_ok=True)
                    self._count()

    def keep(self, stage: Staging, *keys: str) -> Path:
        """Make a download an adapter, held until `release`; under each key it is found again.

        Raises:
            StoreFullError: the folder cannot be used.
        """
        with disk_errors():
            digest = content_digest(stage.files)
            folder = self.folder / "contents" / digest
            folder.parent.mkdir(exist_ok=True)
            with self._lock:
                self._hold(folder)
            if folder.is_dir() and content_digest(folder) != digest:
                _remove(folder)
            with contextlib.suppress(OSError):  # another download brought the same
                os.rename(stage.files, folder)
            shutil.rmtree(stage.files.parent, ignore_errors=True)
            os.utime(folder)
            names = self.folder / "names"
            names.mkdir(exist_ok=True)
            for key in keys:
                unfinished = names / f"{key}.{uuid.uuid4().hex}"
                unfinished.write_text(digest)
                os.replace(unfinished, names / key)
        return folder

    def _open(self) -> None:
        with self._lock:
            if self._shared is None:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._shared = os.open(self.folder, os.O_RDONLY)
                fcntl.flock(self._shared, fcntl.LOCK_SH)

    def _hold(self, folder: Path) -> None:
        self._held[folder] = self._held.get(folder, 0) + 1

    def _protected(self, folder: Path) -> bool:
        return folder in self._held or folder.name in self._active or folder in set(self.used())

    def _everything(self) -> list[Path]:
        return [
            found
            for place in (self.folder / "contents", self.folder / "partial")
            if place.is_dir()
            for found in place.iterdir()
            if found.is_dir()
        ]

    def _count(self) -> None:
        """Look at what there is beside active downloads."""
        self._kept_bytes = sum(_size(found) for found in self._everything() if found.name not in self._active)

    def _grant(self, stage: Staging, size: int) -> None:
        """Count bytes that are about to be written, making room for them.

        Raises:
            StoreFullError: there is none.
        """
        with self._lock, disk_errors():
            if self._total() + size > self._budget_bytes:
                self._make_room(size)
            stage.granted_bytes += size

    def _total(self) -> int:
        return self._kept_bytes + sum(stage.granted_bytes for stage in self._active.values())

    def _make_room(self, size: int) -> None:
        assert self._shared is not None
        try:
            fcntl.flock(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fcntl.flock(self._shared, fcntl.LOCK_SH)
            raise StoreFullError(
                f"the download folder is full ({self._budget_bytes:,} bytes) and another process uses it too, so "
                "nothing can be removed; raise --download-size, or give each server its own --download-dir"
            ) from error
        try:
            found = sorted(self._everything(), key=lambda folder: folder.stat().st_mtime_ns)
            for folder in found:
                if self._total() + size <= self._budget_bytes:
                    return
                if not self._protected(folder):
                    self._drop(folder)
                    self._count()
            if self._total() + size > self._budget_bytes:
                raise StoreFullError(
                    f"the download folder holds {self._total():,} bytes that are in use, and {size:,} more exceed "
                    f"--download-size {self._budget_bytes:,}; raise it, or unload adapters"
                )
        finally:
            fcntl.flock(self._shared, fcntl.LOCK_SH)

    @staticmethod
    def _drop(folder: Path) -> None:
        """Remove an adapter, or what there is of one that nobody is about to go on with."""
        if folder.parent.name == "contents":
            _remove(folder)
            return
        lock = folder.with_suffix(".lock")
        handle = _lock(lock)
        if handle is not None:
            _remove(folder)
            lock.unlink(missing_ok=True)
            os.close(handle)


def content_digest(folder: Path) -> str:
    """SHA-256 of the names, sizes and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(found for found in folder.rglob("*") if found.is_file()):
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{inner}\n".encode())
    return digest.hexdigest()


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _remove(folder: Path) -> None:
    """Out of its place at once, then file by file."""
    gone = folder.with_name(f"{uuid.uuid4().hex}.gone")
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def _locked(file: Path, deadline: Deadline) -> Iterator[None]:
    """One at a time, of all threads and processes."""
    with disk_errors():
        handle = _lock(file)
    while handle is None:
        deadline.left_s()
        time.sleep(POLL_S)
        with disk_errors():
            handle = _lock(file)
    try:
        yield
    finally:
        os.close(handle)


def _lock(file: Path) -> int | None:
    """A handle that has the lock; None while somebody else has it, or its last owner removed the file meanwhile."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(file)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None
