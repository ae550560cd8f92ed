"""A registry on the catalogue of one that is gone serves what that one served, or says why not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from motet.adapters.catalogue import Catalogue
from motet.adapters.condition import NO_TERMS, Condition, Terms
from motet.adapters.errors import AdapterFailedError, AdapterNotFoundError, VersionConflictError
from motet.adapters.origin import Origin, folders as below
from motet.adapters.registry import Registry
from motet.adapters.standing import State
from tests.support.bases import residency_of
from tests.unit.adapters.conftest import Bench, edit


class World:
    """An adapter root with "0", "1" and "2", a catalogue file, and one registry after the other on them."""

    def __init__(self, llama: Bench, folder: Path) -> None:
        self.llama, self.root, self.file = llama, folder / "root", folder / "names.db"
        for seed in range(3):
            llama.save(self.root / str(seed), seed=seed, target_modules=["q_proj"])
        self.heard: list[str] = []

    def start(self, *besides: str, root: str = ".") -> Registry:
        catalogue = Catalogue(self.file, self.llama.base.fingerprint)
        residency, resolve = residency_of(self.llama.base), below([self.root / root])
        registry = Registry(self.llama.base, residency, catalogue=catalogue, resolve=resolve)
        self.heard = []
        registry.restore(self.heard.append, besides)
        return registry


@pytest.fixture
def world(llama: Bench, tmp_path: Path) -> World:
    return World(llama, tmp_path)


def test_names_versions_pins_and_quotas_come_back(world: World) -> None:
    registry = world.start()
    registry.publish("fr", Origin("0"), NO_TERMS)
    registry.publish("fr", Origin("1"), Terms(pinned=True, quota={"tokens_per_minute": 60.0}))
    registry.publish("de", Origin("2", trained_on_base=True), NO_TERMS)
    registry.publish("gone", Origin("2"), NO_TERMS)
    registry.unload("gone")
    before = registry.published()
    registry.catalogue.close()
    again = world.start()
    assert again.published() == before
    assert world.heard == ["de", "fr"]
    assert again.residency.used_bytes == registry.residency.used_bytes
    assert again.get("fr").quota == {"tokens_per_minute": 60.0}
    first = again.standing("fr").versions[1].digest
    assert again.rollback("fr", None, NO_TERMS).version.digest == first
    again.catalogue.close()


@pytest.mark.parametrize("fault", ["changed", "gone", "root"])
def test_what_cannot_be_restored_answers_with_its_error_and_the_others_serve(world: World, fault: str) -> None:
    registry = world.start()
    for name in ("0", "1"):
        registry.publish(f"fr-{name}", Origin(name), NO_TERMS)
    digest = registry.get("fr-0").version.digest
    registry.catalogue.close()
    if fault == "changed":
        edit(world.root / "0", config={"lora_alpha": 3})
    if fault == "gone":
        shutil.rmtree(world.root / "0")
    if fault == "root":
        shutil.copytree(world.root / "1", world.root / "inner" / "1")
    again = world.start(root="inner" if fault == "root" else ".")
    assert [info.version.name for info in again.published()] == ["fr-1"]
    for asked in ("fr-0", f"fr-0@{digest}"):
        with pytest.raises(AdapterFailedError, match="'fr-0' could not be restored: "):
            again.acquire(asked)
    standing = again.standing("fr-0")
    assert (standing.state, standing.info, standing.versions[0].digest) == (State.FAILED, None, digest)
    assert standing.error is not None
    assert str(world.root) not in standing.error
    with pytest.raises(VersionConflictError, match=digest):
        again.publish("fr-0", Origin("1"), Terms(Condition(again.get("fr-1").version.digest)))
    again.publish("fr-0", Origin("1"), Terms(Condition(digest)))
    assert (again.standing("fr-0").state, again.standing("fr-0").error) == (State.READY, None)
    again.release(again.acquire("fr-0"))
    again.catalogue.close()


def test_a_name_that_failed_can_be_removed(world: World) -> None:
    registry = world.start()
    digest = registry.publish("fr", Origin("0"), NO_TERMS).version.digest
    registry.catalogue.close()
    shutil.rmtree(world.root / "0")
    again = world.start()
    assert again.unload("fr").digest == digest
    with pytest.raises(AdapterNotFoundError):
        again.acquire("fr")
    assert again.standings() == []
    again.catalogue.close()


def test_names_that_are_about_to_be_published_are_left_out(world: World) -> None:
    registry = world.start()
    for name in ("fr", "de"):
        registry.publish(name, Origin("0"), NO_TERMS)
    registry.catalogue.close()
    again = world.start("fr")
    assert world.heard == ["de"]
    again.load("fr", world.root / "1", replace=True)
    assert [one.digest for one in again.standing("fr").versions] == [
        again.get("fr").version.digest,
        again.get("de").version.digest,
    ]
    again.catalogue.close()


def test_a_folder_of_the_command_line_is_found_wherever_the_next_process_starts(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(world.root)
    registry = world.start(root="none")
    version = registry.load("fr", Path("0")).version
    registry.catalogue.close()
    monkeypatch.chdir(tmp_path)
    again = world.start(root="none")
    assert again.get("fr").version == version
    again.catalogue.close()
