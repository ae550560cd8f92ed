"""Token buckets against a plain account of what was taken and when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from motet.server.api.quotas import MOST_BUCKETS, Quota, QuotaError, Quotas, parse_quota


class Watch:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def quotas(watch: Watch | None = None, **given: Quota) -> Quotas:
    return Quotas("adapter", given, watch or Watch())


def wait_s(bucket: Quotas, tokens: int, *names: str) -> float | None:
    """0 where the request is let in, which takes its tokens."""
    try:
        bucket.require(names, tokens)
    except QuotaError as error:
        return error.retry_after_s
    bucket.take(names, tokens)
    return 0


def test_a_bucket_holds_a_minute_and_fills_evenly() -> None:
    watch = Watch()
    bucket = quotas(watch, a=Quota(tokens_per_minute=600))
    assert wait_s(bucket, 400, "a") == 0
    assert wait_s(bucket, 400, "a") == 20
    watch.now_s += 19.9
    assert wait_s(bucket, 400, "a") == pytest.approx(0.1)
    watch.now_s += 0.1 + 1e-9
    assert wait_s(bucket, 400, "a") == 0
    watch.now_s += 3600
    assert wait_s(bucket, 601, "a") is None, "never, however long one waits"
    assert wait_s(bucket, 600, "a") == 0
    assert wait_s(bucket, 1, "a") == 0.1


def test_requests_are_counted_beside_tokens_and_the_longer_wait_is_told() -> None:
    bucket = quotas(a=Quota(requests_per_minute=2, tokens_per_minute=60))
    assert [wait_s(bucket, 20, "a") for _ in range(4)] == [0, 0, 30, 30]
    bucket = quotas(a=Quota(requests_per_minute=2, tokens_per_minute=60))
    assert [wait_s(bucket, 60, "a") for _ in range(2)] == [0, 60]


def test_what_was_not_used_is_given_back_and_what_was_used_beyond_is_owed() -> None:
    bucket = quotas(a=Quota(tokens_per_minute=60))
    bucket.give_back(bucket.take(["a"], 60), 10)
    assert wait_s(bucket, 51, "a") == 1
    bucket.give_back(bucket.take(["a"], 0), 110)
    assert wait_s(bucket, 0, "a") == 60


def test_nothing_is_taken_from_one_bucket_where_another_is_short() -> None:
    bucket = quotas(a=Quota(tokens_per_minute=60), b=Quota(tokens_per_minute=30))
    assert wait_s(bucket, 30, "a", "b") == 0
    assert wait_s(bucket, 30, "a", "b") == 60
    assert wait_s(bucket, 30, "a") == 0


def test_each_other_name_has_a_bucket_of_its_own() -> None:
    bucket = Quotas("adapter", {"*": Quota(requests_per_minute=1), "big": Quota(requests_per_minute=2)}, Watch())
    assert [wait_s(bucket, 0, name) for name in ("a", "b", "a", "big", "big", "big")] == [0, 0, 60, 0, 0, 30]


def test_a_quota_that_is_set_goes_before_the_options_and_keeps_what_was_used() -> None:
    bucket = quotas(a=Quota(tokens_per_minute=60, weight=3))
    assert wait_s(bucket, 60, "a") == 0
    bucket.set("a", Quota(tokens_per_minute=600))
    assert (wait_s(bucket, 60, "a"), bucket.weight("a")) == (6, 1)
    bucket.set("a", None)
    assert (wait_s(bucket, 60, "a"), bucket.weight("a")) == (60, 3)


def test_no_quota_is_no_limit_and_no_memory() -> None:
    bucket = quotas()
    assert [wait_s(bucket, 10**9, f"a{number}") for number in range(100)] == [0] * 100
    assert not bucket._buckets


def test_full_buckets_are_forgotten() -> None:
    watch = Watch()
    bucket = Quotas("adapter", {"*": Quota(tokens_per_minute=60)}, watch)
    for number in range(3 * MOST_BUCKETS):
        assert wait_s(bucket, 60, f"a{number}") == 0
        watch.now_s += 0.1
        assert wait_s(bucket, 60, f"a{number}") == pytest.approx(59.9), "not this one"
    assert len(bucket._buckets) <= MOST_BUCKETS


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 7.0, 61.0]), st.integers(0, 50), st.integers(0, 50)), max_size=40
    ),
    limit=st.integers(20, 100),
)
def test_never_more_than_the_limit_in_any_window(asked: list[tuple[float, int, int]], limit: int) -> None:
    """Over any time: what was used is at most a full bucket and what flowed in meanwhile; and no sooner than told."""
    watch = Watch()
    bucket = quotas(watch, a=Quota(tokens_per_minute=limit))
    used: list[tuple[float, int]] = []
    for pause_s, most, really in asked:
        watch.now_s += pause_s
        waiting_s = wait_s(bucket, most, "a")
        if waiting_s is None:
            assert most > limit
            continue
        if waiting_s > 0:
            watch.now_s += waiting_s * 0.999
            assert wait_s(bucket, most, "a") != 0
            watch.now_s += waiting_s * 0.001 + 1e-6
            assert wait_s(bucket, most, "a") == 0
        actual = min(really, most)
        taken = bucket.take(["a"], 0)
        bucket.give_back(taken, actual - most)  # of the `most` that were taken
        used.append((watch.now_s, actual))
    for first, (begin_s, _) in enumerate(used):
        for last in range(first, len(used)):
            spent = sum(tokens for _, tokens in used[first : last + 1])
            assert spent <= limit * (1 + (used[last][0] - begin_s) / 60) + 1e-6


@pytest.mark.parametrize(
    ("text", "name", "quota"),
    [
        ("sql=requests:60,tokens:9000,weight:2", "sql", Quota(60, 9000, 2)),
        ("a:b/c=weight:0.5", "a:b/c", Quota(weight=0.5)),
        ("*=tokens:1e6", "*", Quota(tokens_per_minute=1e6)),
    ],
)
def test_the_option(text: str, name: str, quota: Quota) -> None:
    assert parse_quota(text) == (name, quota)


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "=tokens:1", "a=tokens", "a=token:1", "a=tokens:1,tokens:2", "a=tokens:x", "a=tokens:nan"]
)
def test_what_is_no_quota(text: str) -> None:
    with pytest.raises(ValueError, match=r"NAME=|no number|positive") as error:
        parse_quota(text)
    assert repr(text) in str(error.value) or "tokens_per_minute" in str(error.value)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute", "weight"])
def test_impossible_quotas(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Quota(**{name: value})
