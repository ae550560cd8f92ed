"""Series of single adapters, for as many as were used most lately; all others are counted together.

Must not know: HTTP, how anything is computed, where adapters lie.

Counters begin anew when an adapter comes back among the most used; those of one that is not served any more go. So the
number of series is bounded, however many adapters there are.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
SCORE_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
OTHER = "_other"
"""No adapter's name begins like this."""
MOST_ADAPTERS = 100
RANKED_EVERY_S = 60.0
"""Who is among the most used is decided as often; uses count half as much each time."""
FORGOTTEN_USES = 0.1


class Distribution:
    """A histogram of one adapter; one addition to it takes under a microsecond."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_to(self, family: HistogramMetricFamily, adapter: str) -> None:
        """As Prometheus reads it: each bucket holds those below it."""
        buckets, below = [], 0
        for bound, count in zip((*(str(float(bound)) for bound in self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric([adapter], buckets, self.total)


class Series:
    """What is counted of one adapter, or of many.

    Args:
        of_one: whether there are versions that follow each other.
    """

    __slots__ = ("between_tokens", "first_token", "of_one", "queue", "requests", "tokens", "uncertainty", "version")

    def __init__(self, *, of_one: bool = True) -> None:
        self.of_one, self.version = of_one, ""
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.first_token, self.between_tokens, self.queue = (Distribution(LATENCY_BUCKETS_S) for _ in range(3))
        self.uncertainty = Distribution(SCORE_BUCKETS)

    def finished(self, version: str, outcome: str, *, prompt: int = 0, cached: int = 0, drawn: int = 0) -> None:
        """A request ended; those of an earlier version of the name are no longer told.

        Args:
            prompt, cached, drawn: tokens it read, those of them that the prefix cache spared, and those it drew.
        """
        if self.of_one and version != self.version:
            self.version, self.requests = version, Counter()
        self.requests[outcome] += 1
        self.tokens.update(prompt=prompt, cached=cached, drawn=drawn)


class AdapterMetrics:
    """The most used adapters and their series.

    Args:
        served: names that are served now, the base's among them.

    Note: used by the event loop.
    """

    def __init__(self, served: Callable[[], Container[str]], clock: Callable[[], float] = time.monotonic) -> None:
        self._served, self._clock = served, clock
        self._uses: dict[str, float] = {}
        self._series: dict[str, Series] = {}
        self._other = Series(of_one=False)
        self._ranked_s = clock()

    def of(self, name: str) -> Series:
        """Where to count what a request does with an adapter."""
        self._uses[name] = self._uses.get(name, 0.0) + 1
        if self._clock() - self._ranked_s >= RANKED_EVERY_S:
            self._rank()
        found = self._series.get(name)
        if found is None and len(self._series) < MOST_ADAPTERS and name in self._served():
            found = self._series[name] = Series()
        return self._other if found is None else found

    def __contains__(self, name: object) -> bool:
        """Whether it has series of its own."""
        return name in self._series

    def _rank(self) -> None:
        self._ranked_s = self._clock()
        halved = ((name, uses / 2) for name, uses in self._uses.items())
        self._uses = {name: uses for name, uses in halved if uses >= FORGOTTEN_USES}
        most = sorted(self._uses, key=self._uses.__getitem__, reverse=True)[:MOST_ADAPTERS]
        self._series = {name: self._series[name] for name in most if name in self._series}

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        served = self._served()
        self._series = {name: series for name, series in self._series.items() if name in served}
        told = [*sorted(self._series.items()), (OTHER, self._other)]
        requests = CounterMetricFamily(
            "motet_adapter_requests", "Requests by how they ended.", labels=["adapter", "version", "outcome"]
        )
        tokens = CounterMetricFamily("motet_adapter_tokens", "Tokens by kind.", labels=["adapter", "kind"])
        for name, series in told:
            for outcome, count in series.requests.items():
                requests.add_metric([name, series.version[:12], outcome], count)
            for kind, count in series.tokens.items():
                tokens.add_metric([name, kind], count)
        yield requests
        yield tokens
        for attribute, family in (
            ("first_token", _histogram("motet_adapter_ttft_seconds", "From arrival to the first token.")),
            ("between_tokens", _histogram("motet_adapter_itl_seconds", "Between two tokens of a generation.")),
            ("queue", _histogram("motet_adapter_queue_seconds", "From submission until a generation first ran.")),
            ("uncertainty", _histogram("motet_adapter_uncertainty", "Uncertainty scores of answers; 1 is least sure.")),
        ):
            for name, series in told:
                getattr(series, attribute).add_to(family, name)
            yield family


def _histogram(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=["adapter"])
