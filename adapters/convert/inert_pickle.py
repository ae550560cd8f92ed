"""Reads a module that `torch.save` pickled whole, as plain data: its tensors and numbers, by their dotted names.

Must not know: what the module computes. No name in the pickle is imported and none of its code runs: tensors and
classes become inert records, a fixed handful of containers is real, and everything else is refused by name. What a
record is told is kept, never executed.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import torch

from motet.adapters.errors import AdapterError, CorruptSourceError, UnsafeFormatError

LARGEST_PICKLE_BYTES = 16 << 20
LARGEST_STORAGE_BYTES = 4 << 30
"""Of all that is read of one file."""

CONTAINERS: dict[str, type] = {"collections.OrderedDict": OrderedDict, "builtins.set": set, "__builtin__.set": set}
IGNORED = frozenset(
    "torch.device numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray.scalar _codecs.encode".split()
)
"""What modules hold beside tensors, and nobody needs here."""
STORAGES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
}


@dataclass(frozen=True, slots=True)
class InertModule:
    """A module and all below it.

    Attributes:
        name: of its class, as the pickle says it.
        tensors: dotted name → parameter or buffer.
        values: dotted name → attribute that is a number, a truth value or a string.
    """

    name: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, int | float | bool | str] = field(default_factory=dict)


def read_module(path: Path, classes: Collection[str]) -> InertModule:
    """Read the file of a whole module.

    Args:
        classes: the full names of classes that the pickle may mention.

    Raises:
        UnsafeFormatError: the pickle names anything else, or is no module.
        CorruptSourceError: it is no file that `torch.save` writes today, or it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            stem = _stem(archive)
            root = _Unpickler(BytesIO(_member(archive, f"{stem}/data.pkl", LARGEST_PICKLE_BYTES)), classes).load()
            if not isinstance(root, _Shell):
                raise UnsafeFormatError(f"{path.name} is a pickle of something else than a module; give the module's")
            module = InertModule(root.name)
            for name, value in _walk(root, ""):
                if isinstance(value, _Stored):
                    module.tensors[name] = _tensor(archive, stem, name, value)
                else:
                    module.values[name] = value
            return module
    except AdapterError:
        raise
    except zipfile.BadZipFile as error:
        raise CorruptSourceError(f"{path.name} is no zip file of torch.save; save it again with torch 1.6+") from error
    except Exception as error:  # a pickle of anything else fails in ways that only it knows
        raise CorruptSourceError(
            f"{path.name} is damaged, or no pickle of a module ({type(error).__name__}); save the module again"
        ) from error


class _Inert:
    """Whatever a pickle does to it is refused or kept: it has no code of the pickle's."""

    __slots__ = ()

    def __setstate__(self, state: object) -> NoReturn:
        raise UnsafeFormatError("the pickle changes a tensor after it made it, which torch.save never writes")


class _Shell:
    """In the place of an object of any class: takes arguments and state, and does nothing with them."""

    name = ""
    state: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Storage(_Inert):
    """The bytes of a tensor, by their name in the file."""

    __slots__ = ("dtype", "key", "numel")

    def __init__(self, kind: object, dtype: object, key: object, _place: object, numel: object) -> None:
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise UnsafeFormatError("the pickle refers to something outside of it that is no storage of tensors")
        self.dtype, self.key, self.numel = dtype, key, _count(numel)


class _Stored(_Inert):
    """A tensor that is not read yet."""

    __slots__ = ("shape", "start", "storage", "strides")

    def __init__(self, storage: object, start: object, shape: object, strides: object, *_: object) -> None:
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise UnsafeFormatError("the pickle makes a tensor of something else than a storage")
        self.storage, self.start = storage, _count(start)
        self.shape, self.strides = tuple(map(_count, shape)), tuple(map(_count, strides))


class _Parameter(_Inert):
    """A parameter is its tensor."""

    def __new__(cls, stored: object, *_: object) -> Any:
        if not isinstance(stored, _Stored):
            raise UnsafeFormatError("the pickle makes a parameter of something else than a tensor")
        return stored


TENSORS: dict[str, type] = {
    "torch._utils._rebuild_tensor_v2": _Stored,
    "torch._utils._rebuild_parameter": _Parameter,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO, classes: Collection[str]) -> None:
        super().__init__(file)
        self._classes = classes

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        for table in (CONTAINERS, STORAGES, TENSORS):
            if name in table:
                return table[name]
        if name in IGNORED or name in self._classes:
            return type("_Shell", (_Shell,), {"name": name})  # its own class, so that nothing outlives this read
        raise UnsafeFormatError(f"the pickle names {name!r}, which is no part of such a module; nothing of it was run")

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(*pid)


def _walk(shell: _Shell, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted names of tensors not read yet and of plain values, of a module and those below it."""
    state = shell.state
    if not isinstance(state, dict):
        raise UnsafeFormatError(f"module {path or shell.name!r} of the pickle has no state; give a whole module's file")
    for table in ("_parameters", "_buffers"):
        yield from ((path + name, value) for name, value in state.get(table, {}).items() if isinstance(value, _Stored))
    for name, value in state.items():
        if isinstance(value, bool | int | float | str):
            yield path + name, value
    for name, below in state.get("_modules", {}).items():
        if isinstance(below, _Shell):
            yield from _walk(below, f"{path}{name}.")


def _tensor(archive: zipfile.ZipFile, stem: str, name: str, stored: _Stored) -> torch.Tensor:
    dtype, count = stored.storage.dtype, stored.storage.numel
    if 0 in stored.shape:
        return torch.zeros(stored.shape, dtype=dtype)
    last = stored.start + sum((size - 1) * step for size, step in zip(stored.shape, stored.strides, strict=True))
    content = _member(archive, f"{stem}/data/{stored.storage.key}", LARGEST_STORAGE_BYTES)
    if len(content) != count * dtype.itemsize or last >= count:
        raise CorruptSourceError(f"tensor {name!r} does not fit into its {len(content):,} bytes; the file is damaged")
    values = torch.frombuffer(bytearray(content), dtype=dtype)
    return values.as_strided(stored.shape, stored.strides, stored.start).clone(memory_format=torch.contiguous_format)


def _stem(archive: zipfile.ZipFile) -> str:
    """The folder in the archive that everything is in."""
    found = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CorruptSourceError(f"the zip file has {len(found)} pickles; torch.save writes one: save it again")
    order = f"{found[0]}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CorruptSourceError("the file was written on a big-endian machine; save it again on another")
    return found[0]


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """The bytes of a file in the archive, which torch.save never compresses."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > limit:
        raise CorruptSourceError(f"{Path(name).name} has {entry.file_size:,} bytes or is compressed; limit {limit:,}")
    return archive.read(entry)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnsafeFormatError(f"the pickle has {value!r} where a tensor has a size or a place; the file is damaged")
    return value
