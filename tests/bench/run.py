"""One measured run from workload to written record. Knows nothing of command lines."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tests.bench.catalogue import server_version
from tests.bench.lines import append
from tests.bench.load import Conduct, measure
from tests.bench.report import Record, append_timelines
from tests.bench.stats import summarise
from tests.bench.workload import Workload


async def run(
    conduct: Conduct,
    workload: Workload,
    label: str,
    arguments: Mapping[str, object],
    out: Path | None = None,
    requests_out: Path | None = None,
    slo_ttft_s: float | None = None,
) -> Record:
    """Measures, writes what was asked for and returns the record.

    Raises:
        WarmupError: a warm-up request failed; nothing is written.
    """
    version = await server_version(conduct.endpoint)
    measurement = await measure(conduct, workload)
    record = Record.of(label, arguments, version, measurement, summarise(measurement.timelines, slo_ttft_s))
    if out is not None:
        append(out, asdict(record))
    if requests_out is not None:
        append_timelines(requests_out, label, measurement.timelines)
    return record
