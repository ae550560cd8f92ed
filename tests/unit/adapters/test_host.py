"""The host's bytes are exact, the least recently used goes first, and what must stay is never given up."""

from __future__ import annotations

import pytest

from motet.adapters.errors import HostFullError
from motet.adapters.host import HostTier
from motet.adapters.packed import Packed
from tests.support.bases import residency_of
from tests.support.lowered import BASE, HOST_BYTES, lowered


def packed(rank: int = 1) -> Packed:
    return residency_of(BASE).pack(lowered(rank=rank))


def there(host: HostTier, *owners: str) -> list[str]:
    return [owner for owner in owners if host.bytes_of(owner)]


def test_the_least_recently_used_goes_first() -> None:
    host = HostTier(3 * HOST_BYTES)
    for owner in "abc":
        assert host.put(owner, packed())
    host.get("a")
    assert host.put("d", packed())
    assert there(host, *"abcd") == ["a", "c", "d"]
    assert (host.used_bytes, host.evictions) == (3 * HOST_BYTES, 1)
    assert host.get("b") is None


def test_put_again_counts_once() -> None:
    host = HostTier(3 * HOST_BYTES)
    host.put("a", packed())
    host.put("a", packed())
    assert host.used_bytes == HOST_BYTES
    host.drop("a")
    host.drop("a")
    assert host.used_bytes == 0


def test_what_must_stay_is_counted_and_never_given_up() -> None:
    host = HostTier(3 * HOST_BYTES)
    kept = packed()
    host.put("a", packed())
    host.put("b", packed())
    host.fix("head", HOST_BYTES)
    host.fix("merge", 0, kept)
    assert there(host, *"ab", "head", "merge") == ["b", "head", "merge"]
    assert host.get("merge") is kept
    for owner in "cde":
        assert host.put(owner, packed())
    assert host.used_bytes == 3 * HOST_BYTES
    assert host.get("merge") is kept
    host.drop("merge")
    assert (host.get("merge"), host.used_bytes) == (None, 2 * HOST_BYTES)


def test_what_must_stay_and_does_not_fit_is_refused_and_changes_nothing() -> None:
    host = HostTier(2 * HOST_BYTES)
    host.put("a", packed())
    host.fix("head", HOST_BYTES)
    with pytest.raises(HostFullError, match=f"{HOST_BYTES + 1:,} bytes .* {2 * HOST_BYTES:,} bytes .* --host-memory"):
        host.fix("other", HOST_BYTES + 1)
    assert there(host, "a", "head", "other") == ["a", "head"]


def test_what_would_not_fit_alone_evicts_nobody() -> None:
    host = HostTier(2 * HOST_BYTES)
    host.put("a", packed())
    large = packed(rank=8)
    assert large.bytes > host.budget_bytes
    assert not host.put("large", large)
    assert not host.make_room(large.bytes)
    assert there(host, "a", "large") == ["a"]


def test_room_is_made_before_it_is_taken() -> None:
    host = HostTier(2 * HOST_BYTES)
    host.put("a", packed())
    host.put("b", packed())
    assert host.make_room(HOST_BYTES)
    assert (there(host, *"ab"), host.used_bytes) == (["b"], HOST_BYTES)
