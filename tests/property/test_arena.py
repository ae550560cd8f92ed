"""Any sequence of placing, releasing and failing: bytes counted exactly, nothing overlaps, nothing moves or changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from motet.adapters.arena import Arena, UnitAllocator
from motet.adapters.base import Target
from motet.adapters.effects import Lowered, LowRank, OutputBias, OutputScale, TargetEffects
from motet.adapters.errors import ArenaFullError
from motet.adapters.residency import Residency
from motet.adapters.version import Slot

SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def gaps(taken: dict[int, int], capacity: int) -> list[tuple[int, int]]:
    """(start, stop) of the maximal free ranges, given start → length of what is taken."""
    found, at = [], 0
    for start, units in sorted(taken.items()):
        assert at <= start, "ranges overlap"
        if at < start:
            found.append((at, start))
        at = start + units
    assert at <= capacity, "a range leaves the arena"
    return [*found, (at, capacity)] if at < capacity else found


class Units(RuleBasedStateMachine):
    @initialize(capacity=st.integers(0, 24))
    def start(self, capacity: int) -> None:
        self.allocator = UnitAllocator(capacity)
        self.taken: dict[int, int] = {}

    @rule(units=st.integers(1, 8))
    def allocate(self, units: int) -> None:
        fitting = [start for start, stop in gaps(self.taken, self.allocator.capacity) if stop - start >= units]
        start = self.allocator.allocate(units)
        assert start == (fitting[0] if fitting else None)
        if start is not None:
            self.taken[start] = units

    @precondition(lambda self: self.taken)
    @rule(pick=st.integers(0, 99))
    def free(self, pick: int) -> None:
        start = sorted(self.taken)[pick % len(self.taken)]
        self.allocator.free(start)
        del self.taken[start]

    @invariant()
    def usage_is_exact(self) -> None:
        if hasattr(self, "allocator"):
            assert self.allocator.used == sum(self.taken.values()) <= self.allocator.capacity
            gaps(self.taken, self.allocator.capacity)

    def teardown(self) -> None:
        if not hasattr(self, "allocator") or not self.allocator.capacity:
            return
        for start in self.taken:
            self.allocator.free(start)
        assert self.allocator.used == 0
        assert self.allocator.allocate(self.allocator.capacity) == 0, "what was freed was not merged"


TestUnits = Units.TestCase
TestUnits.settings = SETTINGS

UNIT = 16
TARGETS = {
    name: Target(index, name, in_width, out_width, has_bias=True)
    for index, (name, in_width, out_width) in enumerate([("q", 32, 48), ("up", 48, 80), ("down", 80, 16)])
}


@dataclass(frozen=True)
class Draft:
    """What to make for one target."""

    rank: int
    scale: bool
    bias: bool


drafts = st.dictionaries(
    st.sampled_from(list(TARGETS)),
    st.builds(Draft, st.sampled_from([0, 1, 2, 3, 7]), st.booleans(), st.booleans()),
    min_size=1,
)


def make(draft: dict[str, Draft], seed: int) -> Lowered:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    effects = {}
    for name, wanted in draft.items():
        target = TARGETS[name]
        a_RI, b_OR = random(wanted.rank, target.in_width), random(target.out_width, wanted.rank)
        effects[name] = TargetEffects(
            LowRank(a_RI, b_OR) if wanted.rank else None,
            OutputScale(random(target.out_width)) if wanted.scale else None,
            OutputBias(random(target.out_width)) if wanted.bias else None,
        )
    return Lowered("lora", "peft", "alpha/r", effects, len(effects))


@dataclass(frozen=True)
class Placed:
    """One operand as the tables say where it is, beside what must be there; [R, width]."""

    first: int
    rows: torch.Tensor

    @property
    def units(self) -> int:
        return self.rows.numel() // UNIT


class Slots(RuleBasedStateMachine):
    dtype: torch.dtype

    @initialize(units=st.integers(1, 160), odd_bytes=st.integers(0, UNIT * 2 - 1))
    def start(self, units: int, odd_bytes: int) -> None:
        self.budget_bytes = units * UNIT * self.dtype.itemsize + odd_bytes
        arena = Arena({32, 48, 80, 16}, self.budget_bytes, self.dtype, torch.device("cpu"))
        assert arena.unit == UNIT
        arena.units_NU.fill_(torch.nan)
        self.residency = Residency(TARGETS, arena)
        self.live: dict[Slot, Lowered] = {}
        self.held: dict[Slot, list[int]] = {}

    @rule(count=st.integers(1, 5), seed=st.integers(0, 2**16))
    def place_small(self, count: int, seed: int) -> None:
        """Many slots, so that the tables grow."""
        for i in range(count):
            self.place({"down": Draft(0, scale=False, bias=True)}, seed + i)

    @rule(draft=drafts, seed=st.integers(0, 2**16))
    def place(self, draft: dict[str, Draft], seed: int) -> None:
        lowered = make(draft, seed)
        needed = self._bytes(lowered)
        assert self.residency.bytes_needed(lowered) == needed
        free = gaps(self._taken(), self.residency.arena.allocator.capacity)
        unit_bytes = self.residency.arena.unit_bytes
        used, epoch = self.residency.used_bytes, self.residency.epoch
        try:
            slot = self.residency.place(lowered)
        except ArenaFullError:
            assert max((stop - start for start, stop in free), default=0) * unit_bytes < needed
            assert (self.residency.used_bytes, self.residency.epoch) == (used, epoch)
            return
        assert slot not in self.live, "a slot holds two versions"
        assert self.residency.used_bytes == used + needed
        assert self.residency.epoch != epoch
        self.live[slot] = lowered
        self.held[slot] = self._addresses(slot)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def release(self, pick: int) -> None:
        slot = sorted(self.live)[pick % len(self.live)]
        epoch = self.residency.epoch
        self.residency.release(slot)
        assert self.residency.epoch != epoch
        del self.live[slot], self.held[slot]

    @invariant()
    def usage_is_exact_and_within_the_budget(self) -> None:
        if not hasattr(self, "residency"):
            return
        assert self.residency.used_bytes == sum(self._bytes(lowered) for lowered in self.live.values())
        assert self.residency.used_bytes <= self.residency.budget_bytes <= self.budget_bytes
        gaps(self._taken(), self.residency.arena.allocator.capacity)

    @invariant()
    def live_slots_are_as_they_were_placed(self) -> None:
        if not hasattr(self, "residency"):
            return
        for slot in self.live:
            assert self._addresses(slot) == self.held[slot], "a held slot's addresses changed"
            for placed in self._placed(slot):
                found = self.residency.arena.units_NU[placed.first : placed.first + placed.units]
                expected = placed.rows.to(self.dtype).reshape(-1, UNIT)
                assert torch.equal(found, expected), "a held slot's operands changed"

    def teardown(self) -> None:
        if not hasattr(self, "residency"):
            return
        for slot in self.live:
            self.residency.release(slot)
        assert self.residency.used_bytes == 0
        capacity = self.residency.arena.allocator.capacity
        assert self.residency.arena.allocator.allocate(capacity) == 0

    def _bytes(self, lowered: Lowered) -> int:
        return self.dtype.itemsize * sum(rows.numel() for name in lowered.effects for _, rows in _rows(lowered, name))

    def _addresses(self, slot: Slot) -> list[int]:
        found = self.residency.addresses([slot])
        columns = (found.a_first, found.b_first, found.rank, found.scale_first, found.bias_first)
        return [int(x) for column in (*columns, found.has_scale, found.has_bias) for x in column[:, 0]]

    def _placed(self, slot: Slot) -> Iterator[Placed]:
        lowered, found = self.live[slot], self.residency.addresses([slot])
        for name, target in TARGETS.items():
            effects, at = lowered.effects.get(name, TargetEffects()), (target.index, 0)
            assert found.rank[at] == (effects.low_rank.rank if effects.low_rank else 0)
            assert found.has_scale[at] == (effects.scale is not None)
            assert found.has_bias[at] == (effects.bias is not None)
            for kind, rows in _rows(lowered, name):
                yield Placed(int(getattr(found, kind)[at]), rows)

    def _taken(self) -> dict[int, int]:
        every = [placed for slot in self.live for placed in self._placed(slot)]
        taken = {placed.first: placed.units for placed in every}
        assert len(taken) == len(every), "two operands begin at one place"
        return taken


def _rows(lowered: Lowered, name: str) -> list[tuple[str, torch.Tensor]]:
    """(field of Addresses, operand as rows of one target's width)."""
    effects = lowered.effects.get(name, TargetEffects())
    rows = []
    if effects.low_rank:
        rows += [("a_first", effects.low_rank.a_RI), ("b_first", effects.low_rank.b_OR.T.contiguous())]
    if effects.scale:
        rows.append(("scale_first", effects.scale.delta_O))
    if effects.bias:
        rows.append(("bias_first", effects.bias.bias_O))
    return rows


class Float32Slots(Slots):
    dtype = torch.float32


class Bfloat16Slots(Slots):
    dtype = torch.bfloat16


TestFloat32Slots = Float32Slots.TestCase
TestFloat32Slots.settings = SETTINGS
TestBfloat16Slots = Bfloat16Slots.TestCase
TestBfloat16Slots.settings = SETTINGS
