"""Brings the files of a remote place to a folder: checked as they arrive, going on where an earlier try broke off.

Must not know: kinds of places, what becomes of the folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.adapters.bounded import Limits
from motet.adapters.errors import (
    CorruptSourceError,
    SourceNotFoundError,
    SourceUnavailableError,
)
from motet.adapters.sources.address import is_archive
from motet.adapters.sources.disk import disk_errors
from motet.adapters.sources.header import HeaderWatch
from motet.adapters.sources.remote import Deadline, Remote, RemoteFile
from motet.adapters.sources.selection import most_bytes

TRIES = 3
"""Of a file that breaks off, within one download."""


@dataclass(frozen=True, slots=True)
class Download:
    """What the files of one download share.

    Attributes:
        pieces: folder for files that are not whole.
        take: told of bytes before they are written. Raises StoreFullError.
    """

    remote: Remote
    pieces: Path
    take: Callable[[int], None]
    limits: Limits
    deadline: Deadline

    def all(self, files: Sequence[RemoteFile], into: Path) -> None:
        """Every file that is not there yet.

        Raises:
            SourceNotFoundError: a file that is not optional is missing.
            CorruptSourceError: one is too large, damaged, or not what it must be.
            SourceUnavailableError: one does not arrive whole, not in time or not at all.
        """
        for file in files:
            self._require_size(file.name, file.size)
        for file in files:
            target = into / file.name
            if target.exists():
                continue
            piece = self.pieces / hashlib.sha256(file.place.encode()).hexdigest()
            try:
                self._whole(file, piece)
            except SourceNotFoundError:
                if not file.optional:
                    raise
            except CorruptSourceError:
                piece.unlink(missing_ok=True)
                raise
            else:
                with disk_errors():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    piece.rename(target)

    def _require_size(self, name: str, size: int | None) -> None:
        most = self.limits.archive_bytes if is_archive(name) else most_bytes(name, self.limits)
        if size is not None and size > most:
            raise CorruptSourceError(f"{name} has {size:,} bytes, more than the limit of {most:,}; is it an adapter?")

    def _whole(self, file: RemoteFile, piece: Path) -> None:
        for left in reversed(range(TRIES)):
            try:
                self._more(file, piece)
                break
            except SourceUnavailableError:
                self.deadline.left_s()
                if not left or not piece.exists():
                    raise
        if file.sha256 is None:
            return
        with piece.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != file.sha256:
            raise CorruptSourceError(
                f"{file.name} has SHA-256 {found}, not {file.sha256}, by which it is pinned; the place holds something "
                "else, or it was changed on its way"
            )

    def _more(self, file: RemoteFile, piece: Path) -> None:
        """Go on with a file until it is whole."""
        marks = piece.with_suffix(".tag")
        tag = marks.read_text() if marks.exists() else None
        known = piece.stat().st_size if piece.exists() and (tag is not None or file.sha256 is not None) else 0
        with self.remote.open(file, known, tag) as opened:
            self._require_size(file.name, opened.size)
            watch = HeaderWatch(file.name, opened.size, self.limits)
            with disk_errors():
                marks.unlink(missing_ok=True)
                if opened.start:
                    with piece.open("rb") as content:
                        while chunk := content.read(1 << 16):
                            watch.feed(chunk)
                else:
                    piece.unlink(missing_ok=True)
                if opened.tag is not None:
                    marks.write_text(opened.tag)
            size = opened.start
            with piece.open("ab", buffering=0) as written:
                for chunk in opened.chunks:
                    size += len(chunk)
                    self._require_size(file.name, size)
                    watch.feed(chunk)
                    self.take(len(chunk))
                    with disk_errors():
                        written.write(chunk)
            if opened.size is not None and size != opened.size:
                raise SourceUnavailableError(
                    f"{file.name} ended after {size:,} of {opened.size:,} bytes; what arrived is kept: ask again"
                )
            watch.finish()
