import random
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from tests.bench.arrivals import ClosedLoop, OpenLoop


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_cv(cv: float) -> None:
    offsets_s = OpenLoop(rate_per_s=20, cv=cv).offsets_s(40_000, random.Random(1))
    gaps_s = [after - before for before, after in pairwise([0.0, *offsets_s])]
    assert fmean(gaps_s) == pytest.approx(1 / 20, rel=0.07)
    assert pstdev(gaps_s) / fmean(gaps_s) == pytest.approx(cv, rel=0.07)


def test_poisson_is_memoryless() -> None:
    offsets_s = OpenLoop(rate_per_s=1).offsets_s(20_000, random.Random(2))
    gaps_s = [after - before for before, after in pairwise(offsets_s)]
    longer = [gap_s for gap_s in gaps_s if gap_s > 1]
    assert len(longer) / len(gaps_s) == pytest.approx(0.3679, abs=0.01)
    assert fmean(longer) == pytest.approx(2, rel=0.04)


def test_times_ascend_and_repeat_with_the_seed() -> None:
    loop = OpenLoop(rate_per_s=5, cv=2)
    first = loop.offsets_s(100, random.Random(3))
    assert first == sorted(first) == loop.offsets_s(100, random.Random(3))
    assert first != loop.offsets_s(100, random.Random(4))


def test_impossible_pacings_are_refused() -> None:
    with pytest.raises(ValueError, match="concurrency 0"):
        ClosedLoop(0)
    with pytest.raises(ValueError, match="rate 0"):
        OpenLoop(0)
    with pytest.raises(ValueError, match="cv 0"):
        OpenLoop(1, 0)
