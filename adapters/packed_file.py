r"""A packed adapter as a file and back: one line of JSON, then the units as they are.

safetensors would copy the operands while it holds the interpreter's lock; these are read straight to where they stay.
Must not know: where files are kept, who asks.

    "motet-packed 1\n"   SHA-256 of the line below, hexadecimal, "\n"   the line, "\n"   units
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from motet.adapters.addresses import COLUMNS
from motet.adapters.errors import CorruptSourceError
from motet.adapters.packed import Packed

MAGIC = b"motet-packed 1\n"
CHUNK_BYTES = 1 << 20
"""Read and hashed at a time: a fraction of a millisecond."""
_LONGEST_LINE = 64 << 20
_ARRAYS = ("start_K", "cell_K2", "counts_LC", "groups_CR")


def dump(packed: Packed) -> tuple[bytes, memoryview]:
    """The parts of the file; the second is the units themselves, not copied."""
    values = _bytes(packed.units_NU)
    arrays = {name: getattr(packed, name) for name in _ARRAYS}
    line = json.dumps(
        {
            "columns": list(COLUMNS),
            "dtype": str(packed.units_NU.dtype).removeprefix("torch."),
            "shape": list(packed.units_NU.shape),
            "sha256": hashlib.sha256(values).hexdigest(),
            "arrays": {name: [list(array.shape), array.reshape(-1).tolist()] for name, array in arrays.items()},
            "overlays": {path: [number, list(shape)] for path, (number, shape) in packed.overlays.items()},
            "touched": sorted(packed.touched),
            "vocabulary": packed.vocabulary,
        }
    ).encode()
    return MAGIC + hashlib.sha256(line).hexdigest().encode() + b"\n" + line + b"\n", values


def parse(path: Path, room: Callable[[int], Any] = lambda _: None) -> Packed:
    """Read a file of the parts that `dump` gave.

    Args:
        room: told of the bytes of the units before they are allocated.

    Raises:
        CorruptSourceError: it is damaged, or something else.
        OSError: it cannot be read.

    Note: reading and hashing release the interpreter's lock.
    """
    with path.open("rb") as file:
        try:
            facts = _facts(file)
            arrays = {
                name: np.array(values, dtype=np.int32).reshape(shape)
                for name, (shape, values) in facts["arrays"].items()
            }
            dtype, shape = getattr(torch, facts["dtype"]), tuple(facts["shape"])
            if path.stat().st_size - file.tell() != dtype.itemsize * shape[0] * shape[1]:
                raise _damaged()
            room(dtype.itemsize * shape[0] * shape[1])
            units_NU = torch.empty(shape, dtype=dtype)
            if _filled(file, units_NU) != facts["sha256"]:
                raise _damaged()
            overlays = {name: (int(number), tuple(of)) for name, (number, of) in facts["overlays"].items()}
            return Packed(
                units_NU=units_NU,
                overlays=overlays,
                touched=frozenset(facts["touched"]),
                vocabulary=facts["vocabulary"],
                **{name: arrays[name] for name in _ARRAYS},
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _damaged() from error


def _facts(file: BinaryIO) -> dict[str, Any]:
    if file.readline(len(MAGIC)) != MAGIC:
        raise _damaged()
    checksum, line = file.readline(65).rstrip(b"\n"), file.readline(_LONGEST_LINE).rstrip(b"\n")
    if hashlib.sha256(line).hexdigest().encode() != checksum:
        raise _damaged()
    facts: dict[str, Any] = json.loads(line)
    if facts["columns"] != list(COLUMNS):
        raise _damaged()
    return facts


def _filled(file: BinaryIO, units_NU: torch.Tensor) -> str:
    """The checksum of the rest of a file, which is now in the tensor."""
    digest, values = hashlib.sha256(), _bytes(units_NU)
    for start in range(0, len(values), CHUNK_BYTES):
        chunk = values[start : start + CHUNK_BYTES]
        if file.readinto(chunk) != len(chunk):  # type: ignore[attr-defined]
            raise _damaged()
        digest.update(chunk)
    return digest.hexdigest()


def _bytes(units_NU: torch.Tensor) -> memoryview:
    return memoryview(units_NU.view(-1).view(torch.uint8).numpy().data)


def _damaged() -> CorruptSourceError:
    return CorruptSourceError("a packed adapter in the cache is damaged, or of another version")
