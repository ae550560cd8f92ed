"""Reads a model directory (config.json and safetensors, whole or in shards), tensor by tensor.

Must not know: the base model, methods. A model can be far larger than an adapter, so its tensors are mapped and read
one at a time; the digest is of all bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from motet.adapters.bounded import Limits, check_header, check_place, parse_object, read_file
from motet.adapters.errors import CorruptSourceError, SourceNotFoundError, UnsafeFormatError

MODEL_CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class MappedTensors(Mapping[str, torch.Tensor]):
    """name → tensor, read when asked for.

    Note: the files must stay as they are while this is used.
    """

    def __init__(self, shards: Mapping[str, Any]) -> None:
        self._shards = shards

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._shards[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def read_checkpoint(folder: Path, limits: Limits) -> tuple[dict[str, Any], MappedTensors, str]:
    """Configuration, tensors, and SHA-256 of all files.

    Raises:
        SourceError: a file is missing, leaves the folder, is a pickle, or is damaged.
    """
    config_bytes = read_file(folder, MODEL_CONFIG, limits.config_bytes)
    digest = hashlib.sha256(config_bytes)
    shards: dict[str, Any] = {}
    for name in _shard_names(folder, limits):
        path = check_place(folder, name)
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            start += file.read(min(int.from_bytes(start, "little"), limits.header_bytes))
            check_header(name, start, size, limits)
            file.seek(0)
            digest.update(hashlib.file_digest(file, "sha256").digest())
        try:
            opened = safe_open(path, framework="pt", device="cpu")
            names: list[str] = opened.keys()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptSourceError(f"{name} is not a valid safetensors file: {error}") from error
        if twice := shards.keys() & names:
            raise CorruptSourceError(f"tensor {sorted(twice)[0]!r} stands in two shards; save the model again")
        shards |= dict.fromkeys(names, opened)
    return parse_object(MODEL_CONFIG, config_bytes), MappedTensors(shards), digest.hexdigest()


def _shard_names(folder: Path, limits: Limits) -> list[str]:
    if (folder / WHOLE).exists():
        return [WHOLE]
    if (folder / INDEX).exists():
        index = parse_object(INDEX, read_file(folder, INDEX, limits.header_bytes))
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
            raise CorruptSourceError(f"{INDEX} has no weight_map of tensor: file; save the model again")
        if any(Path(name).name != name for name in names.values()):
            raise CorruptSourceError(f"{INDEX} names a file outside of its folder; save the model again")
        return sorted(set(names.values()))
    for name in PICKLES:
        if (folder / name).exists():
            raise UnsafeFormatError(
                f"{name} is a pickle, which can run code when it is read; save the model with safe_serialization=True"
            )
    raise SourceNotFoundError(f"{WHOLE} is missing from model folder {folder.name!r}; save the model again")
