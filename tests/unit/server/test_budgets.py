"""Defaults of memory budgets, where the options give none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from motet.adapters.host import HOST_BYTES
from motet.server.budgets import HOST_SHARE, host_budget
from motet.server.config import ServeConfig

MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("limit", [None, "max", "damaged", str(1 << 62)])
def test_the_host_tier_takes_a_share_of_the_machine(tmp_path: Path, limit: str | None) -> None:
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit)
    assert host_budget(ServeConfig(), file) == min(HOST_BYTES, int(MACHINE_BYTES * HOST_SHARE))


def test_the_host_tier_takes_a_share_of_a_container(tmp_path: Path) -> None:
    """A container of 1 GiB on a machine of many is killed where the machine is what counts."""
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    assert host_budget(ServeConfig(), tmp_path / "memory.max") == int((1 << 30) * HOST_SHARE)


def test_a_given_size_is_taken(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    assert host_budget(ServeConfig(host_memory="2GiB"), tmp_path / "memory.max") == 2 << 30
