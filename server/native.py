"""Whether the compiled CPU backend computes, as people are told, and what of the rows it computes, as metrics say.

Must not know: HTTP, requests, how it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from prometheus_client.core import CounterMetricFamily, Metric

from motet.kernels.cpu.compiled import Engine
from motet.kernels.errors import BackendUnavailableError
from motet.server.config import OptionError, ServeConfig
from motet.server.metrics import Metrics


def native_engine(
    config: ServeConfig, device: torch.device, threads: int, report: Callable[[str], None]
) -> Engine | None:
    """The compiled CPU backend, where the options and the installation have it.

    Args:
        device: where the base is.
        threads: that compute.
        report: told once what computes.

    Raises:
        OptionError: it was asked for and cannot serve.
    """
    if config.native == "on" and device.type != "cpu":
        raise OptionError(f"--native on: it computes on a CPU, not on {device}; add --device cpu")
    if config.native == "off" or device.type != "cpu":
        return None
    try:
        engine = Engine(threads)
    except BackendUnavailableError as error:
        if config.native == "on":
            raise OptionError(f"--native on: {error}") from error
        report(f"computing with torch alone, several times slower: {error}")
        return None
    report(f"native CPU backend: {engine.processor.name}, {threads} threads")
    return engine


class RowMetrics:
    """Rows by what computed them.

    Args:
        paths: rows computed natively, and others by what kept them from it.
    """

    def __init__(self, paths: Callable[[], Mapping[str, int]]) -> None:
        self._paths = paths

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client."""
        rows = CounterMetricFamily(
            "motet_rows", "Rows computed by the native backend, and others by what kept them from it.", labels=["path"]
        )
        for path, count in self._paths().items():
            rows.add_metric([path], count)
        yield rows


def with_rows(metrics: Metrics, paths: Callable[[], Mapping[str, int]]) -> Metrics:
    """The metrics with `RowMetrics` among them."""
    metrics.registry.register(RowMetrics(paths))
    return metrics
