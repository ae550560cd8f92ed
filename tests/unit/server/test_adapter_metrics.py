"""Series of single adapters: what they count, and that there are never more than so many."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from motet.adapters.host import HostTier
from motet.adapters.lease import Resident
from motet.adapters.tiers import Tiers
from motet.adapters.version import AdapterVersion, Digest, Slot
from motet.server.adapter_metrics import MOST_ADAPTERS, OTHER, RANKED_EVERY_S, AdapterMetrics
from motet.server.tier_metrics import TierMetrics
from tests.support.bases import one_target_base, residency_of


class Everything:
    def __contains__(self, name: object) -> bool:
        return True


class Watch:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def samples(*collectors: object) -> list[Sample]:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)  # type: ignore[arg-type]
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return [sample for family in families for sample in family.samples]


def values(found: list[Sample], name: str) -> dict[tuple[str, ...], float]:
    """Values of the labels in the order of their names → value."""
    return {tuple(v for _, v in sorted(s.labels.items())): s.value for s in found if s.name == name}


def adapters(found: list[Sample]) -> set[str]:
    return {sample.labels["adapter"] for sample in found if "adapter" in sample.labels}


def test_ten_thousand_adapters_are_at_most_so_many_label_values() -> None:
    watch = Watch()
    metrics = AdapterMetrics(Everything, watch)
    for round_ in range(3):
        for number in range(10_000):
            metrics.of(f"a{(number * 7 + round_) % 10_000}").finished("v", "finished", prompt=1)
        found = samples(metrics)
        assert adapters(found) - {OTHER} <= {f"a{number}" for number in range(10_000)}
        assert len(adapters(found)) <= MOST_ADAPTERS + 1
        assert len(found) <= (MOST_ADAPTERS + 1) * 100
        watch.now_s += RANKED_EVERY_S


def test_the_most_used_have_series_of_their_own() -> None:
    """Also where they come late: after a minute they have taken the places of those that are used less."""
    watch = Watch()
    metrics = AdapterMetrics(Everything, watch)
    for number in range(MOST_ADAPTERS):
        metrics.of(f"early{number}")
    for version in "uvwuv":
        metrics.of("late").finished(version, "finished")
    assert values(samples(metrics), "motet_adapter_requests_total") == {(OTHER, "finished", ""): 5}
    watch.now_s += RANKED_EVERY_S
    metrics.of("late").finished("v", "finished")
    found = values(samples(metrics), "motet_adapter_requests_total")
    assert found == {("late", "finished", "v"): 1, (OTHER, "finished", ""): 5}
    assert len(adapters(samples(metrics))) == MOST_ADAPTERS + 1


def test_names_that_nobody_uses_any_more_are_forgotten() -> None:
    watch = Watch()
    metrics = AdapterMetrics(Everything, watch)
    for number in range(1000):
        metrics.of(f"a{number}")
    for _ in range(6):
        watch.now_s += RANKED_EVERY_S
        metrics.of("still")
    assert metrics._uses.keys() == {"still"}


def test_the_series_of_a_retired_adapter_go_and_unknown_names_have_none() -> None:
    served = {"a", "b"}
    metrics = AdapterMetrics(lambda: served, Watch())
    for name in ("a", "b", "ties(a + b)"):
        metrics.of(name).finished("v", "finished")
    assert adapters(samples(metrics)) == {"a", "b", OTHER}
    served.remove("a")
    assert adapters(samples(metrics)) == {"b", OTHER}
    served.add("a")
    metrics.of("a").finished("v", "failed")
    assert values(samples(metrics), "motet_adapter_requests_total")["a", "failed", "v"] == 1
    assert ("a", "finished", "v") not in values(samples(metrics), "motet_adapter_requests_total")


def test_requests_are_those_of_the_version_that_was_asked_last() -> None:
    metrics = AdapterMetrics(Everything, Watch())
    metrics.of("a").finished("1" * 64, "finished", prompt=5, cached=2, drawn=3)
    metrics.of("a").finished("2" * 64, "failed", prompt=5, drawn=1)
    metrics.of("a").finished("2" * 64, "refused")
    found = samples(metrics)
    of_second = {("a", "failed", "2" * 12): 1, ("a", "refused", "2" * 12): 1}
    assert values(found, "motet_adapter_requests_total") == of_second
    tokens = {("a", "prompt"): 10, ("a", "cached"): 2, ("a", "drawn"): 4}
    assert values(found, "motet_adapter_tokens_total") == tokens


def test_buckets_hold_what_is_at_most_their_bound() -> None:
    metrics = AdapterMetrics(Everything, Watch())
    for seconds in (0.005, 0.006, 0.3, 1000):
        metrics.of("a").first_token.observe(seconds)
    buckets = values(samples(metrics), "motet_adapter_ttft_seconds_bucket")
    assert [buckets["a", bound] for bound in ("0.005", "0.01", "0.25", "0.5", "64.0", "+Inf")] == [1, 2, 2, 3, 3, 4]
    assert values(samples(metrics), "motet_adapter_ttft_seconds_count")["a",] == 4
    assert values(samples(metrics), "motet_adapter_ttft_seconds_sum")["a",] == 1000.311


def test_tiers_are_read_where_they_are() -> None:
    tiers = Tiers(residency_of(one_target_base()), HostTier(1000))
    metrics = AdapterMetrics(Everything, Watch())
    metrics.of("told")
    here, there, untold = (
        Resident(AdapterVersion(name, Digest(digest))) for name, digest in (("told", "1"), ("told", "2"), ("x", "3"))
    )
    here.slot = untold.slot = Slot(0)
    tiers._again.update(dict.fromkeys((here, there, untold)))
    tiers.host.fix(untold, 100)
    tiers.moves.loads["host", "device"] += 2
    tiers.moves.load_s["host", "device"] = 0.5
    tiers._device.evictions["room"] += 3
    own = TierMetrics(tiers, metrics, lambda: 4)
    found = samples(own)
    assert own.on_device() == ["told", "x"]
    assert values(found, "motet_adapter_resident") == {
        ("told", "device"): 1,
        ("told", "disk"): 0,
        ("told", "host"): 0,
        (OTHER, "device"): 1,
        (OTHER, "host"): 1,
    }
    assert values(found, "motet_adapter_bytes") == {("device",): 0, ("host",): 100}
    assert values(found, "motet_adapter_load_seconds_count") == {("host", "device"): 2}
    assert values(found, "motet_adapter_load_seconds_sum") == {("host", "device"): 0.5}
    assert values(found, "motet_adapter_evictions_total")["room", "device"] == 3
    assert values(found, "motet_adapter_swaps_total") == {(): 4}
