from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from motet.server.model.batch import PARTS
from tests.bench.curves import LARGEST_RANKS, LIVE_ROWS, RANKS, REGISTERED, Kind, Point, measure, points
from tests.support.models import tiny_llama

POINTS = {(point.plot, point.series, point.x): point for point in points()}
AGAIN, REORDERED = "the same step again and again", "its rows in another order each step"


def test_every_point_is_there_once() -> None:
    assert len(POINTS) == len(points())
    assert Counter(point.plot for point in points()) == {
        "live": len(LIVE_ROWS) * (1 + len(RANKS)),
        "registered": len(REGISTERED) * 2,
        "largest rank": len(LARGEST_RANKS) * 2,
    }


def test_live_rows_and_their_ranks_grow_beside_the_same_adapters() -> None:
    live = [point for point in points() if point.plot == "live"]
    assert {point.registered for point in live} == {((Kind(8), 32), (Kind(16), 32))}
    for point in live:
        (batch,), facts = point.batches, point.facts
        assert facts["rows"] == len(batch) == point.x
        assert len(set(batch)) == (1 if point.series == "base" else point.x), "each row has an adapter of its own"
        rank = {"base": 0, **{f"an adapter of rank {rank} in each row": rank for rank in RANKS}}[point.series]
        assert facts["rank_rows"] == rank * point.x


def test_what_is_not_in_the_batch_grows_beside_the_same_batch() -> None:
    for count in REGISTERED:
        same, new = (POINTS["registered", series, count] for series in (AGAIN, REORDERED))
        assert same.facts["registered"] == new.facts["registered"] == count
        assert same.facts["rank_rows"] == new.facts["rank_rows"] == 64
        assert same.registered == new.registered
        assert len(same.batches) == 1
        assert len(set(new.batches)) > PARTS, "the effects of an earlier step would be used again"
        assert {frozenset(batch) for batch in new.batches} == {frozenset(same.batches[0])}
    assert len({point.batches for point in POINTS.values() if point.series == AGAIN}) == 1


def test_the_largest_rank_grows_outside_the_batch_and_in_one_row_of_it() -> None:
    for rank in LARGEST_RANKS:
        outside = POINTS["largest rank", "in no row of the batch", rank].facts
        inside = POINTS["largest rank", "in one of its eight rows", rank].facts
        assert outside["largest_rank"] == inside["largest_rank"] == rank
        assert outside["registered"] == inside["registered"]
        assert (outside["rank_rows"], inside["rank_rows"]) == (64, 56 + rank)
        assert outside["rows"] == inside["rows"] == 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has the tokens which steps are made of."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=10_000).save_pretrained(folder)
    return folder


def test_points_are_measured_natively_beside_all_that_is_registered(folder: Path) -> None:
    few = ((Kind(8), 8), (Kind(8, ("k_proj",)), 4))
    of_rank_64 = POINTS["largest rank", "in one of its eight rows", 64]
    wanted = [
        POINTS["live", "base", 32],
        Point("registered", REORDERED, 12, few, POINTS["registered", REORDERED, 8].batches),
        of_rank_64,
    ]
    measured = measure(folder, wanted, rounds=2, turn_s=0)
    assert [point for point, _, _ in measured] == wanted
    assert [times.steps for _, _, times in measured] == [2, 2, 2], "the first round only warms up"
    assert all(0 < times.least_ms <= times.median_ms for _, _, times in measured)
    # three layers: k is 48 → 24, all seven linears together have 696 inputs and outputs; bfloat16
    per_rank, of_k = 3 * 696 * 2, 3 * (48 + 24) * 2
    assert [arena_bytes for _, arena_bytes, _ in measured] == [
        per_rank * (32 * 8 + 32 * 16),
        8 * (8 * per_rank + 4 * of_k),
        per_rank * (8 * 8 + 2 * 64),
    ]
