"""What is wanted comes, what is held stays, who waits is not starved, and a failure is told to those who wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.adapters import tiers as tiers_module
from motet.adapters.cache import LoweredCache
from motet.adapters.errors import ArenaFullError, SourceChangedError
from tests.support.lowered import DEVICE_BYTES, HOST_BYTES
from tests.unit.adapters.tiers_rig import DEADLINE_S, Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(device=2, host=3)
    yield rig
    rig.tiers.stop()


def test_published_ones_lie_on_the_device_while_there_is_room(rig: Rig) -> None:
    leases = [rig.admit(value) for value in range(1, 5)]
    assert rig.there(leases) == [True, True, False, False]
    assert rig.tiers.residency.used_bytes == 2 * DEVICE_BYTES
    assert rig.tiers.host.used_bytes == 3 * HOST_BYTES
    assert rig.tiers.bytes_of(leases[0].resident) == {"device": DEVICE_BYTES, "host": 0, "disk": 0}
    assert rig.tiers.bytes_of(leases[3].resident) == {"device": 0, "host": HOST_BYTES, "disk": 0}


def test_every_one_comes_when_it_is_wanted_however_many_there_are(rig: Rig) -> None:
    leases = [rig.admit(value) for value in range(1, 8)]
    for _ in range(3):
        for lease in leases:
            rig.use(lease)
    assert rig.again, "the host holds three of seven"
    assert rig.tiers.moves.loads[("host", "device")] == rig.tiers.evictions[("device", "room")] >= 19
    assert rig.tiers.residency.used_bytes == 2 * DEVICE_BYTES


def test_the_least_recently_used_goes(rig: Rig) -> None:
    one, two, three = (rig.admit(value) for value in (1, 2, 3))
    rig.use(one)
    rig.use(three)
    assert rig.there([one, two, three]) == [True, False, True]
    assert rig.tiers.evictions == {("device", "room"): 1, ("host", "room"): 0}
    assert one.resident.last_used_s is not None


def test_what_is_held_is_never_evicted(rig: Rig) -> None:
    held, other, third = (rig.admit(value) for value in (1, 2, 3))
    rig.bring(held)
    slot = held.slot
    for lease in (third, other, third):
        rig.use(lease)
    assert (held.slot, rig.value(held)) == (slot, 1.0)


def test_one_that_finds_everything_held_waits_until_one_is_let_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers_module, "PATIENCE_S", 10 * DEADLINE_S)  # nothing but that brings it
    one, two, three = (rig.admit(value) for value in (1, 2, 3))
    rig.bring(one, two)
    rig.tiers.want([three])
    rig.eventually(lambda: rig.tiers._blocked is not None)
    assert not rig.tiers.hold([three])
    rig.tiers.let_go([one, two])
    rig.eventually(lambda: rig.tiers.hold([three]))


def test_who_waits_is_not_starved_by_those_who_come_and_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters on the device whose requests overlap for ever."""
    monkeypatch.setattr(tiers_module, "PATIENCE_S", 0.05)
    one, two, three = (rig.admit(value) for value in (1, 2, 3))
    rig.bring(one, two)
    rig.tiers.want([three])
    taken = {one: 1, two: 1}

    def overlap() -> bool:
        for lease in (one, two):
            if rig.tiers.hold([lease]):
                taken[lease] += 1
            if taken[lease]:
                rig.tiers.let_go([lease])
                taken[lease] -= 1
        return rig.tiers.hold([three])

    deadline = threading.Event()
    threading.Timer(DEADLINE_S, deadline.set).start()
    while not overlap():
        assert not deadline.wait(0.002), "starved"
    rig.tiers.want([])
    assert rig.value(three) == 3.0


def test_nothing_is_held_while_one_of_them_is_not_there(rig: Rig) -> None:
    one, two, three = (rig.admit(value) for value in (1, 2, 3))
    assert not rig.tiers.hold([one, three])
    assert one.resident.holds == 0
    rig.bring(one, three)
    assert (one.resident.holds, three.resident.holds) == (1, 1)
    with pytest.raises(AssertionError, match="more often"):
        rig.tiers.let_go([two])


def test_adapters_that_are_held_together_do_not_evict_each_other(rig: Rig) -> None:
    leases = [rig.admit(value) for value in range(1, 5)]
    for _ in range(5):
        for pair in (leases[:2], leases[2:], leases[1:3]):
            rig.bring(*pair)
            assert [rig.value(lease) for lease in pair] == [float(lease.version.name) for lease in pair]
            rig.tiers.let_go(pair)


def test_what_is_wanted_more_urgently_is_not_evicted_for_it(rig: Rig) -> None:
    one, two, three = (rig.admit(value) for value in (1, 2, 3))
    rig.use(two)
    rig.bring(one, three)  # one was used longest ago
    assert rig.tiers.evictions[("device", "room")] == 1
    assert rig.there([one, two, three]) == [True, False, True]


def test_more_than_fit_together_are_refused_those_that_fit_are_not(rig: Rig) -> None:
    leases = [rig.admit(value) for value in (1, 2, 3)]
    assert not rig.tiers.hold(leases)
    assert all("together" in (rig.tiers.failure(lease) or "") for lease in leases)
    with pytest.raises(ArenaFullError, match="together"):
        rig.tiers.require_together(leases)
    again = [rig.leases.take(lease.resident) for lease in leases[1:]]
    rig.tiers.require_together(again)
    rig.bring(*again)


def test_one_too_large_for_the_device_is_refused(rig: Rig) -> None:
    with pytest.raises(ArenaFullError, match=rf"needs {3 * DEVICE_BYTES:,} bytes; .* {2 * DEVICE_BYTES:,}.*--adapter"):
        rig.admit(9, rank=3)
    assert (rig.tiers.host.used_bytes, rig.tiers.residency.used_bytes) == (0, 0)


def test_a_dropped_one_leaves_nothing(rig: Rig) -> None:
    leases = [rig.admit(value) for value in (1, 2, 3)]
    for lease in leases:
        rig.leases.retire(lease.resident)
        rig.leases.release(lease)
    assert (rig.tiers.host.used_bytes, rig.tiers.residency.used_bytes) == (0, 0)


def test_a_changed_source_fails_those_who_wait_and_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers_module, "RETRY_S", 0.2)
    leases = [rig.admit(value) for value in range(1, 7)]
    rig.error = SourceChangedError("adapter '1' has digest 3 by now")
    rig.use(leases[5])
    rig.tiers.want([leases[0]])  # the host gave it up
    rig.eventually(lambda: rig.tiers.failure(leases[0]) == "adapter '1' has digest 3 by now")
    assert not rig.tiers.hold([leases[0]])
    rig.tiers.want([])
    rig.use(leases[4])
    rig.error = None
    rig.eventually(lambda: rig.tiers.failure(leases[0]) is None)
    rig.use(leases[0])


def test_an_unforeseen_error_fails_one_and_the_loader_goes_on(rig: Rig) -> None:
    leases = [rig.admit(value) for value in range(1, 7)]
    rig.error = RuntimeError("/srv/secret")
    rig.tiers.want([leases[2]])  # neither the device nor the host has it
    rig.eventually(lambda: rig.tiers.failure(leases[2]) is not None)
    assert "/srv" not in str(rig.tiers.failure(leases[2]))
    rig.use(leases[5])


def test_the_disk_is_read_before_the_source(tmp_path: Path) -> None:
    rig = Rig(device=1, host=1, cache=LoweredCache(tmp_path, 1 << 20))
    leases = [rig.admit(value) for value in (1, 2, 3)]
    for lease in leases * 2:
        rig.use(lease)
    assert rig.again == []
    assert rig.tiers.bytes_of(leases[0].resident)["disk"] > DEVICE_BYTES
    assert rig.tiers.moves.loads[("disk", "host")] >= 5
    assert rig.tiers.moves.load_s[("disk", "host")] > 0
    rig.tiers.stop()


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    cache = LoweredCache(tmp_path, 1 << 20)
    rig = Rig(device=1, host=1, cache=cache)
    leases = [rig.admit(value) for value in (1, 2, 3)]
    for entry in tmp_path.iterdir():
        content = bytearray(entry.read_bytes())
        content[-2] ^= 1
        entry.write_bytes(content)
    for lease in leases * 2:
        rig.use(lease)
    assert (sorted(rig.again), cache.corrupt) == ([1, 2, 3], 3)
    rig.tiers.stop()


def test_a_pinned_one_comes_and_stays(rig: Rig) -> None:
    leases = [rig.admit(value) for value in (1, 2, 3, 4)]
    rig.tiers.pin(leases[3].resident)
    rig.eventually(lambda: leases[3].resident.slot is not None)
    for lease in leases[:3] * 2:
        rig.use(lease)
    assert leases[3].resident.slot is not None
    rig.tiers.unpin(leases[3].resident)
    for lease in leases[:3]:
        rig.use(lease)
    assert leases[3].resident.slot is None


def test_pins_leave_room_for_the_largest_other_one(rig: Rig) -> None:
    leases = [rig.admit(value) for value in (1, 2, 3)]
    rig.tiers.pin(leases[0].resident)
    rig.tiers.pin(leases[0].resident)
    with pytest.raises(ArenaFullError, match=f"'2' cannot be pinned: .* {2 * DEVICE_BYTES:,} of the .* unpin one"):
        rig.tiers.pin(leases[1].resident)
    assert not leases[1].resident.pinned
    with pytest.raises(ArenaFullError, match="of which pinned adapters take"):
        rig.admit(4, rank=2)


def test_a_pinned_one_that_is_in_the_way_moves_and_comes_back() -> None:
    """Bytes enough are free, but on both sides of it."""
    rig = Rig(device=4, host=12)
    leases = [rig.admit(value) for value in (1, 2, 3, 4)]
    rig.tiers.pin(leases[1].resident)
    large = rig.admit(5, rank=3)
    rig.bring(large)
    assert rig.value(large) == 5.0
    rig.eventually(lambda: leases[1].resident.slot is not None)
    assert rig.value(leases[1]) == 2.0
    assert rig.tiers.evictions == {("device", "room"): 3, ("device", "compaction"): 1, ("host", "room"): 0}
    rig.tiers.stop()


def test_a_preloaded_one_comes_without_being_asked_for(rig: Rig) -> None:
    leases = [rig.admit(value) for value in (1, 2, 3)]
    rig.tiers.preload(leases[2].resident)
    rig.eventually(lambda: leases[2].resident.slot is not None)


def test_one_dropped_while_it_is_brought_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    lease, _, third = (rig.admit(value) for value in (1, 2, 3))
    begun, go_on = threading.Event(), threading.Event()
    place = rig.tiers.residency.place_packed

    def slow(packed: object) -> object:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        return place(packed)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.tiers.residency, "place_packed", slow)
    used = rig.tiers.host.used_bytes
    rig.tiers.want([third])
    assert begun.wait(DEADLINE_S)
    rig.tiers.want([])
    rig.leases.retire(third.resident)
    rig.leases.release(third)
    assert rig.tiers.host.used_bytes == used - HOST_BYTES
    go_on.set()
    rig.eventually(lambda: rig.tiers.moves.loads[("host", "device")] == 1)
    rig.tiers.stop()
    assert rig.tiers.residency.used_bytes == DEVICE_BYTES
    assert lease.resident.slot is None
