"""Which version each name means, what it meant before, and who changed it: one SQLite file that survives the process.

Every change is one transaction that is on the disk before the call returns, so that a process that is killed leaves
the state before a change or the one after it. Must not know: memory, leases, what is in an adapter.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from motet.adapters.errors import AdapterNotFoundError, CatalogueError
from motet.adapters.origin import Origin
from motet.adapters.version import Digest

SCHEMA = 1
VERSIONS_KEPT = 5
"""Of each name, the current one included."""
MOST_AUDITED = 100_000
"""Lines of the audit trail, at about 300 bytes each; the oldest go first."""
MOST_OUTCOME = 500
"""Characters kept of an error."""

Quota = Mapping[str, float]
"""Limits of a name, for whoever enforces them; empty without limits."""

_TABLES = (
    "CREATE TABLE base (fingerprint TEXT NOT NULL)",
    "CREATE TABLE names (name TEXT PRIMARY KEY, pinned INTEGER NOT NULL, quota TEXT NOT NULL) WITHOUT ROWID",
    # The version of a name with the largest place is the one it means.
    "CREATE TABLE versions (place INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL REFERENCES names, "
    "digest TEXT NOT NULL, origin TEXT NOT NULL, published_s REAL NOT NULL, UNIQUE (name, digest))",
    "CREATE TABLE audit (id INTEGER PRIMARY KEY AUTOINCREMENT, at_s REAL NOT NULL, actor TEXT NOT NULL, "
    "action TEXT NOT NULL, name TEXT NOT NULL, old TEXT, new TEXT, outcome TEXT NOT NULL)",
    f"PRAGMA user_version = {SCHEMA}",
)


@dataclass(frozen=True, slots=True)
class Record:
    """One version of a name, and how to make it again.

    Attributes:
        published_s: Unix time at which the name last began to mean it.
    """

    digest: Digest
    origin: Origin
    published_s: float


@dataclass(frozen=True, slots=True)
class Named:
    """A name and its versions, the current one first."""

    name: str
    pinned: bool
    quota: Quota
    versions: tuple[Record, ...]

    @property
    def current(self) -> Record:
        """What the name means."""
        return self.versions[0]

    def version(self, digest: str | None) -> Record:
        """The version whose digest begins so; None is the one before the current.

        Raises:
            AdapterNotFoundError: it is not kept, or more than one begins so.
        """
        found = [one for one in self.versions if one.digest.startswith(digest)] if digest else [*self.versions[1:2]]
        if len(found) == 1:
            return found[0]
        what = f"version {digest}" if digest else "version before its current one"
        kept = ", ".join(one.digest[:12] for one in self.versions)
        raise AdapterNotFoundError(
            f"adapter {self.name!r} has {'no' if not found else 'more than one'} {what}; kept are {kept}: name one of "
            "them, or publish its source again"
        )


@dataclass(frozen=True, slots=True)
class Act:
    """Who does what to a name."""

    actor: str
    action: str
    name: str


@dataclass(frozen=True, slots=True)
class Audited:
    """One line of the audit trail.

    Attributes:
        at_s: Unix time.
        old, new: what the name meant before and after; None for nothing.
        outcome: "done", or why nothing changed.
    """

    id: int
    at_s: float
    actor: str
    action: str
    name: str
    old: str | None
    new: str | None
    outcome: str


class Catalogue:
    """The names.

    Args:
        file: made where it is not there; None keeps everything in memory.
        base_fingerprint: of the base model that the adapters are of.
        kept: versions of each name.

    Raises:
        CatalogueError: another process has the file open, or it is none of this base model.

    Note: every method may be called from any thread. A change waits for the disk, so not from an event loop.
    """

    def __init__(self, file: Path | None, base_fingerprint: str, kept: int = VERSIONS_KEPT) -> None:
        assert kept >= 1, kept
        self._kept, self._lock = kept, threading.Lock()
        try:
            if file is not None:  # sources may carry credentials
                os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(
                ":memory:" if file is None else file, timeout=0, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise CatalogueError(f"the catalogue cannot be opened: {said}; check --catalogue") from error
        try:
            self._open(base_fingerprint)
        except BaseException:
            self._db.close()
            raise

    def _open(self, base_fingerprint: str) -> None:
        with self._reading():
            # Others are locked out from the first transaction until this process ends, however it does.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        with self._changing():
            (schema,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if schema != (SCHEMA if tables else 0):
            raise CatalogueError(
                f"the catalogue has schema {schema} and this Motet reads {SCHEMA}; give another file with --catalogue"
            )
        with self._reading():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        with self._changing():
            if not tables:
                for statement in _TABLES:
                    self._db.execute(statement)
                self._db.execute("INSERT INTO base VALUES (?)", (base_fingerprint,))
            (known,) = self._db.execute("SELECT fingerprint FROM base").fetchone()
        if known != base_fingerprint:
            raise CatalogueError(
                f"the catalogue belongs to a base model with fingerprint {known[:12]}, this one has "
                f"{base_fingerprint[:12]}; start with the same --model and --dtype, or give another file with "
                "--catalogue"
            )

    def names(self) -> list[Named]:
        """Every name, in order."""
        with self._reading():
            rows = self._db.execute("SELECT name FROM names ORDER BY name").fetchall()
            return [self._named(name) for (name,) in rows]

    def find(self, name: str) -> Named | None:
        """One name; None where it means nothing."""
        with self._reading():
            known = self._db.execute("SELECT 1 FROM names WHERE name = ?", (name,)).fetchone()
            return None if known is None else self._named(name)

    def publish(self, act: Act, digest: Digest, origin: Origin, pinned: bool, quota: Quota) -> float:
        """Let a name mean a version from now on; the Unix time of it. The oldest versions beyond `kept` are forgotten.

        Raises:
            CatalogueError: it cannot be written; nothing changed.
        """
        name, now_s = act.name, time.time()
        with self._changing():
            old = self._current(name)
            self._db.execute(
                "INSERT INTO names VALUES (?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET pinned = excluded.pinned, quota = excluded.quota",
                (name, pinned, json.dumps(dict(quota))),
            )
            self._db.execute("DELETE FROM versions WHERE name = ? AND digest = ?", (name, digest))
            self._db.execute(
                "INSERT INTO versions (name, digest, origin, published_s) VALUES (?, ?, ?, ?)",
                (name, digest, origin.dump(), now_s),
            )
            self._db.execute(
                "DELETE FROM versions WHERE name = ?1 AND place NOT IN "
                "(SELECT place FROM versions WHERE name = ?1 ORDER BY place DESC LIMIT ?2)",
                (name, self._kept),
            )
            self._audit(act, now_s, old, digest, "done")
        return now_s

    def remove(self, act: Act) -> None:
        """Forget a name and its versions.

        Raises:
            CatalogueError: it cannot be written; nothing changed.
        """
        with self._changing():
            old = self._current(act.name)
            self._db.execute("DELETE FROM versions WHERE name = ?", (act.name,))
            self._db.execute("DELETE FROM names WHERE name = ?", (act.name,))
            self._audit(act, time.time(), old, None, "done")

    def refused(self, act: Act, why: str) -> None:
        """Note that nothing changed."""
        with self._changing():
            old = self._current(act.name)
            self._audit(act, time.time(), old, old, why[:MOST_OUTCOME])

    def audited(self, most: int, before: int | None = None) -> list[Audited]:
        """The latest lines of the audit trail, the latest first; those before a line where `before` is its id."""
        with self._reading():
            rows = self._db.execute(
                "SELECT * FROM audit WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2", (before, most)
            )
            return [Audited(*row) for row in rows]

    def close(self) -> None:
        """Let another process open the file."""
        with self._lock:
            self._db.close()

    def _named(self, name: str) -> Named:
        pinned, quota = self._db.execute("SELECT pinned, quota FROM names WHERE name = ?", (name,)).fetchone()
        rows = self._db.execute(
            "SELECT digest, origin, published_s FROM versions WHERE name = ? ORDER BY place DESC", (name,)
        )
        versions = tuple(Record(digest, Origin.parse(origin), at_s) for digest, origin, at_s in rows)
        return Named(name, bool(pinned), json.loads(quota), versions)

    def _current(self, name: str) -> str | None:
        row = self._db.execute(
            "SELECT digest FROM versions WHERE name = ? ORDER BY place DESC LIMIT 1", (name,)
        ).fetchone()
        return None if row is None else str(row[0])

    def _audit(self, act: Act, now_s: float, old: str | None, new: str | None, outcome: str) -> None:
        line = self._db.execute(
            "INSERT INTO audit (at_s, actor, action, name, old, new, outcome) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (now_s, act.actor, act.action, act.name, old, new, outcome),
        ).lastrowid
        assert line is not None
        self._db.execute("DELETE FROM audit WHERE id <= ?", (line - MOST_AUDITED,))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise _unusable(error) from error

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """One transaction: all of the block, or nothing of it."""
        with self._reading():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def _unusable(error: sqlite3.Error) -> CatalogueError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        return CatalogueError(
            "the catalogue is in use by another process; stop that one, or give each server its own --catalogue"
        )
    return CatalogueError(f"the catalogue cannot be used: {error}; free disk space or restore the file, then try again")
