from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from motet.server.adapter_metrics import LATENCY_BUCKETS_S
from motet.server.engine.engine import EngineState
from motet.server.metrics import Metrics

STATE = EngineState(
    running=3,
    waiting=2,
    blocks=100,
    blocks_held=25,
    preemptions=4,
    steps=50,
    step_s=0.25,
    waiting_adapters=frozenset({"z", "a"}),
)
ADAPTERS = ["a", 'odd "name"\\']


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(engine_state=lambda: STATE, adapter_bytes=lambda: (10, 40), adapters=lambda: ADAPTERS)


def samples(metrics: Metrics) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_the_names_that_dashboards_know(metrics: Metrics) -> None:
    """Renaming one breaks every dashboard, alert and gateway that reads it."""
    metrics.requests.labels("finished").inc()
    metrics.loads.labels("loaded").inc()
    assert {name for name in samples(metrics) if not name.endswith("_created")} == {
        "motet_running",
        "motet_waiting",
        "motet_kv_usage",
        "motet_preemptions",
        "motet_steps",
        "motet_step_seconds",
        "motet_adapter_memory_bytes",
        "motet_adapter_memory_budget_bytes",
        "motet_adapters_resident",
        "motet_requests_total",
        "motet_prompt_tokens_total",
        "motet_cached_prompt_tokens_total",
        "motet_generated_tokens_total",
        "motet_adapter_loads_total",
        *(
            f"motet_{latency}_seconds_{part}"
            for latency in (
                "time_to_first_token",
                "inter_token_latency",
                "request",
                "adapter_ttft",
                "adapter_itl",
                "adapter_queue",
            )
            for part in ("bucket", "count", "sum")
        ),
        *(f"motet_adapter_uncertainty_{part}" for part in ("bucket", "count", "sum")),
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:lora_requests_info",
    }


def test_gauges_are_read_from_their_owners(metrics: Metrics) -> None:
    values = {name: found[0].value for name, found in samples(metrics).items()}
    assert values["motet_running"] == values["vllm:num_requests_running"] == 3
    assert values["motet_waiting"] == values["vllm:num_requests_waiting"] == 2
    assert values["motet_kv_usage"] == values["vllm:kv_cache_usage_perc"] == 0.25
    assert (values["motet_preemptions"], values["motet_steps"], values["motet_step_seconds"]) == (4, 50, 0.25)
    assert (values["motet_adapter_memory_bytes"], values["motet_adapter_memory_budget_bytes"]) == (10, 40)
    assert values["motet_adapters_resident"] == 2


def test_no_blocks_is_no_division_by_zero() -> None:
    metrics = Metrics(engine_state=EngineState, adapter_bytes=lambda: (0, 0), adapters=list)
    assert samples(metrics)["motet_kv_usage"][0].value == 0


def test_adapters_are_told_as_gateways_read_them(metrics: Metrics) -> None:
    [sample] = samples(metrics)["vllm:lora_requests_info"]
    assert sample.labels == {
        "max_lora": "2",
        "running_lora_adapters": ",".join(ADAPTERS),
        "waiting_lora_adapters": "a,z",
    }
    assert abs(sample.value - time.time()) < 60


def test_counters_and_latencies_count(metrics: Metrics) -> None:
    metrics.requests.labels("finished").inc()
    metrics.requests.labels("cancelled").inc(2)
    metrics.first_token.observe(0.3)
    found = samples(metrics)
    outcomes = {sample.labels["outcome"]: sample.value for sample in found["motet_requests_total"]}
    assert outcomes == {"finished": 1, "cancelled": 2}
    buckets = {float(s.labels["le"]): s.value for s in found["motet_time_to_first_token_seconds_bucket"]}
    assert sorted(buckets) == [*LATENCY_BUCKETS_S, float("inf")]
    assert (buckets[0.25], buckets[0.5]) == (0, 1)


def test_two_servers_in_one_process_do_not_share_series(metrics: Metrics) -> None:
    other = Metrics(engine_state=EngineState, adapter_bytes=lambda: (0, 0), adapters=list)
    other.generated_tokens.inc(5)
    assert samples(metrics)["motet_generated_tokens_total"][0].value == 0
