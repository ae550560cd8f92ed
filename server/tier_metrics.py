"""Series of the tiers: what lies where, what was brought and what gave way. Read from the tiers when scraped.

Must not know: HTTP, requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from motet.adapters.registry import Registry
from motet.adapters.tiers import Tiers
from motet.server.adapter_metrics import OTHER
from motet.server.engine.engine import EngineState
from motet.server.metrics import Metrics


class TierMetrics:
    """Residency, loads, evictions and swaps.

    Args:
        told: adapters that have series of their own; of the others only the number is told.
        swaps: how often a name moved to another version.
    """

    def __init__(self, tiers: Tiers, told: Container[str], swaps: Callable[[], int]) -> None:
        self._tiers, self._told, self._swaps = tiers, told, swaps

    def on_device(self) -> list[str]:
        """Names of the adapters of which a version is on the device."""
        return sorted({one.version.name for one in self._tiers.residents() if one.slot is not None})

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        tiers = self._tiers
        there: Counter[tuple[str, str]] = Counter()
        for resident in tiers.residents():
            told = resident.version.name in self._told
            name = resident.version.name if told else OTHER
            there[name, "device"] += resident.slot is not None
            there[name, "host"] += tiers.host.bytes_of(resident) > 0
            if told:  # asking the disk of thousands would take long
                there[name, "disk"] += tiers.bytes_of(resident)["disk"] > 0
        residency = GaugeMetricFamily(
            "motet_adapter_resident", "Versions of the adapter in the tier.", labels=["adapter", "tier"]
        )
        for (name, tier), count in sorted(there.items()):
            residency.add_metric([name, tier], count)
        yield residency
        taken = GaugeMetricFamily("motet_adapter_bytes", "Bytes that adapters take in the tier.", labels=["tier"])
        taken.add_metric(["device"], tiers.residency.used_bytes)
        taken.add_metric(["host"], tiers.host.used_bytes)
        yield taken
        loads = SummaryMetricFamily(
            "motet_adapter_load_seconds", "Moves of adapters from a tier to a nearer one.", labels=["source", "tier"]
        )
        for (source, target), count in sorted(tiers.moves.loads.items()):
            loads.add_metric([source, target], count, tiers.moves.load_s.get((source, target), 0.0))
        yield loads
        evictions = CounterMetricFamily(
            "motet_adapter_evictions", "Adapters that gave way in a tier.", labels=["tier", "reason"]
        )
        for (tier, reason), count in sorted(tiers.evictions.items()):
            evictions.add_metric([tier, reason], count)
        yield evictions
        yield CounterMetricFamily("motet_adapter_swaps", "Names that moved to another version.", value=self._swaps())


def everything(state: Callable[[], EngineState], tiers: Tiers, registry: Registry, base: str) -> Metrics:
    """All series of a server, those of its tiers among them."""
    metrics = Metrics(
        engine_state=state,
        adapter_bytes=lambda: (tiers.residency.used_bytes, tiers.residency.budget_bytes),
        adapters=lambda: own.on_device(),
        served=lambda: {base, *(info.version.name for info in registry.published())},
    )
    own = TierMetrics(tiers, metrics.by_adapter, lambda: registry.pointers.swaps)
    metrics.registry.register(own)
    return metrics
