"""A finished run as one JSON line and as a table. Knows nothing of how it was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.cpu_usage import CpuUsage
from tests.bench.lines import append
from tests.bench.load import Measurement
from tests.bench.machine import Machine
from tests.bench.stats import Distribution, Summary
from tests.bench.timeline import Timeline

_HEAVY_CLIENT_CORE_PERCENT = 25


@dataclass(frozen=True)
class Record:
    """One line of the results file.

    Args:
        arguments: everything that shaped the run, without the API key.
        server_version: whatever /version answered.
    """

    label: str
    utc: str
    arguments: Mapping[str, object]
    machine: Machine
    load_before: tuple[float, float, float]
    server_version: object
    cpu: CpuUsage
    results: Summary

    @classmethod
    def of(
        cls,
        label: str,
        arguments: Mapping[str, object],
        server_version: object,
        measurement: Measurement,
        results: Summary,
    ) -> "Record":
        return cls(
            label=label,
            utc=datetime.now(UTC).isoformat(timespec="seconds"),
            arguments=arguments,
            machine=Machine.here(),
            load_before=measurement.load_before,
            server_version=server_version,
            cpu=measurement.cpu,
            results=results,
        )


def append_timelines(path: Path, label: str, timelines: list[Timeline]) -> None:
    """One line per request, times counted from the first request due."""
    start_s = min(timeline.due_s for timeline in timelines)
    rows = (
        {
            "label": label,
            "model": timeline.model,
            "due_s": timeline.due_s - start_s,
            "ttft_s": timeline.ttft_s,
            "tpot_s": timeline.tpot_s,
            "e2e_s": timeline.e2e_s,
            "output_tokens": timeline.output_tokens,
            "chunk_times_s": [time_s - start_s for time_s in timeline.chunk_times_s],
            "failure": None if timeline.failure is None else timeline.failure.kind,
        }
        for timeline in timelines
    )
    append(path, *rows)


def table(record: Record) -> str:
    results, cpu, machine = record.results, record.cpu, record.machine
    commit = "no commit" if machine.git_commit is None else machine.git_commit[:12]
    lines = [
        f"{record.label or 'run'}  {record.utc}  {commit}{' + changes' if machine.git_dirty else ''}",
        f"  {machine.cpu}, {machine.cores} cores, load {record.load_before[0]:.2f} before",
        f"  requests        {results.succeeded} ok, {results.failed} failed in {results.duration_s:.2f} s"
        f", {results.models_used} models",
        f"  output tokens/s {results.output_tokens_per_s:10.2f}",
        f"  total tokens/s  {results.total_tokens_per_s:10.2f}",
        f"  requests/s      {results.requests_per_s:10.3f}",
        f"  {'ms':<15} {'mean':>10} {'p50':>10} {'p90':>10} {'p99':>10}",
        _row("TTFT", results.ttft_s),
        _row("TPOT", results.tpot_s),
        _row("ITL", results.itl_s),
        _row("e2e", results.e2e_s),
        _row("client lateness", results.dispatch_lag_s),
        f"  CPU: steal {_percent(cpu.steal_percent)}, other processes {_percent(cpu.other_percent)} of all cores"
        f"{'' if cpu.server_s is not None else ' (server included)'}"
        f", client {cpu.client_core_percent:.1f} % of one core ({cpu.client_s:.2f} s)",
    ]
    if results.slo_attainment is not None:
        lines.append(f"  first token in time: {100 * results.slo_attainment:.1f} %")
    if results.cached_tokens:
        lines.append(f"  prompt tokens from the server's prefix cache: {results.cached_tokens}")
    if results.merged_chunks:
        lines.append(f"  tokens without a chunk of their own: {results.merged_chunks}: ITL is of chunks")
    if cpu.client_core_percent > _HEAVY_CLIENT_CORE_PERCENT:
        lines.append("  WARNING: the client took so much CPU that the latencies may be its own")
    lines += [f"  ERROR {kind}: {count}" for kind, count in sorted(results.errors.items())]
    lines += [f"    {sample}" for sample in results.error_samples]
    return "\n".join(lines)


def _row(name: str, values: Distribution | None) -> str:
    if values is None:
        return f"  {name:<15} {'-':>10} {'-':>10} {'-':>10} {'-':>10}"
    return f"  {name:<15}" + "".join(f" {1000 * v:10.2f}" for v in (values.mean, values.p50, values.p90, values.p99))


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} %"
