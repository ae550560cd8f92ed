"""Unpacks tar archives, plain or gzip, without trusting them: forward only, in bounded time, memory and space.

Must not know: where archives come from. Python's tarfile is not used: it reads extended headers of any size at once,
and before 3.11.14 a negative size made it read the same header for ever.

Source: POSIX.1-2001 pax, and GNU tar's long names and sizes of base 256.
"""

from __future__ import annotations

import gzip
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from motet.adapters.bounded import Limits
from motet.adapters.errors import CorruptSourceError, UnsafePathError
from motet.adapters.sources.disk import disk_errors
from motet.adapters.sources.header import HeaderWatch
from motet.adapters.sources.remote import Deadline
from motet.adapters.sources.selection import belongs, most_bytes, require_no_pickle

BLOCK = 512
CHUNK_BYTES = 1 << 16
MOST_EXTENSION = 1 << 16
"""Bytes of a header that extends another."""
_GZIP = b"\x1f\x8b"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file: its name, and its bytes, which must be read before the next member."""

    name: str
    size: int
    chunks: Iterator[bytes]


def unpack(file: Path, into: Path, limits: Limits, deadline: Deadline, take: Callable[[int], None]) -> None:
    """Write the files of an adapter's folder that an archive holds, at its top or in the one folder there.

    Args:
        into: emptied first.
        take: told of bytes before they are written.

    Raises:
        CorruptSourceError: it is damaged, no archive, or exceeds a limit.
        UnsafePathError: a member would leave the folder or is no file.
        UnsafeFormatError: it holds weights as a pickle only.
    """
    names: set[str] = set()
    tops: dict[str, Path] = {}
    with disk_errors():
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
    with file.open("rb") as packed:
        for member in members(packed, limits):
            deadline.left_s()
            if member.name in names:
                _refuse(f"holds {member.name[:80]!r} twice; pack it again")
            names.add(member.name)
            top, _, name = member.name.partition("/")
            if not name or belongs(member.name):
                top, name = "", member.name
            if belongs(name):
                _write(member, name, tops.setdefault(top, into / str(len(tops))), limits, take)
    if len(tops) > 1 and "" not in tops:
        _refuse(f"holds files in {len(tops)} places; pack one adapter's folder")
    require_no_pickle(name.rpartition("/")[2] for name in names)
    with disk_errors():
        _keep_only(tops.get("") or next(iter(tops.values()), into / "none"), into)


def _keep_only(folder: Path, into: Path) -> None:
    """Put a folder inside of another in its place."""
    kept = into.with_name(f"{into.name}.kept")
    shutil.rmtree(kept, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    folder.rename(kept)
    shutil.rmtree(into)
    kept.rename(into)


def _write(member: Member, name: str, into: Path, limits: Limits, take: Callable[[int], None]) -> None:
    most = most_bytes(name, limits)
    if member.size > most:
        _refuse(f"holds {name!r} of {member.size:,} bytes, more than the limit of {most:,}")
    watch = HeaderWatch(name, member.size, limits)
    target = into / name
    with disk_errors():
        target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb", buffering=0) as file:
        for chunk in member.chunks:
            watch.feed(chunk)
            take(len(chunk))
            with disk_errors():
                file.write(chunk)
    watch.finish()


def members(packed: BinaryIO, limits: Limits) -> Iterator[Member]:
    """The regular files of an archive, in its order.

    Raises:
        CorruptSourceError, UnsafePathError: as `unpack`.
    """
    start = packed.read(2)
    packed.seek(0)
    reader = _Reader(packed, start == _GZIP, limits)
    longer: dict[str, str] = {}
    for _ in range(limits.members):
        header = reader.read(BLOCK)
        if not header.strip(b"\0"):
            reader.finish()
            return
        _require_sum(header)
        size, kind = _number(header[124:136]), header[156:157]
        if kind in b"xgL":
            if size > MOST_EXTENSION:
                _refuse(f"has a header of {size:,} bytes, more than {MOST_EXTENSION:,}")
            content = reader.read(_padded(size))[:size]
            if kind == b"g":
                continue
            longer |= _pax(content) if kind == b"x" else {"path": _text(content)}
            continue
        name = _member_name(longer.get("path") or _plain_name(header))
        size = _decimal(longer["size"]) if "size" in longer else size
        longer = {}
        if kind == b"5":
            reader.skip(_padded(size))
        elif kind in (b"0", b"\0", b"7"):
            chunks = reader.chunks(size)
            yield Member(name, size, chunks)
            for _ in chunks:  # what the caller left
                pass
            reader.skip(_padded(size) - size)
        else:
            what = _KINDS.get(kind, "something unknown")
            raise UnsafePathError(f"the archive's member {name[:80]!r} is {what}; pack plain files and folders only")
    _refuse(f"has more than {limits.members:,} members; pack the adapter's folder alone")


class _Reader:
    """Bytes of an archive, unpacked, no more than the limits allow."""

    def __init__(self, packed: BinaryIO, compressed: bool, limits: Limits) -> None:
        self._packed, self._limits = packed, limits
        self._file: BinaryIO = gzip.GzipFile(fileobj=packed) if compressed else packed  # type: ignore[assignment]
        self._read = 0

    def read(self, size: int) -> bytes:
        """Exactly this many bytes, few enough for memory."""
        content = self._some(size)
        if len(content) != size:
            raise _damaged()
        return content

    def _some(self, size: int) -> bytes:
        """At most this many bytes; fewer at the end."""
        try:
            content = self._file.read(size)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged() from error
        self._read += len(content)
        limits = self._limits
        if self._read > limits.archive_bytes:
            _refuse(f"unpacks to more than {limits.archive_bytes:,} bytes")
        if self._read > max(limits.free_bytes, self._packed.tell() * limits.ratio):
            _refuse(f"unpacks to more than {limits.ratio} times its size; is it an adapter?")
        return content

    def chunks(self, size: int) -> Iterator[bytes]:
        """As many bytes, in pieces."""
        while size > 0:
            content = self.read(min(CHUNK_BYTES, size))
            size -= len(content)
            yield content

    def skip(self, size: int) -> None:
        """Pass over as many bytes."""
        for _ in self.chunks(size):
            pass

    def finish(self) -> None:
        """Read to the end, where gzip has its checksum."""
        while self._some(CHUNK_BYTES):
            pass


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _require_sum(header: bytes) -> None:
    """The sum over the header with its own place blank; old archives sum signed bytes."""
    said, blank = _number(header[148:156]), header[:148] + b" " * 8 + header[156:]
    if said not in (sum(blank), sum(byte - 256 * (byte > 127) for byte in blank)):
        _refuse("is damaged, or no archive of kind tar; pack it again")


def _number(field: bytes) -> int:
    """An octal number, or one of base 256 where the first bit is set; a negative one is none."""
    if field[0] & 0x80:
        value = int.from_bytes(field[1:], "big")
        if field[0] != 0x80:
            _refuse("has a number that is negative or too large; pack it again")
        return value
    digits = field.strip(b" \0")
    if not all(byte in b"01234567" for byte in digits):
        _refuse("is damaged, or no archive of kind tar; pack it again")
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        _refuse("has a size that is no number; pack it again")
    return int(text)


def _pax(content: bytes) -> dict[str, str]:
    r"""Records "LENGTH KEY=VALUE\n" of an extended header."""
    found: dict[str, str] = {}
    while content:
        length, _, _ = content.partition(b" ")
        size = int(length) if length.isdigit() and len(length) <= 6 else 0
        key, mark, value = content[len(length) + 1 : size].partition(b"=")
        if not mark or not value.endswith(b"\n") or size > len(content):
            _refuse("has a damaged extended header; pack it again")
        name = _text(key)
        if name in found or name.startswith("GNU.sparse"):
            _refuse("has an extended header that says something twice, or of sparse files; pack it again")
        found[name] = _text(value[:-1])
        content = content[size:]
    return found


def _plain_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    try:
        return field.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise CorruptSourceError("the archive holds a name that is no UTF-8; pack it again") from error


def _member_name(name: str) -> str:
    """The name without a leading "./", once it stays below the folder."""
    parts = name.removesuffix("/").split("/")
    if name.startswith("/") or "\0" in name or "\\" in name or ".." in parts or len(name) > 1_000:
        raise UnsafePathError(f"the archive's member {name[:80]!r} would leave the folder; pack it again")
    return "/".join(part for part in parts if part not in ("", "."))


def _damaged() -> CorruptSourceError:
    return CorruptSourceError("the archive is truncated or damaged; pack it again")


def _refuse(what: str) -> NoReturn:
    raise CorruptSourceError(f"the archive {what}")
