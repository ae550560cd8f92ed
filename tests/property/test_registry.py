"""Any sequence of publishing, rolling back, retiring, leasing, evicting and crashing: I1, I2, I4, I5 and I7 of
docs/architecture.md, and names that mean what their author was told.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig
from safetensors.torch import load_file

from motet.adapters.base import BaseModel
from motet.adapters.catalogue import Catalogue
from motet.adapters.condition import ANY, KNOWN, NEW, NO_TERMS, Condition, Terms
from motet.adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    CatalogueError,
    SourceNotFoundError,
    VersionConflictError,
    VersionNotServedError,
)
from motet.adapters.host import HostTier
from motet.adapters.lease import Lease
from motet.adapters.origin import Origin, folders
from motet.adapters.registry import Registry
from motet.adapters.standing import State
from motet.adapters.tiers import Tiers
from motet.adapters.version import Digest
from tests.support.bases import base_of, residency_of
from tests.support.models import save_peft, tiny_llama
from tests.support.names import Names

KEPT = 3
ON_DEVICE, ON_HOST = 3, 2
"""Adapters that fit; there are more versions than that."""
TARGET = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{TARGET}.lora_A.weight"
NAMES = st.sampled_from(["fr", "de", "fr/legal"])
SOURCES = st.sampled_from(["0", "1", "2", "3"])
PICKS = st.integers(0, 99)


class World:
    """A base, and sources of equal size below a root."""

    base: BaseModel
    root: Path
    digests: dict[str, str]
    """Source → what it has."""
    a_RI: dict[str, torch.Tensor]
    """Digest → A of the first target, read from the file by others."""
    one_bytes: int


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    model, World.root = tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("sources")
    World.base = base_of(model)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    plain = Registry(World.base, residency_of(World.base))
    World.digests, World.a_RI = {}, {}
    for seed in range(4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's matter
            folder = save_peft(model, World.root / str(seed), config, seed)
        receipt = plain.examine(folder)[1]
        World.digests[str(seed)], World.one_bytes = receipt.digest, receipt.resident_bytes
        World.a_RI[receipt.digest] = load_file(folder / "adapter_model.safetensors")[A]
    assert len(set(World.digests.values())) == 4
    yield
    plain.tiers.stop()


class Machine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.deaths = 0
        self.model = Names(KEPT)
        self.registry = self._opened()

    # ------------------------------------------------------------------------------------------------ changes

    @rule(name=NAMES, source=SOURCES, on=st.sampled_from(["", "", "", "*", "new", "0", "1", "absent", "full"]))
    def publish(self, name: str, source: str, on: str) -> None:
        """On a condition, from a source that is not there, or to a disk that is full."""
        now = self.model.versions.get(name, [None])[0]
        condition, error = ANY, None
        if on == "*":
            condition, error = KNOWN, AdapterNotFoundError if now is None else None
        elif on == "new":
            condition, error = NEW, None if now is None else AdapterExistsError
        elif on in World.digests:
            condition = Condition(Digest(World.digests[on]))
            error = None if now == World.digests[on] else VersionConflictError
        elif on == "absent":
            source, error = on, SourceNotFoundError
        elif on == "full":
            self.registry.catalogue._audit, error = self._full, CatalogueError  # type: ignore[method-assign]
        with pytest.raises(error) if error else contextlib.nullcontext():
            self.registry.publish(name, Origin(source), Terms(condition))
        self.registry.catalogue.__dict__.pop("_audit", None)
        if error is None:
            self.model.publish(name, World.digests[source])

    @precondition(lambda self: self.model.versions)
    @rule(pick=PICKS, to=st.integers(0, KEPT))
    def roll_back(self, pick: int, to: int) -> None:
        name = self._name(pick)
        kept = self.model.versions[name]
        asked = None if to == KEPT else kept[to % len(kept)]
        target = asked or (kept[1] if len(kept) > 1 else None)
        try:
            info = self.registry.rollback(name, asked and asked[:12], NO_TERMS)
        except AdapterNotFoundError:
            assert target is None
            return
        assert info.version.digest == target
        self.model.publish(name, info.version.digest)

    @precondition(lambda self: self.model.versions)
    @rule(pick=PICKS)
    def retire(self, pick: int) -> None:
        name = self._name(pick)
        assert self.registry.unload(name).digest == self.model.versions[name][0]
        self.model.remove(name)

    # ------------------------------------------------------------------------------------------------ requests

    @precondition(lambda self: self.model.versions)
    @rule(pick=PICKS, asked=st.sampled_from(["", "", "", "0", "1"]), held=st.booleans())
    def lease(self, pick: int, asked: str, held: bool) -> None:
        """I5: what a name means is found out once."""
        name = self._name(pick)
        now, exact = self.model.versions[name][0], World.digests.get(asked)
        if exact not in (None, now):
            with pytest.raises(VersionNotServedError):
                self.registry.acquire(f"{name}@{exact}")
            return
        self.leases.append((self.registry.acquire(f"{name}@{exact[:12]}" if exact else name), name, now))
        if held:
            self.hold(len(self.leases) - 1)

    @precondition(lambda self: self.leases)
    @rule(pick=PICKS)
    def release(self, pick: int) -> None:
        lease, _, _ = self.leases.pop(pick % len(self.leases))
        if all(other is not lease for other, _, _ in self.leases):
            while lease in self.held:
                self.held.remove(lease)
                self.tiers.let_go([lease])
        self.registry.release(lease)

    @precondition(lambda self: self.leases)
    @rule(pick=PICKS)
    def hold(self, pick: int) -> None:
        """As the engine does before it computes: others make room, unless requests hold them."""
        lease, _, _ = self.leases[pick % len(self.leases)]
        if len({id(one.resident) for one in [*self.held, lease]}) > ON_DEVICE - 1:
            return
        deadline_s = time.monotonic() + 20
        while not self.tiers.hold([lease]):
            self.tiers.want([lease])
            assert self.tiers.failure(lease) is None
            assert time.monotonic() < deadline_s, "a version never comes to the device"
            time.sleep(0.0005)
        self.tiers.want([])
        self.held.append(lease)

    # ------------------------------------------------------------------------------------------------ deaths

    @precondition(lambda self: self.deaths < 3)
    @rule(torn=st.booleans())
    def crash(self, torn: bool) -> None:
        """What is on the disk is copied, as a killed process leaves it, in the middle of a change or not."""
        registry, self.deaths = self.registry, self.deaths + 1
        after = self.folder / str(self.deaths)
        after.mkdir()
        with registry.catalogue._lock:
            if torn:
                registry.catalogue._db.execute("BEGIN IMMEDIATE")
                registry.catalogue._db.execute("DELETE FROM versions")
            for file in self.file.parent.glob("names.db*"):
                shutil.copy(file, after)
            if torn:
                registry.catalogue._db.execute("ROLLBACK")
        self._end()
        self.registry = self._opened()

    # ------------------------------------------------------------------------------------------------ what must hold

    @invariant()
    def names_mean_what_they_should(self) -> None:
        standings = {one.name: one for one in self.registry.standings()}
        versions = {name: [one.digest for one in found.versions] for name, found in standings.items()}
        assert {name: digests for name, digests in versions.items() if digests} == self.model.versions
        for name, found in standings.items():
            leased = Counter(digest for _, of, digest in self.leases if of == name)
            assert {digest: count for digest, count in found.leases.items() if count} == leased
            assert found.state is (State.READY if name in self.model.versions else State.DRAINING)
        assert {name for _, name, _ in self.leases} <= standings.keys()
        published = {info.version.name: info.version.digest for info in self.registry.published()}
        assert published == {name: digests[0] for name, digests in self.model.versions.items()}

    @invariant()
    def what_is_held_is_as_it_was_published(self) -> None:
        """I1 and I2."""
        by_slot: dict[int, int] = {}
        for lease in self.held:
            assert by_slot.setdefault(lease.slot, id(lease.resident)) == id(lease.resident), "a slot holds two versions"
            assert torch.equal(self._a_at(lease), World.a_RI[lease.version.digest])
        for lease, name, digest in self.leases:
            assert (lease.version.name, lease.version.digest) == (name, digest), "a lease moved to another version"

    @invariant()
    def budgets_hold(self) -> None:
        """I4."""
        residency, host = self.registry.residency, self.tiers.host
        assert residency.used_bytes <= residency.budget_bytes == ON_DEVICE * World.one_bytes
        assert host.used_bytes <= host.budget_bytes

    def teardown(self) -> None:
        """I7."""
        if not hasattr(self, "registry"):
            return
        while self.leases:
            self.release(0)
        for name in list(self.model.versions):
            self.registry.unload(name)
        assert self.registry.standings() == []
        deadline_s = time.monotonic() + 20
        while self.registry.residency.used_bytes or self.tiers.host.used_bytes:  # the loader may be at it
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        self._end()
        shutil.rmtree(self.folder)

    def _opened(self) -> Registry:
        self.leases: list[tuple[Lease, str, str]] = []
        self.held: list[Lease] = []
        self.file = self.folder / (str(self.deaths) if self.deaths else ".") / "names.db"
        residency = residency_of(World.base, ON_DEVICE * World.one_bytes)
        self.tiers = Tiers(residency, HostTier(ON_HOST * 2 * World.one_bytes), None, World.base.fingerprint)
        catalogue, resolve = Catalogue(self.file, World.base.fingerprint, KEPT), folders([World.root])
        catalogue._db.execute("PRAGMA synchronous = OFF")  # what is copied is what was written, not what is on the disk
        registry = Registry(World.base, residency, tiers=self.tiers, catalogue=catalogue, resolve=resolve)
        registry.restore(lambda name: None)
        return registry

    def _end(self) -> None:
        self.tiers.stop()
        self.registry.catalogue.close()

    def _name(self, pick: int) -> str:
        return sorted(self.model.versions)[pick % len(self.model.versions)]

    @staticmethod
    def _full(*_: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def _a_at(self, lease: Lease) -> torch.Tensor:
        """A [R, I] of the first target as it lies in the arena."""
        residency, target = self.registry.residency, World.base.targets[TARGET]
        addresses = residency.addresses([lease.slot])
        first, rank = (int(column[target.index, 0]) for column in (addresses.a_first, addresses.rank))
        units = rank * target.in_width // residency.arena.unit
        return residency.arena.units_NU[first : first + units].reshape(-1, target.in_width)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
