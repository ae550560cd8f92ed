"""Numbers about a set of timelines. Knows nothing of servers, files or tables."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.bench.timeline import Timeline


@dataclass(frozen=True)
class Distribution:
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Summary:
    """A whole run. Latencies and tokens are those of successful requests only; throughput is over `duration_s`.

    Args:
        duration_s: from the first request due to the end of the last stream.
        merged_chunks: tokens that came in no chunk of their own.
        slo_attainment: share of all requests, failed ones included, whose first token met the target.
        dispatch_lag_s: how late the client itself was; None in a run with no successes.
        errors: failures by kind.
        error_samples: the first few in full.
    """

    requests: int
    succeeded: int
    failed: int
    duration_s: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    merged_chunks: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    dispatch_lag_s: Distribution | None
    slo_attainment: float | None
    models_used: int
    errors: dict[str, int]
    error_samples: list[str]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks of an ascending sequence, as numpy does."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution(values: Iterable[float]) -> Distribution | None:
    ordered = sorted(values)
    if not ordered:
        return None
    return Distribution(
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
    )


def summarise(timelines: Sequence[Timeline], slo_ttft_s: float | None = None) -> Summary:
    good = [timeline for timeline in timelines if timeline.failure is None]
    failures = [(timeline.model, timeline.failure) for timeline in timelines if timeline.failure is not None]
    duration_s = max(t.done_s for t in timelines) - min(t.due_s for t in timelines)
    output_tokens = sum(t.output_tokens for t in good)
    prompt_tokens = sum(t.prompt_tokens for t in good)
    within_slo = [t for t in good if slo_ttft_s is not None and t.ttft_s is not None and t.ttft_s <= slo_ttft_s]
    return Summary(
        requests=len(timelines),
        succeeded=len(good),
        failed=len(failures),
        duration_s=duration_s,
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(t.cached_tokens for t in good),
        merged_chunks=sum(t.output_tokens - len(t.chunk_times_s) for t in good),
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(output_tokens + prompt_tokens) / duration_s,
        requests_per_s=len(good) / duration_s,
        ttft_s=distribution(t.ttft_s for t in good if t.ttft_s is not None),
        tpot_s=distribution(t.tpot_s for t in good if t.tpot_s is not None),
        itl_s=distribution(gap_s for t in good for gap_s in t.itls_s),
        e2e_s=distribution(t.e2e_s for t in good),
        dispatch_lag_s=distribution(t.sent_s - t.due_s for t in good),
        slo_attainment=None if slo_ttft_s is None else len(within_slo) / len(timelines),
        models_used=len({t.model for t in timelines}),
        errors=dict(Counter(failure.kind.value for _, failure in failures)),
        error_samples=[f"{model}: {failure.kind}: {failure.detail}" for model, failure in failures[:5]],
    )
