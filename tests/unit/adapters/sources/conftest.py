from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from motet.adapters.sources.resolve import Sources
from motet.adapters.sources.store import Store
from tests.support.file_server import FileServer

MB = 1 << 20
Opener = Callable[..., Sources]


@pytest.fixture
def files() -> dict[str, bytes]:
    """An adapter's folder: large enough to arrive in several pieces."""
    tensors = {"a": torch.arange(100_000.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    return {
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 2}).encode(),
        "adapter_model.safetensors": save(tensors),
    }


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer().running() as running:
        yield running


@pytest.fixture
def opened(tmp_path: Path) -> Opener:
    """Sources with a store of this test's own."""

    def make(*allowed: str, roots: tuple[Path, ...] = (), budget_bytes: int = 64 * MB, **more: Any) -> Sources:
        return Sources(list(roots), allowed, Store(tmp_path / "store", budget_bytes), **more)

    return make


def read(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tar(files: dict[str, bytes], mode: str = "w:gz", format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive as Python writes it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
