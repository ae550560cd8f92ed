"""The figures of docs/performance.md are those of the committed results, and within what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
(RUN,) = map(json.loads, (DOCS / "results" / "decode-cpu.jsonl").read_text().splitlines())
COSTS: dict[tuple[str, int, int], dict[str, Any]] = {
    (cost["kind"], cost["rows"], cost["adapters"]): cost for cost in RUN["costs"]
}
MOST_MS = {("decode", 1, 0): 9.6, ("decode", 8, 8): 25, ("decode", 32, 8): 60, ("prefill", 512, 0): 208}
"""One row: 1.6 times what reading 269 MB takes at 45 GB/s. 512 rows are 109 GFLOP: half of 1,050 GFLOP/s."""


def _line(kind: str, rows: int, adapters: int, cost: dict[str, Any]) -> str:
    name = f"prompt of {rows}" if kind == "prefill" else f"{rows} rows" if rows > 1 else "1 row"
    native, int8, torch = cost["native"], cost["int8"], cost["torch"]
    return (
        f"| {name} | {adapters} | {native['median_ms']:.1f} ({native['least_ms']:.1f}) | {int8['median_ms']:.1f} "
        f"({int8['least_ms']:.1f}) | {torch['median_ms']:.0f} ({torch['least_ms']:.0f}) | {cost['speedup']:.1f} × |"
    )


def test_the_page_quotes_the_results() -> None:
    page = (DOCS / "performance.md").read_text()
    assert "\n".join(_line(*case, cost) for case, cost in COSTS.items()) in page


def test_steps_take_no_longer_than_asked_for() -> None:
    assert all(COSTS[case]["native"]["median_ms"] <= most for case, most in MOST_MS.items())
    assert all(cost["deviation"] < 0.1 for cost in COSTS.values()), "the logits are not torch's"


def test_the_results_say_where_they_come_from() -> None:
    assert RUN["machine"]["git_commit"]
    assert not RUN["machine"]["git_dirty"]
    assert RUN["arguments"]["threads"] == 2


def test_the_page_quotes_what_int8_costs() -> None:
    (run,) = map(json.loads, (DOCS / "results" / "int8-cpu.jsonl").read_text().splitlines())
    page = (DOCS / "performance.md").read_text()
    for one in run["results"]:
        line = (
            f"| {one['texts']} | {one['adapter'] or 'none'} | {one['exact']:.3f} | {one['difference']:+.4f} "
            f"± {one['standard_error']:.4f} | {one['divergence']:.4f} | {one['same_token']:.1%} |"
        )
        assert line in page, line
    assert run["machine"]["git_commit"]
    assert not run["machine"]["git_dirty"]
