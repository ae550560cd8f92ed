"""Prometheus series of the server. Gauges are read from their owners when scraped, never copied.

Must not know: HTTP, how anything is computed. Names that other tools look for (`vllm:…`) are aliases of
the same values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from motet.server.adapter_metrics import LATENCY_BUCKETS_S, AdapterMetrics
from motet.server.engine.engine import EngineState


class Metrics:
    """All series of one server.

    Args:
        engine_state: the engine's latest picture.
        adapter_bytes: (used, budget) of the adapter memory.
        adapters: names of the adapters on the device.
        served: names that may have series of their own; none where there are none.
    """

    def __init__(
        self,
        engine_state: Callable[[], EngineState],
        adapter_bytes: Callable[[], tuple[int, int]],
        adapters: Callable[[], list[str]],
        served: Callable[[], Container[str]] = lambda: (),
    ) -> None:
        self._engine_state, self._adapter_bytes, self._adapters = engine_state, adapter_bytes, adapters
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.by_adapter = AdapterMetrics(served)
        self.registry.register(self.by_adapter)
        self.requests = self._counter("motet_requests", "Finished requests by how they ended.", ["outcome"])
        self.prompt_tokens = self._counter("motet_prompt_tokens", "Prompt tokens of finished requests.")
        self.cached_tokens = self._counter("motet_cached_prompt_tokens", "Prompt tokens the prefix cache spared.")
        self.generated_tokens = self._counter("motet_generated_tokens", "Tokens drawn.")
        self.first_token = self._latency("motet_time_to_first_token_seconds", "From arrival to the first token.")
        self.between_tokens = self._latency("motet_inter_token_latency_seconds", "Between two tokens of a generation.")
        self.whole = self._latency("motet_request_seconds", "From arrival to the end of a request.")
        self.loads = self._counter("motet_adapter_loads", "Adapter loads by outcome.", ["outcome"])

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Gauges, read now. Called by prometheus_client."""
        state, (used, budget) = self._engine_state(), self._adapter_bytes()
        held = state.blocks_held / state.blocks if state.blocks else 0.0
        yield from _gauges("Generations being computed.", state.running, "motet_running", "vllm:num_requests_running")
        yield from _gauges("Generations that wait.", state.waiting, "motet_waiting", "vllm:num_requests_waiting")
        yield from _gauges("Held share of the cache blocks.", held, "motet_kv_usage", "vllm:kv_cache_usage_perc")
        yield from _gauges("Preemptions since the start.", state.preemptions, "motet_preemptions")
        yield from _gauges("Steps since the start.", state.steps, "motet_steps")
        yield from _gauges("Duration of the latest step.", state.step_s, "motet_step_seconds")
        yield from _gauges("Adapter memory in use.", used, "motet_adapter_memory_bytes")
        yield from _gauges("Adapter memory there is.", budget, "motet_adapter_memory_budget_bytes")
        resident = self._adapters()
        yield from _gauges("Adapters on the device.", len(resident), "motet_adapters_resident")
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device, and those that are waited for; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        lora.add_metric([str(len(resident)), _joined(resident), _joined(sorted(state.waiting_adapters))], time.time())
        yield lora

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, text, tuple(labels), registry=self.registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=LATENCY_BUCKETS_S)


def _gauges(text: str, value: float, *names: str) -> Iterator[Metric]:
    for name in names:
        yield GaugeMetricFamily(name, text, value=value)


def _joined(names: Iterable[str]) -> str:
    return ",".join(names)
