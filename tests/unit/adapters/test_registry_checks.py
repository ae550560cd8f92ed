"""What stands between a placed version and its publication, and what a published version was made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from motet.adapters import source
from motet.adapters.cache import LoweredCache
from motet.adapters.errors import (
    AdapterError,
    AdapterNotFoundError,
    ConfigError,
    GoldenError,
    SourceChangedError,
    SourceNotFoundError,
)
from motet.adapters.golden import GOLDEN_FILE, Golden
from motet.adapters.lease import Lease
from motet.adapters.lowered_file import dump
from motet.adapters.registry import Registry
from motet.adapters.spec import Declared
from tests.support.bases import residency_of
from tests.unit.adapters.conftest import Bench

GOLDEN = {"tolerance": 0.5, "prompts": [{"tokens": [1, 2], "logprobs": [-1]}]}


@pytest.fixture(scope="module")
def plain(llama: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama.save(tmp_path_factory.mktemp("plain"), seed=1, target_modules=["q_proj"])


@pytest.fixture
def vouched(plain: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(plain, tmp_path / "vouched")
    (folder / GOLDEN_FILE).write_text(json.dumps(GOLDEN))
    return folder


class Checks:
    """What the registry's check sees, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[Golden] = []
        self.during: Callable[[Callable[[], Lease]], None] = lambda lease: None

    def __call__(self, golden: Golden, lease: Callable[[], Lease]) -> None:
        self.asked.append(golden)
        self.during(lease)


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
def registry(llama: Bench, checks: Checks) -> Registry:
    return Registry(llama.base, residency_of(llama.base), check=checks)


def test_golden_values_are_checked_before_anybody_sees_the_adapter(
    registry: Registry, checks: Checks, vouched: Path
) -> None:
    seen: list[Lease] = []

    def during(lease: Callable[[], Lease]) -> None:
        seen.extend([lease(), lease()])
        assert registry.residency.used_bytes > 0, "it is placed"
        assert registry.published() == []
        with pytest.raises(AdapterNotFoundError):
            registry.acquire("fr")
        registry.release(seen[0])
        registry.release(seen[1])
        assert registry.residency.used_bytes > 0, "and stays while no lease is held"

    checks.during = during
    info = registry.load("fr", vouched)
    assert [golden.tolerance for golden in checks.asked] == [0.5]
    assert {lease.version for lease in seen} == {info.version}
    later = registry.acquire("fr")
    assert later.slot == seen[0].slot
    registry.release(later)
    assert registry.get("fr").leases == 0


def test_without_golden_values_nothing_is_checked(registry: Registry, checks: Checks, plain: Path) -> None:
    registry.load("fr", plain)
    assert checks.asked == []


def test_golden_values_are_no_part_of_the_digest(registry: Registry, plain: Path, vouched: Path) -> None:
    assert registry.load("a", plain).version.digest == registry.load("b", vouched).version.digest


@pytest.mark.parametrize("held", [False, True], ids=["all leases back", "a lease still out"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_refused_adapter_leaves_nothing(
    registry: Registry, checks: Checks, plain: Path, vouched: Path, held: bool, replace: bool
) -> None:
    before = registry.load("fr", plain)
    used = registry.residency.used_bytes
    kept: list[Lease] = []

    def during(lease: Callable[[], Lease]) -> None:
        taken = [lease(), lease()]
        for one in taken[: 1 if held else 2]:
            registry.release(one)
        kept.extend(taken[1:] if held else [])
        raise GoldenError("not what it should be")

    checks.during = during
    with pytest.raises(GoldenError):
        registry.load("fr" if replace else "de", vouched, replace=replace)
    assert [info.version for info in registry.published()] == [before.version]
    if held:
        assert registry.residency.used_bytes == 2 * used, "a step may still compute with it"
        registry.release(kept[0])
    assert registry.residency.used_bytes == used


def test_a_golden_file_that_cannot_be_read_refuses_before_anything_is_placed(
    registry: Registry, checks: Checks, vouched: Path
) -> None:
    (vouched / GOLDEN_FILE).write_text("{}")
    epoch = registry.residency.epoch
    with pytest.raises(ConfigError):
        registry.load("fr", vouched)
    assert registry.residency.epoch == epoch
    assert checks.asked == []


class TestLowered:
    @pytest.fixture
    def folder(self, plain: Path, tmp_path: Path) -> Path:
        return shutil.copytree(plain, tmp_path / "adapter")

    @pytest.fixture(params=["no cache", "cache"])
    def registry(self, request: pytest.FixtureRequest, llama: Bench, tmp_path: Path) -> Registry:
        cache = LoweredCache(tmp_path / "cache", 1 << 20) if request.param == "cache" else None
        return Registry(llama.base, residency_of(llama.base), cache)

    def test_it_is_what_was_placed(self, registry: Registry, llama: Bench, folder: Path) -> None:
        info = registry.load("fr", folder)
        version, lowered = registry.lowered("fr")
        assert version == info.version
        assert dump(lowered) == dump(llama.lower(folder))

    def test_an_unknown_name(self, registry: Registry) -> None:
        with pytest.raises(AdapterNotFoundError):
            registry.lowered("fr")

    @pytest.mark.parametrize("change", ["other content", "gone"])
    def test_a_source_that_changed(
        self, registry: Registry, llama: Bench, tmp_path: Path, folder: Path, change: str
    ) -> None:
        """The cache still has what is served; without it, nothing else may pass for it."""
        info = registry.load("fr", folder)
        expected = dump(llama.lower(folder))
        shutil.rmtree(folder)
        if change == "other content":
            llama.save(folder, seed=2, target_modules=["q_proj"])
        error: type[AdapterError] = SourceChangedError if change == "other content" else SourceNotFoundError
        if (tmp_path / "cache").exists():
            assert dump(registry.lowered("fr")[1]) == expected
            for entry in (tmp_path / "cache").iterdir():
                entry.unlink()
        with pytest.raises(error) as refusal:
            registry.lowered("fr")
        if change == "other content":
            now = registry.examine(folder)[1].digest
            assert info.version.digest in str(refusal.value)
            assert now in str(refusal.value)
        assert str(tmp_path) not in str(refusal.value)


def test_declarations_are_remembered(registry: Registry, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are part of what a version is: read with others, the folder is another version."""
    seen: list[Declared] = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda folder, declared: (seen.append(declared), read(folder, declared))[1])
    declared = Declared(trained_on_base=True)
    version = registry.load("fr", plain, declared).version
    assert registry.lowered("fr")[0] == version
    assert seen == [declared, declared]
    assert registry.load("de", plain).version.digest != version.digest
