"""Memory in large pages: what is taken of it never overlaps, and the system is asked for whole pages inside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from motet.kernels.cpu.pages import LARGE_BYTES, REGION_BYTES, LargePages, in_large_pages

SMAPS = Path("/proc/self/smaps")


def test_tensors_keep_their_own_values() -> None:
    pages = LargePages()
    shapes = [(3, 5), (1,), (64, 33), (7, 2, 9)]
    taken = [pages.empty(shape, torch.bfloat16).fill_(index) for index, shape in enumerate(shapes)]
    for index, (tensor, shape) in enumerate(zip(taken, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == index).all())


def test_small_tensors_share_a_region_and_large_ones_have_their_own() -> None:
    pages = LargePages()
    first, second = pages.empty((10,), torch.float32), pages.empty((10,), torch.float32)
    large = pages.empty((REGION_BYTES + 64,), torch.uint8)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert large.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    assert len(large.fill_(1)) == REGION_BYTES + 64


@pytest.mark.skipif(not SMAPS.exists(), reason="the system does not tell how memory is advised")
def test_the_system_is_asked_for_the_whole_pages_inside() -> None:
    values = torch.empty(8 * LARGE_BYTES, dtype=torch.uint8)
    assert "hg" not in _flags(values.data_ptr() + LARGE_BYTES)
    assert in_large_pages(values) is values
    assert "hg" in _flags(values.data_ptr() + LARGE_BYTES)
    small = torch.empty(100, dtype=torch.uint8)
    assert in_large_pages(small) is small


def _flags(address: int) -> str:
    """How the system was advised on the memory there."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line
    raise AssertionError("nothing lies at that address")
