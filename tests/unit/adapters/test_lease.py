"""Leases keep a version in existence, and retirement drops it with the last one."""

from __future__ import annotations

import pytest

from motet.adapters.lease import Leases, Resident
from motet.adapters.version import AdapterVersion, Digest, Slot


@pytest.fixture
def dropped() -> list[Resident]:
    return []


@pytest.fixture
def leases(dropped: list[Resident]) -> Leases:
    return Leases(dropped.append)


@pytest.fixture
def resident() -> Resident:
    return Resident(AdapterVersion("a", Digest("0" * 64)))


def test_a_retired_one_without_leases_is_dropped_at_once(
    dropped: list[Resident], leases: Leases, resident: Resident
) -> None:
    leases.retire(resident)
    assert dropped == [resident]


def test_a_retired_one_stays_until_its_last_lease_ends(
    dropped: list[Resident], leases: Leases, resident: Resident
) -> None:
    first, second = leases.take(resident), leases.take(resident)
    assert first.version == resident.version
    leases.retire(resident)
    leases.release(first)
    assert dropped == []
    leases.release(second)
    assert dropped == [resident]


def test_one_that_is_not_retired_stays_without_leases(
    dropped: list[Resident], leases: Leases, resident: Resident
) -> None:
    leases.release(leases.take(resident))
    assert (resident.leases, dropped) == (0, [])


def test_a_slot_is_nobodys_while_the_version_is_not_on_the_device(leases: Leases, resident: Resident) -> None:
    lease = leases.take(resident)
    with pytest.raises(AssertionError, match="not on the device"):
        _ = lease.slot
    resident.slot = Slot(3)
    assert lease.slot == 3


def test_a_lease_ends_once(leases: Leases, resident: Resident) -> None:
    lease = leases.take(resident)
    leases.release(lease)
    with pytest.raises(AssertionError, match="released twice"):
        leases.release(lease)
