"""gate.safetensors is read like the other files of a folder, and belongs to methods with a gate only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from motet.adapters.bounded import Limits
from motet.adapters.errors import CorruptSourceError, SourceNotFoundError, UnmatchedTensorError, UnsafePathError
from motet.adapters.source import GATE_FILE, read
from motet.adapters.spec import NOTHING_DECLARED, Declared
from tests.unit.adapters.conftest import Bench


@pytest.fixture
def folder(llama: Bench, tmp_path: Path) -> Path:
    """A plain adapter with a gate's file beside it."""
    made = llama.save(tmp_path / "fr", target_modules=["q_proj"])
    save_file({"x": torch.arange(3.0)}, made / GATE_FILE)
    return made


def test_its_tensors_are_apart(folder: Path) -> None:
    files = read(folder)
    assert {name: tensor.tolist() for name, tensor in files.gate_tensors.items()} == {"x": [0.0, 1.0, 2.0]}
    assert "x" not in files.tensors


def test_its_bytes_are_part_of_the_digest(folder: Path) -> None:
    digests = {read(folder).digest}
    save_file({"x": torch.arange(3.0) + 1}, folder / GATE_FILE)
    digests.add(read(folder).digest)
    (folder / GATE_FILE).unlink()
    digests.add(read(folder).digest)
    assert len(digests) == 3


def test_a_method_without_a_gate_refuses_it(llama: Bench, folder: Path) -> None:
    with pytest.raises(UnmatchedTensorError, match=r"gate\.safetensors, of which no tensor matches a rule of lora"):
        llama.lower(folder)
    (folder / GATE_FILE).unlink()
    assert llama.lower(folder).gate is None


def test_an_initial_adapter_has_none(llama: Bench, folder: Path, tmp_path: Path) -> None:
    plain = llama.save(tmp_path / "plain", target_modules=["q_proj"])
    with pytest.raises(UnmatchedTensorError, match=r"gate\.safetensors"):
        llama.lower(plain, Declared(initial=folder))


def test_a_link_that_leads_nowhere_is_no_absent_file(folder: Path) -> None:
    (folder / GATE_FILE).unlink()
    (folder / GATE_FILE).symlink_to("gone")
    with pytest.raises(SourceNotFoundError, match=r"gate\.safetensors is missing"):
        read(folder)


def test_a_link_that_leaves_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / GATE_FILE).rename(tmp_path / GATE_FILE)
    (folder / GATE_FILE).symlink_to(tmp_path / GATE_FILE)
    with pytest.raises(UnsafePathError, match=r"gate\.safetensors is a link"):
        read(folder)


def test_its_size_is_limited_and_its_damage_found(folder: Path) -> None:
    save_file({"x": torch.zeros(1 << 20)}, folder / GATE_FILE)
    with pytest.raises(CorruptSourceError, match=r"gate\.safetensors has 4,194,\d+ bytes, more than the limit"):
        read(folder, NOTHING_DECLARED, Limits(weights_bytes=1 << 20))
    (folder / GATE_FILE).write_bytes(b"\1" * 20)
    with pytest.raises(CorruptSourceError, match=r"gate\.safetensors announces a header"):
        read(folder)
