"""Who may change a name, on which terms, and what is kept of it: compare and swap, rollback, exact versions."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from motet.adapters.condition import ANY, KNOWN, NEW, Condition, Terms
from motet.adapters.effects import Lowered
from motet.adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    CatalogueError,
    NameBusyError,
    PublishesFullError,
    SourceChangedError,
    SourceNotFoundError,
    UnsafePathError,
    VersionConflictError,
    VersionNotServedError,
)
from motet.adapters.origin import Origin, folders as below
from motet.adapters.packed import Packed
from motet.adapters.registry import PUBLISHES, Registry
from motet.adapters.standing import State
from motet.adapters.version import Digest
from tests.support.bases import residency_of
from tests.unit.adapters.conftest import Bench, edit

OTHER = Digest("f" * 64)


@pytest.fixture
def root(llama: Bench, tmp_path: Path) -> Path:
    """An adapter root with "0", "1" and "2": equal size, different content."""
    for seed in range(3):
        llama.save(tmp_path / "root" / str(seed), seed=seed, target_modules=["q_proj"])
    return tmp_path / "root"


@pytest.fixture
def registry(llama: Bench, root: Path) -> Registry:
    return Registry(llama.base, residency_of(llama.base), resolve=below([root]))


def put(registry: Registry, source: str, condition: Condition = ANY, name: str = "fr", actor: str = "me") -> Digest:
    """Publish a source below the root; its digest."""
    return registry.publish(name, Origin(source), Terms(condition, actor=actor)).version.digest


def eventually(look: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_one_name_is_changed_by_one_at_a_time(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, pack = threading.Event(), threading.Event(), registry.residency.pack

    def waiting(lowered: Lowered) -> Packed:
        begun.set()
        assert go_on.wait(30)
        return pack(lowered)

    monkeypatch.setattr(registry.residency, "pack", waiting)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(put, registry, "0")
        assert begun.wait(30)
        for change in (lambda: put(registry, "1"), lambda: registry.unload("fr")):
            with pytest.raises(NameBusyError, match="'fr' is being changed"):
                change()
        assert [(one.name, one.state, one.versions) for one in registry.standings()] == [("fr", State.LOADING, ())]
        go_on.set()
        assert first.result(30) == registry.get("fr").version.digest
    put(registry, "1")


def test_only_so_many_are_prepared_at_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    put(registry, "0", name="there")
    together, resolve = threading.Barrier(PUBLISHES + 1), registry._publishing._resolve
    monkeypatch.setattr(registry._publishing, "_resolve", lambda origin: (together.wait(30), resolve(origin))[1])
    with ThreadPoolExecutor(PUBLISHES) as pool:
        running = [pool.submit(put, registry, "0", name=str(i)) for i in range(PUBLISHES)]
        eventually(lambda: together.n_waiting == PUBLISHES)
        with pytest.raises(PublishesFullError, match=f"{PUBLISHES} adapters are being published"):
            put(registry, "0", name="more")
        registry.unload("there")  # takes no processor
        together.wait(30)
        assert {future.result(30) for future in running} == {registry.get("0").version.digest}
    monkeypatch.undo()
    put(registry, "0", name="more")


def test_a_name_moves_only_from_the_version_that_is_expected(registry: Registry) -> None:
    first = put(registry, "0", NEW)
    second = put(registry, "1", Condition(first))
    for condition, error in ((Condition(first), VersionConflictError), (NEW, AdapterExistsError)):
        with pytest.raises(error, match="'fr' is") as refusal:
            put(registry, "2", condition)
        if error is VersionConflictError:
            assert first in str(refusal.value)
            assert second in str(refusal.value)
        assert registry.get("fr").version.digest == second
    with pytest.raises(VersionConflictError):
        registry.unload("fr", Terms(Condition(first)))
    with pytest.raises(VersionConflictError):
        registry.rollback("fr", None, Terms(Condition(first)))
    registry.unload("fr", Terms(Condition(second)))
    with pytest.raises(VersionConflictError, match="at no version"):
        put(registry, "0", Condition(second))
    with pytest.raises(AdapterNotFoundError):
        put(registry, "0", KNOWN)
    assert registry.published() == []


def test_a_condition_is_looked_at_before_anything_is_read(registry: Registry) -> None:
    put(registry, "0")
    with pytest.raises(VersionConflictError):
        put(registry, "absent", Condition(OTHER))


def test_of_changes_that_expect_the_same_version_one_wins(registry: Registry) -> None:
    first = put(registry, "0")

    def change(i: int) -> str:
        while True:
            try:
                return put(registry, str(1 + i % 2), Condition(first))
            except (NameBusyError, PublishesFullError):
                time.sleep(0.001)
            except VersionConflictError:
                return "conflict"

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(change, range(4)))
    assert sorted(map(len, outcomes)) == [8, 8, 8, 64], outcomes
    assert registry.get("fr").version.digest in outcomes


def test_a_source_that_is_not_what_was_promised_is_refused(registry: Registry) -> None:
    digest = put(registry, "0")
    with pytest.raises(SourceChangedError) as refusal:
        registry.publish("de", Origin("0"), Terms(digest=OTHER))
    assert digest in str(refusal.value)
    assert OTHER in str(refusal.value)
    assert registry.publish("de", Origin("0"), Terms(digest=digest)).version.digest == digest


def test_a_source_is_below_a_root_unless_the_command_line_names_it(
    llama: Bench, registry: Registry, tmp_path: Path
) -> None:
    outside = llama.save(tmp_path / "outside", seed=5, target_modules=["q_proj"])
    with pytest.raises(UnsafePathError):
        put(registry, str(outside))
    digest = registry.load("fr", outside).version.digest
    put(registry, "0")
    assert registry.rollback("fr", None, Terms()).version.digest == digest, "what was trusted once is trusted again"


class TestRollback:
    def test_to_the_version_before_and_back(self, registry: Registry) -> None:
        first, second = put(registry, "0"), put(registry, "1")
        for expected in (first, second, first):
            assert registry.rollback("fr", None, Terms()).version.digest == expected
            assert registry.get("fr").version.digest == expected
        assert [one.digest for one in registry.standing("fr").versions] == [first, second]

    def test_to_a_version_by_its_first_digits(self, registry: Registry) -> None:
        first, _, third = put(registry, "0"), put(registry, "1"), put(registry, "2")
        assert registry.rollback("fr", first[:12], Terms(Condition(third))).version.digest == first
        lease = registry.acquire("fr")
        assert lease.version.digest == first
        registry.release(lease)

    def test_needs_a_version(self, registry: Registry) -> None:
        put(registry, "0")
        for name, to in (("fr", None), ("fr", OTHER), ("nobody", None)):
            with pytest.raises(AdapterNotFoundError, match=f"'{name}'"):
                registry.rollback(name, to, Terms())

    def test_is_exact_or_refused(self, registry: Registry, root: Path) -> None:
        put(registry, "0")
        now = put(registry, "1")
        edit(root / "0", config={"lora_alpha": 3})
        with pytest.raises(SourceChangedError, match="has digest"):
            registry.rollback("fr", None, Terms())
        shutil.rmtree(root / "0")
        with pytest.raises(SourceNotFoundError):
            registry.rollback("fr", None, Terms())
        assert registry.get("fr").version.digest == now
        assert registry.residency.used_bytes == registry.get("fr").receipt.resident_bytes

    def test_keeps_pins_and_quotas(self, registry: Registry) -> None:
        put(registry, "0")
        registry.publish("fr", Origin("1"), Terms(pinned=True, quota={"weight": 2.0}))
        info = registry.rollback("fr", None, Terms())
        assert (info.pinned, info.quota) == (True, {"weight": 2.0})


def test_pins_and_quotas_stay_until_they_are_changed(registry: Registry) -> None:
    info = registry.publish("fr", Origin("0"), Terms(pinned=True, quota={"weight": 2.0}))
    assert (info.pinned, info.quota) == (True, {"weight": 2.0})
    put(registry, "1")
    assert (registry.get("fr").pinned, registry.get("fr").quota) == (True, {"weight": 2.0})
    info = registry.publish("fr", Origin("1"), Terms(pinned=False, quota={}))
    assert (info.pinned, info.quota) == (False, {})


class TestExactVersions:
    def test_the_current_version_and_no_other(self, registry: Registry) -> None:
        first = put(registry, "0")
        for asked in ("fr", f"fr@{first}", f"fr@{first[:12]}"):
            lease = registry.acquire(asked)
            assert lease.version.digest == first
            assert lease.version.answers_to(asked)
            registry.release(lease)
        lease = registry.acquire(f"fr@{first}")
        second = put(registry, "1")
        with pytest.raises(VersionNotServedError, match=f"version {second}, not as {first[:20]}"):
            registry.acquire(f"fr@{first[:20]}")
        registry.release(lease)

    @pytest.mark.parametrize("asked", ["fr@", "fr@abc", "fr@{0}0", "fr@{1}", "fr@{0}@", "de@{0}", "@{0}", "fr@{2}"])
    def test_what_is_no_version_is_not_found(self, registry: Registry, asked: str) -> None:
        digest = put(registry, "0")
        with pytest.raises(AdapterNotFoundError):
            registry.acquire(asked.format(digest, digest[:11], digest.upper()))

    def test_a_name_of_that_spelling_wins(self, registry: Registry) -> None:
        first = put(registry, "0")
        put(registry, "1", name=f"fr@{first}")
        lease = registry.acquire(f"fr@{first}")
        assert lease.version.name == f"fr@{first}"
        registry.release(lease)
        registry.unload(f"fr@{first}")
        lease = registry.acquire(f"fr@{first}")
        assert lease.version.name == "fr"
        registry.release(lease)


def test_what_is_replaced_or_removed_drains_and_says_so(registry: Registry) -> None:
    first = put(registry, "0")
    old = registry.acquire("fr")
    second = put(registry, "1")
    new = [registry.acquire("fr"), registry.acquire("fr")]
    assert registry.standing("fr").leases == {first: 1, second: 2}
    registry.unload("fr")
    standing = registry.standing("fr")
    assert (standing.state, standing.leases, standing.versions) == (State.DRAINING, {first: 1, second: 2}, ())
    for lease in (old, *new):
        assert registry.standings() != []
        registry.release(lease)
    assert registry.standings() == []
    with pytest.raises(AdapterNotFoundError):
        registry.standing("fr")
    assert registry.residency.used_bytes == 0


def test_every_change_and_every_refusal_is_in_the_audit_trail(registry: Registry) -> None:
    first, second = put(registry, "0", actor="ann"), put(registry, "1", actor="bob")
    with pytest.raises(SourceNotFoundError):
        put(registry, "absent", actor="eve")
    registry.rollback("fr", None, Terms(actor="ann"))
    registry.unload("fr", Terms(actor="bob"))
    lines = [(one.actor, one.action, one.old, one.new) for one in reversed(registry.catalogue.audited(99))]
    assert lines == [
        ("ann", "publish", None, first),
        ("bob", "publish", first, second),
        ("eve", "publish", second, second),
        ("ann", "rollback", second, first),
        ("bob", "delete", first, None),
    ]
    outcomes = [one.outcome for one in registry.catalogue.audited(99)]
    assert outcomes.count("done") == 4
    assert "'absent' is below none of the adapter roots" in outcomes[2]


def test_what_the_catalogue_cannot_keep_is_not_published(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    first = put(registry, "0")
    used = registry.residency.used_bytes

    def full(*_: object) -> float:
        raise CatalogueError("disk full")

    monkeypatch.setattr(registry.catalogue, "publish", full)
    monkeypatch.setattr(registry.catalogue, "remove", full)
    for name in ("fr", "de"):
        with pytest.raises(CatalogueError):
            put(registry, "1", name=name)
    with pytest.raises(CatalogueError):
        registry.unload("fr")
    assert [info.version.digest for info in registry.published()] == [first]
    assert registry.residency.used_bytes == used
