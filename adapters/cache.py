"""The disk tier: lowered adapters that were lowered before, so that no decomposition is computed twice.

Must not know: methods, where adapters come from. An entry is only as right as the code that wrote it, so the key holds
the lowering code's own hash beside base and adapter. The tier is an optimisation: nothing that happens to it fails a
load.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from motet.adapters import approximate, effects, methods, packed_file, signs
from motet.adapters.effects import Lowered
from motet.adapters.errors import CorruptSourceError
from motet.adapters.lowered_file import dump, parse
from motet.adapters.packed import Packed
from motet.adapters.version import Digest

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENDING = ".lowered.safetensors"
PACKED = ".packed"
UNFINISHED = ".unfinished"
ABANDONED_NS = 3600 * 10**9
"""Age at which an unfinished file belongs to a process that is gone."""


@dataclass(frozen=True, slots=True)
class PackedKey:
    """What a packed adapter depends on beside the code.

    Attributes:
        dtype, unit: of the arena.
    """

    base_fingerprint: str
    digest: Digest
    dtype: torch.dtype
    unit: int


class LoweredCache:
    """Entries in one folder, the least recently used removed first: lowered in float32, and packed for an arena.

    Args:
        folder: made when the first entry is written.
        budget_bytes: of all entries together.
        code: stands for the code that lowers; by default the hash of its files.

    Attributes:
        corrupt: damaged entries that were found and removed.

    Note: any number of threads and processes may use one folder. The budget holds for each process's own writes: two
    that write at the same moment may exceed it until the next write.
    """

    def __init__(self, folder: Path, budget_bytes: int, code: str | None = None) -> None:
        self._folder = folder
        self._budget_bytes = budget_bytes
        self._code = lowering_code() if code is None else code
        self._lock = threading.Lock()
        self._told = False
        self.corrupt = 0

    def get(self, base_fingerprint: str, digest: Digest) -> Lowered | None:
        """The adapter as it was lowered for this base; None when there is no intact entry."""
        return self._read(self._path(base_fingerprint, digest), lambda path: parse(path.read_bytes()))

    def put(self, base_fingerprint: str, digest: Digest, lowered: Lowered) -> None:
        """Keep a lowered adapter, where it fits into the budget; older entries make room."""
        self._write(self._path(base_fingerprint, digest), dump(lowered))

    def get_packed(self, key: PackedKey, room: Callable[[int], Any] = lambda _: None) -> Packed | None:
        """The adapter as it lies in an arena; None when there is no intact entry.

        Args:
            room: see `packed_file.parse`.
        """
        return self._read(self._packed_path(key), lambda path: packed_file.parse(path, room))

    def put_packed(self, key: PackedKey, packed: Packed) -> None:
        """Keep a packed adapter, where it fits into the budget; older entries make room."""
        self._write(self._packed_path(key), *packed_file.dump(packed))

    def bytes_of(self, key: PackedKey) -> int:
        """What both entries of an adapter take now."""
        size = 0
        for path in (self._path(key.base_fingerprint, key.digest), self._packed_path(key)):
            with contextlib.suppress(OSError):
                size += path.stat().st_size
        return size

    def _read(self, path: Path, read: Callable[[Path], T]) -> T | None:
        try:
            found = read(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except CorruptSourceError as error:
            self.corrupt += 1
            logger.info("a cached adapter is removed: %s", error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        except OSError as error:
            self._tell(error)
            return None
        return found

    def _write(self, path: Path, *parts: bytes | memoryview) -> None:
        size = sum(map(len, parts))
        if size > self._budget_bytes:
            return
        unfinished = path.with_name(f"{uuid.uuid4().hex}{UNFINISHED}")
        try:
            with self._lock:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._make_room(size)
                try:
                    with unfinished.open("xb") as file:
                        for part in parts:
                            file.write(part)
                    os.replace(unfinished, path)
                finally:
                    unfinished.unlink(missing_ok=True)
        except OSError as error:
            self._tell(error)

    def _path(self, base_fingerprint: str, digest: Digest) -> Path:
        key = hashlib.sha256(f"{base_fingerprint} {digest} {self._code}".encode()).hexdigest()
        return self._folder / f"{key}{ENDING}"

    def _packed_path(self, key: PackedKey) -> Path:
        named = f"{key.base_fingerprint} {key.digest} {self._code} {key.dtype} {key.unit}"
        return self._folder / f"{hashlib.sha256(named.encode()).hexdigest()}{PACKED}"

    def _make_room(self, needed_bytes: int) -> None:
        """Remove the least recently used entries until `needed_bytes` fit, and what dead processes left."""
        found = []
        with os.scandir(self._folder) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    if file.name.endswith((ENDING, PACKED, UNFINISHED)):
                        found.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        used = sum(size for _, size, _ in found)
        for used_ns, size, file in sorted(found, key=lambda entry: entry[0]):
            abandoned = file.name.endswith(UNFINISHED) and used_ns < time.time_ns() - ABANDONED_NS
            if abandoned or (not file.name.endswith(UNFINISHED) and used + needed_bytes > self._budget_bytes):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file)
                used -= size

    def _tell(self, error: OSError) -> None:
        """Say once that the tier does not work; never where it is."""
        if not self._told:
            self._told = True
            logger.warning(
                "the cache of lowered adapters cannot be used: %s; adapters are lowered anew at each load until "
                "--adapter-cache names a writable folder with room, or off",
                error.strerror,
            )


@functools.cache
def lowering_code() -> str:
    """Hexadecimal SHA-256 over the source files of the methods, the effects and the lossy forms."""
    assert methods.__file__ is not None
    folder = Path(methods.__file__).parent
    beside = [Path(module.__file__ or "") for module in (approximate, effects, signs)]
    files = {file.name: file for file in beside} | {
        str(file.relative_to(folder.parent)): file for file in sorted(folder.rglob("*.py"))
    }
    digest = hashlib.sha256()
    for name, file in files.items():
        content = file.read_bytes()
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest()
