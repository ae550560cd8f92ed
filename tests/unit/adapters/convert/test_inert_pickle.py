"""A module's pickle is read without importing anything it names; nothing of it runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from motet.adapters.convert.inert_pickle import InertModule, read_module
from motet.adapters.errors import CorruptSourceError, UnsafeFormatError

CLASSES = {f"torch.nn.modules.{name}" for name in "linear.Linear container.Sequential batchnorm.BatchNorm1d".split()}


def module() -> nn.Module:
    """Parameters, buffers, a transposed view of a larger storage, a shared parameter, none at all."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2).bfloat16())
    made[0].weight = nn.Parameter(torch.randn(4, 5)[1:, 2:4].T)
    made.register_parameter("shared", made[0].weight)
    made.register_buffer("whole", torch.arange(3))
    return made


def save(folder: Path, value: object) -> Path:
    torch.save(value, folder / "module.pt")
    return folder / "module.pt"


def read(folder: Path, value: object) -> InertModule:
    return read_module(save(folder, value), CLASSES)


def test_tensors_and_values_are_those_of_the_module(tmp_path: Path) -> None:
    made = module()
    found = read(tmp_path, made)
    assert found.name == "torch.nn.modules.container.Sequential"
    expected = made.state_dict()
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].is_contiguous()
    assert found.values.items() >= {"1.eps": 1e-5, "0.in_features": 3, "training": True}.items()


def test_no_class_of_the_pickle_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path, module())

    def refuse(*_: object) -> Any:
        raise AssertionError("code that the pickle names was run")

    for kind in (nn.Linear, nn.Sequential, nn.BatchNorm1d):
        monkeypatch.setattr(kind, "__setstate__", refuse)
    monkeypatch.setattr(torch._utils, "_rebuild_tensor_v2", refuse)
    assert read_module(file, CLASSES).tensors


class Hostile(nn.Module):
    """Runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        super().__init__()
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("inside", [False, True])
def test_a_command_is_not_run(tmp_path: Path, inside: bool) -> None:
    marker = tmp_path / "marker"
    hostile = Hostile(os.system, f"touch {marker}")
    value = nn.Sequential(hostile) if inside else hostile
    with pytest.raises(UnsafeFormatError, match=r"names 'posix\.system', which is no part .* nothing of it was run"):
        read(tmp_path, value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(hostile))
    assert marker.exists(), "the pickle must be one that works"


@pytest.mark.parametrize(
    ("function", "name"),
    [(eval, "eval"), (getattr, "getattr"), (pickle.loads, "loads"), (torch.load, "load"), (__import__, "__import__")],
)
def test_other_functions_are_refused_by_name(tmp_path: Path, function: Callable[..., object], name: str) -> None:
    with pytest.raises(UnsafeFormatError, match=f"{name}', which is no part of such a module"):
        read(tmp_path, Hostile(function, "1"))


def test_a_class_that_was_not_named_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFormatError, match=r"'torch\.nn\.modules\.conv\.Conv1d'"):
        read(tmp_path, nn.Sequential(nn.Conv1d(1, 1, 1)))


def raw(folder: Path, data: bytes, **storages: bytes) -> Path:
    """A zip file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(folder / "module.pt", "w") as archive:
        archive.writestr("x/data.pkl", data)
        for key, content in storages.items():
            archive.writestr(f"x/data/{key[1:]}", content)
    return folder / "module.pt"


def tensor_of(*, size: bytes = b"K\x02", start: bytes = b"K\x00", after: bytes = b"") -> bytes:
    """A Linear whose weight is a vector, opcode by opcode."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    built = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + start + b"(" + size + b"t(K\x01t\x89Ntr" + b"R"
    built = built.replace(b"trR", b"tR") + after
    parameters = b"}X\x0b\x00\x00\x00_parameters}X\x06\x00\x00\x00weight" + built + b"ss"
    return b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81" + parameters + b"b."


def test_the_pickle_of_these_tests_is_a_module(tmp_path: Path) -> None:
    found = read_module(raw(tmp_path, tensor_of(), _0=b"\0\0\x80?" * 2), CLASSES)
    assert found.tensors["weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"size": b"K\x03"}, CorruptSourceError, "'weight' does not fit into its 8 bytes"),
        ({"start": b"K\x01"}, CorruptSourceError, "'weight' does not fit into its 8 bytes"),
        ({"start": b"J\xff\xff\xff\xff"}, UnsafeFormatError, "has -1 where a tensor has a size or a place"),
        ({"size": b"\x88"}, UnsafeFormatError, "has True where"),
        ({"after": b"}b"}, UnsafeFormatError, "changes a tensor after it made it"),
    ],
    ids=["too large", "too late", "before its storage", "no number", "changed"],
)
def test_a_tensor_outside_of_its_bytes_is_refused(
    tmp_path: Path, change: dict[str, bytes], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_module(raw(tmp_path, tensor_of(**change), _0=bytes(8)), CLASSES)


def test_storages_have_the_size_that_is_announced(tmp_path: Path) -> None:
    with pytest.raises(CorruptSourceError, match="does not fit into its 9 bytes"):
        read_module(raw(tmp_path, tensor_of(), _0=bytes(9)), CLASSES)
    with pytest.raises(CorruptSourceError, match="damaged"):
        read_module(raw(tmp_path, tensor_of()), CLASSES)


@pytest.mark.parametrize("value", [{"weight": torch.ones(1)}, torch.ones(1), 3], ids=["state", "tensor", "number"])
def test_what_is_no_module_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UnsafeFormatError, match=r"module\.pt is a pickle of something else than a module"):
        read(tmp_path, value)


def test_what_is_no_zip_file_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptSourceError, match=r"no zip file of torch\.save"):
        read_module(tmp_path / "module.pt", CLASSES)


def test_compressed_files_are_refused(tmp_path: Path) -> None:
    """A small file could hold any number of bytes otherwise."""
    with zipfile.ZipFile(tmp_path / "module.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", tensor_of())
    with pytest.raises(CorruptSourceError, match="is compressed"):
        read_module(tmp_path / "module.pt", CLASSES)


def test_a_pickle_that_holds_itself_is_refused(tmp_path: Path) -> None:
    made = nn.Sequential()
    made._modules["0"] = made
    with pytest.raises(CorruptSourceError, match="RecursionError"):
        read(tmp_path, made)
