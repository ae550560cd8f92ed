"""Leases keep a version in memory, retirement frees it with the last one, and derived adapters are made once."""

from __future__ import annotations

import pytest
import torch

from motet.adapters.effects import Lowered, LowRank, TargetEffects
from motet.adapters.lease import Leases, Resident
from motet.adapters.residency import Residency
from motet.adapters.version import AdapterVersion, Digest
from tests.support.bases import base_of_names, residency_of


def lowered(value: float = 1.0) -> Lowered:
    """A pair of rank one on the only target."""
    pair = LowRank(torch.full((1, 4), value), torch.full((4, 1), value))
    return Lowered("lora", "by hand", "none", {"q": TargetEffects(pair)}, 1)


@pytest.fixture
def residency() -> Residency:
    return residency_of(base_of_names(["q"]))


@pytest.fixture
def leases(residency: Residency) -> Leases:
    return Leases(residency)


@pytest.fixture
def resident(residency: Residency) -> Resident:
    return Resident(AdapterVersion("a", Digest("0" * 64)), residency.place(lowered()))


def test_a_retired_one_without_leases_is_freed_at_once(
    residency: Residency, leases: Leases, resident: Resident
) -> None:
    assert residency.used_bytes > 0
    leases.retire(resident)
    assert residency.used_bytes == 0


def test_a_retired_one_stays_until_its_last_lease_ends(
    residency: Residency, leases: Leases, resident: Resident
) -> None:
    first, second = leases.take(resident), leases.take(resident)
    assert (first.version, first.slot) == (resident.version, resident.slot)
    leases.retire(resident)
    leases.release(first)
    assert residency.used_bytes > 0
    leases.release(second)
    assert residency.used_bytes == 0


def test_one_that_is_not_retired_stays_without_leases(residency: Residency, leases: Leases, resident: Resident) -> None:
    leases.release(leases.take(resident))
    assert resident.leases == 0
    assert residency.used_bytes > 0


def test_a_lease_ends_once(leases: Leases, resident: Resident) -> None:
    lease = leases.take(resident)
    leases.release(lease)
    with pytest.raises(AssertionError, match="released twice"):
        leases.release(lease)
