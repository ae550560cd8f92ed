"""A packed adapter is read back bit by bit, and any damage is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from motet.adapters.errors import CorruptSourceError
from motet.adapters.packed import Packed
from motet.adapters.packed_file import dump, parse
from tests.support.bases import residency_of
from tests.unit.adapters.conftest import Bench


def written(packed: Packed, path: Path) -> bytes:
    content = b"".join(bytes(part) for part in dump(packed))
    path.write_bytes(content)
    return content


@pytest.fixture
def packed(llama: Bench, tmp_path: Path) -> Packed:
    """Replaced parameters, in bfloat16."""
    exact = llama.lower(llama.layout("full-fine-tune", tmp_path / "full").folder)
    return residency_of(llama.base, dtype=torch.bfloat16).pack(exact)


def test_what_was_written_is_read(packed: Packed, tmp_path: Path) -> None:
    written(packed, tmp_path / "file")
    asked: list[int] = []
    found = parse(tmp_path / "file", asked.append)
    assert asked == [packed.units_NU.nbytes]
    assert torch.equal(found.units_NU.view(torch.int16), packed.units_NU.view(torch.int16))
    assert found.units_NU.dtype == torch.bfloat16
    for name in ("start_K", "cell_K2", "counts_LC", "groups_CR"):
        array = getattr(found, name)
        assert array.dtype == np.int32
        assert np.array_equal(array, getattr(packed, name)), name
    facts = packed.overlays, packed.touched, packed.vocabulary, packed.bytes
    assert (found.overlays, found.touched, found.vocabulary, found.bytes) == facts
    assert found.overlays


def test_an_adapter_of_pairs_and_scales_too(llama: Bench, tmp_path: Path) -> None:
    packed = residency_of(llama.base).pack(llama.lower(llama.save(tmp_path / "lora", use_dora=True)))
    written(packed, tmp_path / "file")
    found = parse(tmp_path / "file")
    assert torch.equal(found.units_NU, packed.units_NU)
    assert np.array_equal(found.counts_LC, packed.counts_LC)


@pytest.mark.parametrize("place", [0, 40, 500, 1000, 1500, -1000, -1])
def test_one_flipped_bit_anywhere_is_found(packed: Packed, tmp_path: Path, place: int) -> None:
    content = bytearray(written(packed, tmp_path / "file"))
    content[place] ^= 4
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorruptSourceError, match="damaged"):
        parse(tmp_path / "file")


@pytest.mark.parametrize("cut", [0, 10, 80, -1])
def test_a_truncated_or_longer_file_is_found(packed: Packed, tmp_path: Path, cut: int) -> None:
    content = written(packed, tmp_path / "file")
    for damaged in (content[:cut], content + b"\0"):
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(CorruptSourceError, match="damaged"):
            parse(tmp_path / "file")
