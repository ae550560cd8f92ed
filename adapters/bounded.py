"""Reads single files without trusting them: links, sizes and headers are checked before the bytes are used.

Must not know: what the files mean.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError

from motet.adapters.errors import CorruptSourceError, SourceNotFoundError, UnsafePathError

_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Types of the safetensors format → bits of an element."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before it is read; bytes and counts.

    Attributes:
        dimensions, elements: of one tensor.
        archive_bytes, members: of what an archive unpacks to.
        ratio: how much more than itself an archive may unpack to, once that is more than `free_bytes`.
    """

    config_bytes: int = 1 << 20
    header_bytes: int = 16 << 20
    weights_bytes: int = 4 << 30
    tensors: int = 100_000
    dimensions: int = 8
    elements: int = 1 << 33
    archive_bytes: int = 8 << 30
    members: int = 1_000
    ratio: int = 100
    free_bytes: int = 16 << 20


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


def read_weights(folder: Path, name: str, limits: Limits) -> bytes:
    """The bytes of a safetensors file, once its header is within the limits.

    Raises:
        SourceError: as `read_file`, or the header announces what cannot be.
    """
    path = check_place(folder, name)
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), limits.header_bytes))
    check_header(name, start, path.stat().st_size, limits)
    return read_file(folder, name, limits.weights_bytes)


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


def check_header(name: str, start: bytes, size: int | None, limits: Limits) -> None:
    """Check the header of a safetensors file against the limits and the file's size.

    Args:
        start: the first bytes of the file: at least the header, if it is within the limits.
        size: bytes of the whole file; None while that is not known.

    Raises:
        CorruptSourceError: it is truncated, no safetensors file, or announces too much.
    """
    header_bytes = header_size(name, start, size, limits)
    content = start[8 : 8 + header_bytes]
    if content.count(b'"data_offsets"') > limits.tensors:
        raise _too_many(name, limits)
    try:
        header = json.loads(content, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptSourceError(f"{name} has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict) or len(header) > limits.tensors:
        raise _too_many(name, limits)
    places = sorted(_place(name, key, tensor, limits) for key, tensor in header.items() if key != "__metadata__")
    end = 0
    for start_byte, stop_byte in places:
        if start_byte != end:
            raise CorruptSourceError(
                f"{name} announces tensors that overlap or leave a hole at byte {min(start_byte, end):,}; it is "
                "damaged: save it again"
            )
        end = stop_byte
    if size is not None and end != size - 8 - header_bytes:
        raise CorruptSourceError(
            f"{name} announces {end:,} bytes of tensors and holds {size - 8 - header_bytes:,}; it is truncated or "
            "damaged: copy it again"
        )


def header_size(name: str, start: bytes, size: int | None, limits: Limits) -> int:
    """Bytes of the header, of which the first eight bytes tell.

    Raises:
        CorruptSourceError: that is more than the limit, or than the file has.
    """
    announced = int.from_bytes(start[:8], "little")
    if len(start) < 8 or announced > limits.header_bytes or (size is not None and announced > size - 8):
        raise CorruptSourceError(
            f"{name} announces a header of {announced:,} bytes; the file has {len(start) if size is None else size:,} "
            f"and the limit is {limits.header_bytes:,}: it is truncated or not a safetensors file"
        )
    return announced


def _too_many(name: str, limits: Limits) -> CorruptSourceError:
    return CorruptSourceError(f"{name} announces more than {limits.tensors:,} tensors, or none that can be read")


def _place(name: str, key: str, tensor: object, limits: Limits) -> tuple[int, int]:
    """The half-open byte range of a tensor, once its shape is possible and says the same.

    Raises:
        CorruptSourceError: it is not.
    """
    fields = tensor if isinstance(tensor, dict) else {}
    dtype, shape, place = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CorruptSourceError(f"{name}: tensor {key[:80]!r} has dtype {str(dtype)[:20]!r}, which is none")
    if not _sizes(shape) or not _sizes(place) or len(place) != 2:
        raise CorruptSourceError(f"{name}: tensor {key[:80]!r} has no shape and place of whole numbers from 0 on")
    if len(shape) > limits.dimensions or (elements := math.prod(shape)) > limits.elements:
        raise CorruptSourceError(
            f"{name}: tensor {key[:80]!r} of shape {str(shape)[:80]} exceeds the limits of {limits.dimensions} "
            f"dimensions and {limits.elements:,} elements; is it an adapter?"
        )
    start, stop = place
    if (stop - start) * 8 != elements * _DTYPE_BITS[dtype]:
        raise CorruptSourceError(
            f"{name}: tensor {key[:80]!r} of shape {str(shape)[:80]} and dtype {dtype} stands in {stop - start:,} "
            "bytes, which are not as many as it needs; the file is damaged: save it again"
        )
    return start, stop


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


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
