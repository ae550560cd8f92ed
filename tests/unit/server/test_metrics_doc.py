"""docs/metrics.md says what the server tells, and all of it."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.metrics_core import Metric

from motet.adapters.host import HostTier
from motet.adapters.tiers import Tiers
from motet.server.engine.engine import EngineState
from motet.server.metrics import Metrics
from motet.server.native import with_rows
from motet.server.tier_metrics import TierMetrics
from tests.support.bases import one_target_base, residency_of

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| (.*?) \|", re.MULTILINE)
SUFFIX = {"counter": "_total"}


def told() -> dict[str, tuple[str, frozenset[str]]]:
    """Name → type and labels of every family that something can be told of."""
    metrics = with_rows(Metrics(EngineState, lambda: (0, 0), list, lambda: {"a"}), dict)
    metrics.registry.register(TierMetrics(Tiers(residency_of(one_target_base()), HostTier(1)), metrics.by_adapter, int))
    return {_name(family): (family.type, _labels(metrics, family)) for family in metrics.registry.collect()}


def _name(family: Metric) -> str:
    return family.name + SUFFIX.get(family.type, "")


def _labels(metrics: Metrics, family: Metric) -> frozenset[str]:
    own = {counter._name: counter._labelnames for counter in (metrics.requests, metrics.loads)}
    return frozenset(getattr(family, "_labelnames", ()) or own.get(family.name, ()))


def test_every_series_is_on_the_page_with_its_type_and_labels() -> None:
    page = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in ROW.findall(PAGE.read_text())
    }
    code = told()
    aliases = {name for name in code if name.startswith("vllm:")} - page.keys()
    assert {name: code[name] for name in code.keys() - aliases} == page
    assert all(f"`{name}`" in PAGE.read_text() for name in aliases)
