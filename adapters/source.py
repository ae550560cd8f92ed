"""Reads an adapter's files without trusting them: confined path, safetensors only, limits before bytes.

Must not know: methods, the base model. Everything returned was read once, and the digest is of exactly those bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from motet.adapters.errors import (
    CorruptSourceError,
    SourceNotFoundError,
    UnsafeFormatError,
    UnsafePathError,
)
from motet.adapters.version import Digest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before it is read; bytes and counts."""

    config_bytes: int = 1 << 20
    header_bytes: int = 16 << 20
    weights_bytes: int = 4 << 30
    tensors: int = 100_000


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """The content of an adapter folder.

    Attributes:
        config: the parsed adapter_config.json.
        tensors: name → tensor, in the file's dtype, on the CPU.
        digest: SHA-256 over both files.
        weights_bytes: size of the weights file.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    digest: Digest
    weights_bytes: int


def confine(path: Path, roots: Sequence[Path]) -> Path:
    """Resolve `path`, following links, and require that it stays below one of `roots`.

    A relative path is looked up below each root in turn. Links inside a root are fine (Kubernetes mounts
    ConfigMaps that way), links that leave it are not.

    Raises:
        UnsafePathError: the path leaves every root, or there are no roots.
        SourceNotFoundError: there is nothing at a relative path.
    """
    if not roots:
        raise UnsafePathError(
            "loading from a path is off: no adapter root is configured; start the server with --adapter-root DIR"
        )
    leaves = path.is_absolute() or ".." in path.parts
    for root in roots:
        try:
            real_root = root.resolve()
            real_path = (real_root / path).resolve()
            below = real_path.is_relative_to(real_root)
            if below and (real_path.exists() or path.is_absolute()):
                return real_path
        except (OSError, RuntimeError, ValueError):
            continue  # no such path can exist: a loop of links, a name too long, a zero byte
        leaves = leaves or not below
    if leaves:
        raise UnsafePathError("the adapter's path is outside every --adapter-root; move it below one, or add a root")
    raise SourceNotFoundError(f"adapter source {str(path)!r} is below none of the adapter roots; check the path")


def read(folder: Path, limits: Limits = Limits()) -> AdapterFiles:
    """Read and check an adapter folder in PEFT's layout.

    Raises:
        SourceNotFoundError: the folder or one of its two files is missing or may not be read.
        UnsafeFormatError: the weights are only there as a pickle.
        UnsafePathError: a file is a link that leaves the folder.
        CorruptSourceError: a file is too large, truncated or contradicts its header.
    """
    try:
        config_bytes, weights = _read_both(folder, limits)
    except OSError as error:
        raise SourceNotFoundError(
            f"adapter folder {folder.name!r} cannot be read: {error.strerror}; check its permissions"
        ) from error
    digest = hashlib.sha256()
    for part in (config_bytes, weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return AdapterFiles(
        config=_parse_config(config_bytes),
        tensors=_parse_weights(weights, limits),
        digest=Digest(digest.hexdigest()),
        weights_bytes=len(weights),
    )


def _read_both(folder: Path, limits: Limits) -> tuple[bytes, bytes]:
    """The bytes of the configuration and of the weights."""
    if not folder.is_dir():
        raise SourceNotFoundError(f"adapter source {folder.name!r} is not a folder; give the folder PEFT saved")
    config = _read_file(folder, CONFIG_FILE, limits.config_bytes)
    if not (folder / WEIGHTS_FILE).exists():
        for name in PICKLES:
            if (folder / name).exists():
                raise UnsafeFormatError(
                    f"{name} is a pickle, which can run code when it is read; save the adapter with "
                    f"safe_serialization=True, which writes {WEIGHTS_FILE}"
                )
    return config, _read_file(folder, WEIGHTS_FILE, limits.weights_bytes)


def _read_file(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    if not path.is_file():
        raise SourceNotFoundError(
            f"{name} is missing from adapter folder {folder.name!r}; PEFT's save_pretrained writes it"
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UnsafePathError(f"{name} is a link that leaves the adapter folder; copy the file instead")
    size = path.stat().st_size
    if size > limit:
        raise CorruptSourceError(f"{name} has {size:,} bytes, more than the limit of {limit:,}; is it an adapter?")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) != size:
        raise CorruptSourceError(f"{name} changed while it was read; load it again once it is written completely")
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise CorruptSourceError(f"key {twice!r} stands twice in one JSON object; keep one of them")
    return keys


def _parse_config(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptSourceError(f"{CONFIG_FILE} holds a {type(config).__name__}, not an object")
    return config


def _parse_weights(content: bytes, limits: Limits) -> dict[str, torch.Tensor]:
    """Check the header against the limits and the bytes, then let safetensors decode it."""
    header_bytes = int.from_bytes(content[:8], "little")
    if len(content) < 8 or header_bytes > min(limits.header_bytes, len(content) - 8):
        raise CorruptSourceError(
            f"{WEIGHTS_FILE} announces a header of {header_bytes:,} bytes; the file has {len(content):,} and the limit "
            f"is {limits.header_bytes:,}: it is truncated or not a safetensors file"
        )
    try:
        header = json.loads(content[8 : 8 + header_bytes], object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{WEIGHTS_FILE} has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict) or len(header) > limits.tensors:
        raise CorruptSourceError(
            f"{WEIGHTS_FILE} announces more than {limits.tensors:,} tensors, or none that can be read"
        )
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptSourceError(f"{WEIGHTS_FILE} is not a valid safetensors file: {error}") from error
