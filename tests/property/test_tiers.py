"""Any life of the tiers, stepped by hand: budgets exact at every instant, held never evicted, pinned stays."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from motet.adapters.errors import ArenaFullError
from motet.adapters.host import HostTier
from motet.adapters.lease import Lease, Leases, Resident
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion, Digest
from tests.support.bases import residency_of
from tests.support.lowered import BASE, DEVICE_BYTES, HOST_BYTES, lowered


class Life(RuleBasedStateMachine):
    @initialize(device=st.integers(1, 6), host=st.integers(1, 8))
    def start(self, device: int, host: int) -> None:
        self.tiers = Tiers(residency_of(BASE, device * DEVICE_BYTES), HostTier(host * HOST_BYTES))
        self.tiers._loader.start = lambda: None  # type: ignore[method-assign]  # the machine takes the turns itself
        self.leases = Leases(self.tiers.drop)
        self.live: dict[Resident, int] = {}
        self.held: list[tuple[list[Lease], list[int]]] = []
        self.queue: list[Lease] = []
        self.number = 0

    @rule(rank=st.integers(1, 3))
    def publish(self, rank: int) -> None:
        self.number += 1
        value = self.number
        resident = Resident(AdapterVersion(str(value), Digest(str(value))))
        packed = self.tiers.residency.pack(lowered(value, rank))
        budget = self.tiers.residency.budget_bytes
        pinned = sum(one.device_bytes for one in self.existing() if one.pinned)
        try:
            self.tiers.admit(resident, packed, lambda: lowered(value, rank))
        except ArenaFullError:
            assert rank * DEVICE_BYTES + pinned > budget
            return
        assert rank * DEVICE_BYTES + pinned <= budget
        self.live[resident] = value

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def retire(self, pick: int) -> None:
        resident = list(self.live)[pick % len(self.live)]
        self.leases.retire(resident)
        del self.live[resident]

    @precondition(lambda self: self.live)
    @rule(picks=st.lists(st.integers(0, 99), min_size=1, max_size=5))
    def ask(self, picks: list[int]) -> None:
        """New requests at the end of the queue."""
        self.queue += [self.leases.take(list(self.live)[pick % len(self.live)]) for pick in picks]
        self.tiers.want(self.queue)

    @rule(most=st.integers(1, 4))
    def admit(self, most: int) -> None:
        """The scheduler's way: whoever can run leaves the queue."""
        for lease in list(self.queue):
            if most and self.tiers.hold([lease]):
                most -= 1
                self.queue.remove(lease)
                self.held.append(([lease], self.addresses(lease)))
        self.tiers.want(self.queue)

    @precondition(lambda self: len(self.queue) > 1)
    @rule()
    def hold_two(self) -> None:
        pair = self.queue[:2]
        before = Counter({lease.resident: lease.resident.holds for lease in pair})
        if self.tiers.hold(pair):
            self.queue = self.queue[2:]
            self.held.append((pair, self.addresses(pair[0])))
            self.tiers.want(self.queue)
        else:
            assert before == Counter({lease.resident: lease.resident.holds for lease in pair}), "one of two is held"

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 99))
    def end(self, pick: int) -> None:
        leases, _ = self.held.pop(pick % len(self.held))
        self.tiers.let_go(leases)
        for lease in leases:
            self.leases.release(lease)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), pin=st.booleans())
    def pin(self, pick: int, pin: bool) -> None:
        resident = list(self.live)[pick % len(self.live)]
        if not pin:
            self.tiers.unpin(resident)
            return
        try:
            self.tiers.pin(resident)
        except ArenaFullError:
            assert not resident.pinned

    @rule(turns=st.integers(1, 4))
    def bring(self, turns: int) -> None:
        for _ in range(turns):
            with self.tiers._changed:
                if self.tiers._next() is None:
                    return
            assert self.tiers._turn()

    @invariant()
    def budgets_are_exact(self) -> None:
        if not hasattr(self, "tiers"):
            return
        everyone = self.existing()
        device = sum(one.device_bytes for one in everyone if one.slot is not None)
        assert self.tiers.residency.used_bytes == device <= self.tiers.residency.budget_bytes
        host = sum(self.tiers.bytes_of(one)["host"] for one in everyone)
        assert self.tiers.host.used_bytes == host <= self.tiers.host.budget_bytes
        slots = [one.slot for one in everyone if one.slot is not None]
        assert len(slots) == len(set(slots)), "a slot holds two versions"

    @invariant()
    def what_is_held_is_there_and_whole(self) -> None:
        if not hasattr(self, "tiers"):
            return
        holds = Counter(lease.resident for leases, _ in self.held for lease in leases)
        for resident, count in holds.items():
            assert resident.holds == count
        for leases, addresses in self.held:
            assert self.addresses(leases[0]) == addresses, "a held version moved"
            for lease in leases:
                self.check(lease)

    def teardown(self) -> None:
        if not hasattr(self, "tiers"):
            return
        while self.held:
            self.end(0)
        for _ in range(4 * len(self.queue) + 4):  # nobody is left waiting
            self.bring(9)
            self.admit(99)
            while self.held:
                self.end(0)
        assert not self.queue, "a request starves"
        for resident in list(self.live):
            self.leases.retire(resident)
        assert (self.tiers.host.used_bytes, self.tiers.residency.used_bytes) == (0, 0)

    def existing(self) -> set[Resident]:
        """Published, or retired with a lease."""
        leased = {lease.resident for lease in self.queue}
        return leased | {*self.live} | {lease.resident for leases, _ in self.held for lease in leases}

    def addresses(self, lease: Lease) -> list[int]:
        found = self.tiers.residency.addresses([lease.slot])
        return [int(lease.slot), int(found.a_first[0, 0]), int(found.b_first[0, 0]), int(found.rank[0, 0])]

    def check(self, lease: Lease) -> None:
        residency = self.tiers.residency
        _, a_first, b_first, rank = self.addresses(lease)
        for first in (a_first, b_first):
            values = residency.arena.view(first, torch.Size((rank, 4)))
            assert bool((values == float(lease.version.name)).all()), "a held version was overwritten"


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
