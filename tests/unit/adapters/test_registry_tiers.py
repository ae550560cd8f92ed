"""A published version whose content is nowhere any more fails those who wait for it, and only those."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from motet.adapters.host import HostTier
from motet.adapters.registry import Registry
from motet.adapters.tiers import Tiers
from tests.support.bases import residency_of
from tests.unit.adapters.conftest import Bench


def eventually(look: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not look():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_a_version_that_neither_memory_nor_source_has_any_more(llama: Bench, tmp_path: Path) -> None:
    folders = [llama.save(tmp_path / str(seed), seed=seed, target_modules=["q_proj"]) for seed in range(3)]
    residency = residency_of(llama.base, residency_of(llama.base).bytes_needed(llama.lower(folders[0])))
    registry = Registry(llama.base, residency, tiers=Tiers(residency, HostTier(0)))
    registry.load("moving", folders[0])
    registry.load("other", folders[1])
    other = [registry.acquire("other")]
    registry.tiers.want(other)
    eventually(lambda: registry.tiers.hold(other))
    registry.tiers.let_go(other)
    shutil.rmtree(folders[0])
    shutil.copytree(folders[2], folders[0])
    moving = registry.acquire("moving")
    registry.tiers.want([moving])
    eventually(lambda: registry.tiers.failure(moving) is not None)
    assert "its source has digest" in str(registry.tiers.failure(moving))
    assert str(tmp_path) not in str(registry.tiers.failure(moving))
    assert (registry.tiers.hold([moving]), registry.tiers.failure(other[0])) == (False, None)
    registry.tiers.stop()
