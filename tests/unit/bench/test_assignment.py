import random
from collections import Counter

import pytest

from tests.bench.assignment import Assignment, assign

MODELS = [f"a{i}" for i in range(10)]


def shares(how: Assignment, alpha: float = 1.0) -> list[float]:
    counts = Counter(assign(MODELS, 50_000, how, alpha, random.Random(5)))
    return [counts[model] / 50_000 for model in MODELS]


def test_uniform_gives_equal_shares() -> None:
    assert shares(Assignment.UNIFORM) == pytest.approx([0.1] * 10, abs=0.01)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_zipf_falls_with_rank(alpha: float) -> None:
    weights = [rank**-alpha for rank in range(1, 11)]
    assert shares(Assignment.ZIPF, alpha) == pytest.approx([w / sum(weights) for w in weights], abs=0.01)


def test_power_is_the_law_of_s_lora() -> None:
    # P(index < k) = (k/N)^alpha
    expected = [((k + 1) / 10) ** 0.3 - (k / 10) ** 0.3 for k in range(10)]
    assert shares(Assignment.POWER, 0.3) == pytest.approx(expected, abs=0.01)


def test_power_stays_within_the_models() -> None:
    assert set(assign(MODELS, 1000, Assignment.POWER, 1e18, random.Random(0))) == {"a9"}


def test_identical_names_the_first_only() -> None:
    assert assign(MODELS, 3, Assignment.IDENTICAL, 1, random.Random(0)) == ["a0", "a0", "a0"]


def test_round_robin_goes_round() -> None:
    assert assign(["a", "b"], 5, Assignment.ROUND_ROBIN, 1, random.Random(0)) == ["a", "b", "a", "b", "a"]


def test_distinct_names_each_once() -> None:
    assert sorted(assign(MODELS, 10, Assignment.DISTINCT, 1, random.Random(0))) == MODELS
    with pytest.raises(ValueError, match="11 requests over 10 models"):
        assign(MODELS, 11, Assignment.DISTINCT, 1, random.Random(0))


def test_no_models_is_refused() -> None:
    with pytest.raises(ValueError, match="--models"):
        assign([], 1, Assignment.UNIFORM, 1, random.Random(0))
