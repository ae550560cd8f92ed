"""The committed plots are drawn from the committed lines, which are all points of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.curves import points
from tests.bench.curves_plot import FILES, draw, read

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FILE = RESULTS / "curves-cpu.jsonl"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="python -m tests.bench.curves has not been run yet")
MOST_GROWTH = 1.15
"""Between least times of one batch beside 8 and beside 1,000 adapters: what noise makes of nothing."""


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()]


def test_the_plots_are_drawn_from_the_lines() -> None:
    curves = read(FILE)
    for name, panels in FILES.items():
        assert (RESULTS / name).read_text() == draw(panels, curves)


def test_the_lines_are_all_points_of_one_run(lines: list[dict[str, Any]]) -> None:
    expected = [point.facts for point in points()]
    assert [{name: line["point"][name] for name in expected[0]} for line in lines] == expected
    assert len({line["utc"] for line in lines}) == 1
    for line in lines:
        assert line["machine"]["git_commit"]
        assert not line["machine"]["git_dirty"]
        assert line["arguments"]["threads"] == 2


def test_a_batch_costs_the_same_whatever_is_registered_beside_it(lines: list[dict[str, Any]]) -> None:
    for series in ("the same step again and again", "its rows in another order each step", "in no row of the batch"):
        least = [line["times"]["least_ms"] for line in lines if line["point"]["series"] == series]
        assert max(least) <= MOST_GROWTH * min(least), series


def test_a_row_of_a_large_rank_pays_for_its_own_rank_rows(lines: list[dict[str, Any]]) -> None:
    found = {(line["point"]["series"], line["point"]["x"]): line["times"]["least_ms"] for line in lines}
    rank_8, rank_16 = (found[f"an adapter of rank {rank} in each row", 32] for rank in (8, 16))
    per_rank_row = (rank_16 - rank_8) / (32 * 8)
    assert per_rank_row > 0
    added = found["in one of its eight rows", 128] - found["in no row of the batch", 128]
    assert 0 < added < 2 * (128 - 8) * per_rank_row, "a batch padded to the largest rank has eight times as many more"
