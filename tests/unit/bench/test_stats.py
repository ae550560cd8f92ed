import random

import numpy as np
import pytest

from tests.bench.stats import distribution, percentile, summarise
from tests.bench.timeline import Failure, FailureKind, Timeline

# Due at 10.0, sent a little late, tokens at 10.5, 10.6, 10.9, end at 11.0.
ONE = Timeline("m", 10.0, 10.01, 11.0, (10.5, 10.6, 10.9), prompt_tokens=7, cached_tokens=2, output_tokens=3)
TWO = Timeline("n", 10.0, 10.00, 12.0, (10.3, 11.9), prompt_tokens=5, output_tokens=2)
BAD = Timeline("m", 11.0, 11.0, 14.0, (13.0, 13.9), 7, 0, 2, Failure(FailureKind.WRONG_LENGTH, "2 of 3"))


def test_latencies_of_a_hand_made_timeline() -> None:
    assert ONE.ttft_s == pytest.approx(0.5)
    assert ONE.tpot_s == pytest.approx(0.2)
    assert ONE.itls_s == pytest.approx([0.1, 0.3])
    assert ONE.e2e_s == pytest.approx(1.0)


def test_a_single_token_has_no_time_per_output_token() -> None:
    single = Timeline("m", 0, 0, 1, (0.5,), output_tokens=1)
    assert single.tpot_s is None
    assert single.itls_s == []
    assert Timeline("m", 0, 0, 1).ttft_s is None


def test_merged_chunks_count_as_tokens_in_tpot() -> None:
    merged = Timeline("m", 0, 0, 5, (1.0, 3.0), output_tokens=5)
    assert merged.tpot_s == pytest.approx(0.5)
    assert merged.itls_s == [2.0]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1001])
def test_percentiles_agree_with_numpy(count: int) -> None:
    rng = random.Random(count)
    ordered = sorted(rng.expovariate(1) for _ in range(count))
    for percent in (0, 50, 90, 99, 100):
        assert percentile(ordered, percent) == pytest.approx(np.percentile(ordered, percent))


def test_distribution_sorts() -> None:
    values = distribution([11, 1, 3, 2, 13])
    assert values is not None
    assert (values.mean, values.p50) == (6, 3)
    assert [values.p90, values.p99] == pytest.approx([12.2, 12.92])
    assert distribution([]) is None


def test_summary_counts_successes_over_the_whole_span() -> None:
    summary = summarise([ONE, TWO, BAD])
    assert (summary.requests, summary.succeeded, summary.failed) == (3, 2, 1)
    assert summary.duration_s == pytest.approx(4.0)
    assert summary.output_tokens == 5
    assert summary.output_tokens_per_s == pytest.approx(5 / 4)
    assert summary.total_tokens_per_s == pytest.approx(17 / 4)
    assert summary.requests_per_s == pytest.approx(2 / 4)
    assert summary.cached_tokens == 2
    assert summary.merged_chunks == 0
    assert summary.models_used == 2
    assert summary.itl_s == summarise([ONE, TWO]).itl_s
    assert summary.errors == {"wrong_length": 1}
    assert summary.error_samples == ["m: wrong_length: 2 of 3"]


def test_itl_is_pooled_over_requests_and_tpot_is_per_request() -> None:
    summary = summarise([ONE, TWO])
    assert summary.itl_s is not None
    assert summary.tpot_s is not None
    assert summary.itl_s.mean == pytest.approx((0.1 + 0.3 + 1.6) / 3)
    assert summary.itl_s.p50 == pytest.approx(0.3)
    assert summary.tpot_s.mean == pytest.approx((0.2 + 1.6) / 2)


def test_a_failure_misses_the_slo() -> None:
    assert summarise([ONE, TWO, BAD], slo_ttft_s=0.4).slo_attainment == pytest.approx(1 / 3)
    assert summarise([ONE, TWO, BAD], slo_ttft_s=9).slo_attainment == pytest.approx(2 / 3)
    assert summarise([ONE]).slo_attainment is None


def test_a_run_of_failures_has_no_latencies() -> None:
    summary = summarise([BAD])
    assert summary.ttft_s is summary.tpot_s is summary.itl_s is summary.e2e_s is None
    assert summary.output_tokens_per_s == 0
