"""Reads single files without trusting them: links, sizes and headers are checked before the bytes are used.

Must not know: what the files mean.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from motet.adapters.errors import CorruptSourceError, SourceNotFoundError, UnsafePathError


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before it is read; bytes and counts."""

    config_bytes: int = 1 << 20
    header_bytes: int = 16 << 20
    weights_bytes: int = 4 << 30
    tensors: int = 100_000


DEFAULT_LIMITS = Limits()


def check_place(folder: Path, name: str) -> Path:
    """The path of a file of the folder.

    Raises:
        SourceNotFoundError: there is none.
        UnsafePathError: it is a link that leaves the folder.
    """
    path = folder / name
    if not path.is_file():
        raise SourceNotFoundError(f"{name} is missing from adapter folder {folder.name!r}; save the adapter again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UnsafePathError(f"{name} is a link that leaves the adapter folder; copy the file instead")
    return path


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of a file, at most `limit`.

    Raises:
        SourceError: it is missing, leaves the folder, is too large, or changed while it was read.
    """
    path = check_place(folder, name)
    size = path.stat().st_size
    if size > limit:
        raise CorruptSourceError(f"{name} has {size:,} bytes, more than the limit of {limit:,}; is it an adapter?")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) != size:
        raise CorruptSourceError(f"{name} changed while it was read; load it again once it is written completely")
    return content


def parse_object(name: str, content: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
        CorruptSourceError: it is none.
    """
    try:
        config = json.loads(content, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptSourceError(f"{name} holds a {type(config).__name__}, not an object")
    return config


def check_header(name: str, start: bytes, size: int, limits: Limits) -> None:
    """Check the header of a safetensors file against the limits and the file's size.

    Args:
        start: the first bytes of the file: at least the header, if it is within the limits.
        size: bytes of the whole file.

    Raises:
        CorruptSourceError: it is truncated, no safetensors file, or announces too much.
    """
    header_bytes = int.from_bytes(start[:8], "little")
    if size < 8 or header_bytes > min(limits.header_bytes, size - 8):
        raise CorruptSourceError(
            f"{name} announces a header of {header_bytes:,} bytes; the file has {size:,} and the limit "
            f"is {limits.header_bytes:,}: it is truncated or not a safetensors file"
        )
    try:
        header = json.loads(start[8 : 8 + header_bytes], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{name} has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict) or len(header) > limits.tensors:
        raise CorruptSourceError(f"{name} announces more than {limits.tensors:,} tensors, or none that can be read")


def parse_tensors(name: str, content: bytes, limits: Limits) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU in their own dtypes.

    Raises:
        CorruptSourceError: the file is damaged or exceeds a limit.
    """
    check_header(name, content, len(content), limits)
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptSourceError(f"{name} is not a valid safetensors file: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise CorruptSourceError(f"key {twice!r} stands twice in one JSON object; keep one of them")
    return keys
