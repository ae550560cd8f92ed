"""Adapters made of others: made once, kept while there is room, and never freed under a lease."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from motet.adapters.derived import MOST, Derived
from motet.adapters.effects import Lowered
from motet.adapters.errors import GateError, HostFullError
from motet.adapters.host import HostTier
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion, Digest
from tests.support.bases import residency_of
from tests.support.lowered import BASE, HOST_BYTES, lowered


def version(number: int) -> AdapterVersion:
    return AdapterVersion("merged", Digest(f"{number:064x}"))


class Made:
    """Derived adapters in a host of a few places; remembers in which order they were made."""

    def __init__(self, places: int) -> None:
        self.tiers = Tiers(residency_of(BASE), HostTier(places * HOST_BYTES))
        self.leases = Leases(self.tiers.drop)
        self.derived = Derived(self.tiers, self.leases)
        self.order: list[int] = []

    def acquire(self, number: int) -> Lease:
        def make() -> tuple[Lowered, None]:
            self.order.append(number)
            return lowered(number), None

        return self.derived.acquire(version(number), make)

    def use(self, number: int) -> None:
        self.leases.release(self.acquire(number))

    @property
    def used(self) -> int:
        return self.tiers.host.used_bytes // HOST_BYTES


def test_made_once() -> None:
    made = Made(4)
    first, again = made.acquire(1), made.acquire(1)
    assert first.resident is again.resident
    assert made.order == [1]
    made.use(2)
    assert made.order == [1, 2]
    assert made.used == 2


def test_made_once_when_many_ask_at_the_same_time() -> None:
    made, together = Made(4), threading.Barrier(8)

    def ask(_: int) -> Lease:
        together.wait(10)
        return made.acquire(1)

    with ThreadPoolExecutor(8) as threads:
        leases = list(threads.map(ask, range(8)))
    assert made.order == [1]
    assert leases[0].resident.leases == 8
    assert len({lease.resident for lease in leases}) == 1


def test_a_full_host_drops_the_one_used_longest_ago() -> None:
    made = Made(2)
    made.use(1)
    made.use(2)
    made.use(1)
    made.use(3)
    assert made.used == 2
    made.use(1)
    assert made.order == [1, 2, 3]
    made.use(2)
    assert made.order == [1, 2, 3, 2]


def test_what_is_leased_is_never_dropped() -> None:
    made = Made(2)
    held = made.acquire(1)
    made.use(2)
    made.use(3)
    assert made.order == [1, 2, 3]
    other = made.acquire(3)
    with pytest.raises(HostFullError):
        made.acquire(4)
    made.leases.release(other)
    made.use(4)
    assert made.used == 2
    assert made.acquire(1).resident is held.resident


def test_no_more_than_so_many_are_kept() -> None:
    made = Made(2 * MOST)
    for number in range(MOST + 3):
        made.use(number)
        assert made.used == min(number + 1, MOST)
    made.use(3)
    assert len(made.order) == MOST + 3
    made.use(2)
    assert made.order[-1] == 2


def test_more_may_be_leased_and_the_newest_is_not_dropped() -> None:
    made = Made(2 * MOST)
    leases = [made.acquire(number) for number in range(MOST + 2)]
    assert made.used == MOST + 2
    for lease in leases:
        made.leases.release(lease)
    made.use(99)
    assert made.used == MOST


def test_what_must_stay_of_a_loaded_adapter_takes_the_room_of_those_nobody_uses() -> None:
    """Its head, say: the host keeps both as long as they exist."""
    made = Made(2)
    held = made.acquire(1)
    made.use(2)
    packed = made.tiers.residency.pack(lowered(7))
    made.derived.admit(Resident(version(7)), packed, None)
    assert made.used == 2
    with pytest.raises(HostFullError):
        made.derived.admit(Resident(version(8)), packed, None)
    made.use(1)
    assert (made.order, held.resident.leases) == ([1, 2], 1)


def test_dropped_once_nobody_uses_it() -> None:
    made = Made(2)
    held = made.acquire(1)
    made.derived.drop(version(1))
    assert (made.derived.find(version(1)), made.used) == (None, 1)
    made.leases.release(held)
    assert made.used == 0
    made.use(1)
    assert made.order == [1, 1]
    made.derived.drop(version(1))
    made.derived.drop(version(1))
    assert made.used == 0


def test_others_are_found_while_one_is_made() -> None:
    """A decomposition takes seconds; requests of what is there must not wait for it."""
    made, begun, go_on = Made(4), threading.Event(), threading.Event()
    made.use(1)

    def slow() -> tuple[Lowered, None]:
        begun.set()
        assert go_on.wait(10)
        return lowered(2), None

    with ThreadPoolExecutor(1) as threads:
        making = threads.submit(made.derived.acquire, version(2), slow)
        assert begun.wait(10)
        made.use(1)
        made.use(3)
        assert made.used == 2
        go_on.set()
        assert making.result(10).version == version(2)
    assert made.order == [1, 3]


def test_one_that_cannot_be_made_leaves_nothing() -> None:
    made = Made(1)

    def fail() -> tuple[Lowered, None]:
        raise GateError("adapters", "no")

    with pytest.raises(GateError):
        made.derived.acquire(version(1), fail)
    assert made.used == 0
    made.use(1)
    assert made.used == 1
