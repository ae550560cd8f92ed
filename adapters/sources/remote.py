"""What every kind of remote place offers: files with names, read from a byte on, until a deadline.

Must not know: any kind of place, where files are kept.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from motet.adapters.errors import SourceUnavailableError


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a remote place.

    Attributes:
        name: where it goes below the folder.
        place: what the remote calls it.
        size: bytes; None until it is opened.
        tag: changes with the content; None where the remote says nothing of the kind.
        sha256: what the content must have.
        optional: it may be missing.
    """

    name: str
    place: str
    size: int | None = None
    tag: str | None = None
    sha256: str | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that arrives.

    Attributes:
        start: the first byte that arrives; 0 where the remote cannot begin elsewhere.
        size: bytes of the whole file, where the remote says.
        tag: as that of RemoteFile.
    """

    chunks: Iterator[bytes]
    start: int
    size: int | None
    tag: str | None


class Remote(Protocol):
    """One adapter somewhere else."""

    revision: str | None
    """What the source means now, where there is a name for it."""

    def files(self) -> Sequence[RemoteFile]:
        """All files, the archive alone where it is one. Raises SourceError."""

    def open(self, file: RemoteFile, start: int, tag: str | None) -> AbstractContextManager[Opened]:
        """Read a file, from `start` on while it has this tag. Raises SourceError, also while it is read."""


class Deadline:
    """When a fetch must be done."""

    def __init__(self, after_s: float) -> None:
        self.after_s = after_s
        self._end_s: float = time.monotonic() + after_s

    def end(self) -> None:
        """It is now."""
        self._end_s = 0

    def left_s(self) -> float:
        """Seconds that are left.

        Raises:
            SourceUnavailableError: none are.
        """
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise SourceUnavailableError(
                f"the source was not read within {self.after_s:g} s; what arrived is kept: ask again, or raise "
                "--download-timeout"
            )
        return left_s
