"""Token buckets: how many requests and tokens an adapter or a key may have a minute, and an adapter's share of a step.

Must not know: HTTP, requests, keys beyond their labels. A bucket holds one minute's worth and fills evenly. What a
request may need is taken when it is admitted, and what it did not use is given back when it ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MOST_BUCKETS = 4096
"""Beyond as many, full buckets are dropped: a new one is full as well."""
EVERY = "*"
"""Among the options: each name that has none of its own."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one name may have; None is no limit.

    Attributes:
        weight: share of the computed tokens beside other adapters, under the fair policy.

    Raises:
        ValueError: a value is not positive and finite.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a positive number")


NO_QUOTA = Quota()


def parse_quota(text: str) -> tuple[str, Quota]:
    """Name and quota from NAME=[requests:N][,tokens:N][,weight:W].

    Raises:
        ValueError: it is none; the message says why.
    """
    name, equals, rest = text.rpartition("=")
    words = {"requests": "requests_per_minute", "tokens": "tokens_per_minute", "weight": "weight"}
    given: dict[str, float] = {}
    for part in rest.split(","):
        word, _, number = part.partition(":")
        if not (equals and name) or word not in words or words[word] in given:
            raise ValueError(f"{text!r} is not NAME=[requests:N][,tokens:N][,weight:W], each at most once")
        try:
            given[words[word]] = float(number)
        except ValueError as error:
            raise ValueError(f"{text!r}: {number!r} is no number") from error
    return name, Quota(**given)


class QuotaError(Exception):
    """A quota is used up.

    Attributes:
        retry_after_s: when it is enough; None where it never is.
    """

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Bucket:
    level: float
    filled_s: float


_Place = tuple[str, str]
"""Name and unit of a bucket."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken for one request: from which buckets, and how many tokens."""

    places: tuple[_Place, ...]
    tokens: int


@dataclass(slots=True, eq=False)
class Quotas:
    """The quotas of one kind of names, and their buckets.

    Args:
        kind: what messages call a name.
        given: of the options; what is set later goes before.

    Note: used by one thread, but for `weight`, which any thread may call.
    """

    kind: str
    given: Mapping[str, Quota] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _set: dict[str, Quota] = field(default_factory=dict)
    _buckets: dict[_Place, _Bucket] = field(default_factory=dict)

    def set(self, name: str, quota: Quota | None) -> None:
        """Give a name its quota, or none but the options'; what was used of the old one counts for the new."""
        if quota is None:
            self._set.pop(name, None)
        else:
            self._set[name] = quota

    def of(self, name: str) -> Quota:
        """The quota of a name."""
        return self._set.get(name) or self.given.get(name) or self.given.get(EVERY) or NO_QUOTA

    def weight(self, name: str) -> float:
        return self.of(name).weight

    def require(self, names: Sequence[str], tokens: int) -> None:
        """Require that the buckets of all the names have enough for one request with up to so many tokens.

        Raises:
            QuotaError: one of them has not; the one that takes longest says so.
        """
        waits = [self._wait(bucket, limit, need) for bucket, (limit, need) in self._needs(names, tokens).items()]
        if short := [wait for wait in waits if wait is not None]:
            raise max(short, key=lambda wait: math.inf if wait.retry_after_s is None else wait.retry_after_s)

    def take(self, names: Sequence[str], tokens: int) -> Taken:
        """What was required."""
        needs = self._needs(names, tokens)
        for bucket, (limit, need) in needs.items():
            self._filled(bucket, limit).level -= need
        return Taken(tuple(needs), tokens)

    def give_back(self, taken: Taken, used: int) -> None:
        """The request ended with so many tokens; more than were taken is owed."""
        for place in taken.places:
            if place[1] == "tokens" and place in self._buckets:
                self._buckets[place].level += taken.tokens - used

    def _needs(self, names: Sequence[str], tokens: int) -> dict[_Place, tuple[float, int]]:
        """Bucket → its limit and what is needed of it."""
        return {
            (name, unit): (limit, 1 if unit == "requests" else tokens)
            for name in names
            for unit, limit in _limits(self.of(name)).items()
            if limit is not None
        }

    def _wait(self, place: _Place, limit: float, need: int) -> QuotaError | None:
        """Why the bucket has not enough; None where it has."""
        level = self._filled(place, limit).level
        if level >= need:
            return None
        said = f"{self.kind} {place[0]!r} may have {limit:g} {place[1]} a minute, this request may need {need}"
        if need > limit:
            return QuotaError(f"{said}: lower max_tokens or shorten the prompt", None)
        return QuotaError(f"{said}, and {max(0, math.floor(level))} are left: wait", (need - level) * 60 / limit)

    def _filled(self, place: _Place, limit: float) -> _Bucket:
        """The bucket as it is now."""
        now_s = self.clock()
        if len(self._buckets) >= MOST_BUCKETS and place not in self._buckets:
            self._drop_full(now_s)
        bucket = self._buckets.setdefault(place, _Bucket(limit, now_s))
        bucket.level = _level(bucket, limit, now_s)
        bucket.filled_s = now_s
        return bucket

    def _drop_full(self, now_s: float) -> None:
        limits = {place: _limits(self.of(place[0]))[place[1]] for place in self._buckets}
        self._buckets = {
            place: bucket
            for place, bucket in self._buckets.items()
            if (limit := limits[place]) is not None and _level(bucket, limit, now_s) < limit
        }


def _level(bucket: _Bucket, limit: float, now_s: float) -> float:
    return min(limit, bucket.level + (now_s - bucket.filled_s) * limit / 60)


def _limits(quota: Quota) -> Mapping[str, float | None]:
    return {"requests": quota.requests_per_minute, "tokens": quota.tokens_per_minute}
