"""A version lives as long as somebody computes with it, and no longer; what is refused leaves nothing behind."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    ArenaFullError,
    InvalidNameError,
    MissingTensorError,
    NameBusyError,
    SourceNotFoundError,
)
from motet.adapters.lease import Lease
from motet.adapters.registry import Registry
from tests.support.bases import residency_of
from tests.unit.adapters.conftest import Bench, edit

TARGET = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(llama: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of equal size and different content."""
    root = tmp_path_factory.mktemp("adapters")
    return [llama.save(root / str(seed), seed=seed, target_modules=["q_proj"]) for seed in range(3)]


@pytest.fixture
def registry(llama: Bench) -> Registry:
    return Registry(llama.base, residency_of(llama.base))


@pytest.fixture(scope="module")
def one_bytes(llama: Bench, folders: list[Path]) -> int:
    """What one adapter takes: two layers of rank 4, 48 to 48 wide, float32."""
    size = residency_of(llama.base).bytes_needed(llama.lower(folders[0]))
    assert size == 2 * 4 * (48 + 48) * 4
    return size


def a_at(registry: Registry, lease: Lease) -> torch.Tensor:
    """A [R, I] of the first target as it lies in the arena."""
    target = registry.base.targets[TARGET]
    addresses = registry.residency.addresses([lease.slot])
    units = int(addresses.rank[target.index, 0]) * target.in_width // registry.residency.arena.unit
    first = int(addresses.a_first[target.index, 0])
    return registry.residency.arena.units_NU[first : first + units].reshape(-1, target.in_width).clone()


def a_of(llama: Bench, folder: Path) -> torch.Tensor:
    low_rank = llama.lower(folder).effects[TARGET].low_rank
    assert low_rank is not None
    return low_rank.a_RI


def test_published_adapter_can_be_leased(registry: Registry, llama: Bench, folders: list[Path], one_bytes: int) -> None:
    info = registry.load("fr", folders[0])
    assert (info.version.name, info.leases) == ("fr", 0)
    assert info.receipt.digest == info.version.digest
    assert info.receipt.resident_bytes == one_bytes == registry.residency.used_bytes
    lease = registry.acquire("fr")
    assert lease.version == info.version
    assert torch.equal(a_at(registry, lease), a_of(llama, folders[0]))
    assert registry.get("fr").leases == 1
    registry.release(lease)
    assert registry.get("fr").leases == 0
    assert registry.residency.used_bytes == one_bytes, "a published version stays without leases"


def test_unload_frees_an_unused_version_at_once(registry: Registry, folders: list[Path]) -> None:
    registry.load("fr", folders[0])
    assert registry.unload("fr").name == "fr"
    assert registry.residency.used_bytes == 0
    for use in (registry.acquire, registry.unload, registry.get):
        with pytest.raises(AdapterNotFoundError, match="'fr' is not loaded"):
            use("fr")


def test_unload_frees_a_leased_version_with_its_last_lease(
    registry: Registry, llama: Bench, folders: list[Path], one_bytes: int
) -> None:
    registry.load("fr", folders[0])
    first, second = registry.acquire("fr"), registry.acquire("fr")
    registry.unload("fr")
    assert registry.draining("fr") == 2
    with pytest.raises(AdapterNotFoundError):
        registry.acquire("fr")
    registry.load("other", folders[1])
    assert torch.equal(a_at(registry, first), a_of(llama, folders[0])), "a leased version was overwritten"
    registry.release(first)
    assert registry.residency.used_bytes == 2 * one_bytes
    assert registry.draining("fr") == 1
    registry.release(second)
    assert registry.draining("fr") == 0
    assert registry.residency.used_bytes == one_bytes


def test_renewed_lease_keeps_the_version_after_the_first_ended(
    registry: Registry, folders: list[Path], one_bytes: int
) -> None:
    registry.load("fr", folders[0])
    lease = registry.acquire("fr")
    registry.unload("fr")
    renewed = registry.renew(lease)
    assert (renewed.version, renewed.slot) == (lease.version, lease.slot)
    registry.release(lease)
    assert registry.residency.used_bytes == one_bytes
    registry.release(renewed)
    assert registry.residency.used_bytes == 0


def test_replacement_keeps_the_old_version_until_its_last_lease(
    registry: Registry, llama: Bench, folders: list[Path], one_bytes: int
) -> None:
    old = registry.load("fr", folders[0])
    lease = registry.acquire("fr")
    new = registry.load("fr", folders[1], replace=True)
    assert new.version != old.version
    assert registry.get("fr").version == new.version
    later = registry.acquire("fr")
    assert later.version == new.version
    assert torch.equal(a_at(registry, lease), a_of(llama, folders[0]))
    assert torch.equal(a_at(registry, later), a_of(llama, folders[1]))
    assert registry.residency.used_bytes == 2 * one_bytes
    registry.release(lease)
    assert registry.residency.used_bytes == one_bytes
    assert torch.equal(a_at(registry, later), a_of(llama, folders[1]))


def test_replacement_frees_an_unused_version_at_once(registry: Registry, folders: list[Path], one_bytes: int) -> None:
    registry.load("fr", folders[0])
    registry.load("fr", folders[1], replace=True)
    assert registry.residency.used_bytes == one_bytes
    assert [info.version.name for info in registry.published()] == ["fr"]


def test_taken_name_is_refused_without_replacement(registry: Registry, folders: list[Path], one_bytes: int) -> None:
    first = registry.load("fr", folders[0])
    with pytest.raises(AdapterExistsError, match="'fr' is already loaded"):
        registry.load("fr", folders[1])
    with pytest.raises(AdapterExistsError):
        registry.load("fr", folders[1].parent / "absent")  # before anything is read
    assert registry.get("fr").version == first.version
    assert registry.residency.used_bytes == one_bytes


@pytest.mark.parametrize("fault", ["absent", "refused", "too large"])
@pytest.mark.parametrize("replace", [False, True])
def test_failed_load_leaves_nothing_behind(
    llama: Bench, folders: list[Path], one_bytes: int, tmp_path: Path, fault: str, replace: bool
) -> None:
    registry = Registry(llama.base, residency_of(llama.base, budget_bytes=2 * one_bytes))
    published = registry.load("fr", folders[0])
    arena = registry.residency.arena.units_NU
    arena[registry.residency.arena.allocator.used :] = 7.0
    before, epoch = arena.clone(), registry.residency.epoch
    folder = tmp_path / "absent"
    error: type[AdapterError] = SourceNotFoundError
    if fault == "refused":
        folder = edit(
            llama.save(tmp_path / "refused", target_modules=["q_proj"]), config={"target_modules": ["q_proj", "k_proj"]}
        )
        error = MissingTensorError
    if fault == "too large":
        folder, error = llama.save(tmp_path / "large", r=9, target_modules=["q_proj"]), ArenaFullError
    with pytest.raises(error):
        registry.load("fr" if replace else "de", folder, replace=replace)
    assert [info.version for info in registry.published()] == [published.version]
    assert registry.residency.used_bytes == one_bytes
    assert registry.residency.epoch == epoch
    if fault != "too large":
        assert torch.equal(registry.residency.arena.units_NU, before)
    registry.load("de", folders[1])  # the place is still there, in one piece


def test_lease_ends_once(registry: Registry, folders: list[Path]) -> None:
    registry.load("fr", folders[0])
    lease = registry.acquire("fr")
    registry.release(lease)
    with pytest.raises(AssertionError, match="released twice"):
        registry.release(lease)


@pytest.mark.parametrize("name", ["a", "0", "fr-legal", "org/model:v1.2", "a@b+c_d", "x" * 128])
def test_names_that_are_allowed(registry: Registry, folders: list[Path], name: str) -> None:
    assert registry.load(name, folders[0]).version.name == name


NAMELESS = ["", "x" * 129, "-a", ".", "../x", "/a", "a b", "a\n", "a\0", "é", "a\\b", 'a"', "a?b"]
ENDINGS = ["a/merges", "a/merges/b", "a/lowered", "a/rollback"]


@pytest.mark.parametrize("name", [*NAMELESS, *ENDINGS, "base"])
def test_names_that_are_refused_before_anything_is_read(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidNameError):
        registry.load(name, tmp_path / "absent")


def test_published_is_in_order_of_names(registry: Registry, folders: list[Path]) -> None:
    for name, folder in zip(["c", "a", "b"], folders, strict=True):
        registry.load(name, folder)
    assert [info.version.name for info in registry.published()] == ["a", "b", "c"]


def test_one_content_under_two_names_is_two_versions(registry: Registry, folders: list[Path]) -> None:
    one, two = registry.load("one", folders[0]), registry.load("two", folders[0])
    assert one.version.digest == two.version.digest
    assert registry.acquire("one").slot != registry.acquire("two").slot


def test_leases_and_replacements_from_many_threads_end_with_one_version(
    registry: Registry, llama: Bench, folders: list[Path], one_bytes: int
) -> None:
    registry.load("fr", folders[0])
    contents = {registry.examine(folder)[1].digest: a_of(llama, folder) for folder in folders}

    def use(_: int) -> None:
        for _ in range(60):
            lease = registry.acquire("fr")
            again = registry.renew(lease)
            registry.release(lease)
            assert torch.equal(a_at(registry, again), contents[again.version.digest])
            registry.release(again)

    def publish(i: int) -> None:
        for j in range(5):
            while True:
                with contextlib.suppress(NameBusyError):
                    registry.load("fr", folders[(i + j) % len(folders)], replace=True)
                    break

    with ThreadPoolExecutor(5) as pool:
        done = [pool.submit(use, i) for i in range(3)] + [pool.submit(publish, i) for i in range(2)]
        for future in done:
            future.result(60)
    assert registry.get("fr").leases == 0
    assert registry.residency.used_bytes == one_bytes
    registry.unload("fr")
    assert registry.residency.used_bytes == 0
