"""The figures in the README are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "serving-cpu.jsonl"
STARTS = ROOT / "docs" / "results" / "start-cpu.jsonl"
CONCURRENCIES = (1, 8, 32)
SECOND_START_S = 15
"""What a second `make serve` may take until it is ready."""
FIRST_OVER_TENTH = 1.1
"""Of the answers after that: the first request still warms the HTTP path, by 1 to 2 ms."""


def table(runs: list[dict[str, Any]]) -> str:
    """Output tokens/s, the share of the base's, and TPOT p50 by adapters and concurrency."""
    lines = ["| adapters in the traffic | 1 request at a time | 8 | 32 |", "| --- | --- | --- | --- |"]
    cells = {(run["arguments"]["adapters"], run["arguments"]["concurrency"]): run["results"] for run in runs}
    for adapters in sorted({adapters for adapters, _ in cells}):
        row = ["none (base only)" if adapters == 0 else str(adapters)]
        for concurrency in CONCURRENCIES:
            here, base = cells[adapters, concurrency], cells[0, concurrency]
            speed, token_ms = here["output_tokens_per_s"], here["tpot_s"]["p50"] * 1000
            share = "" if adapters == 0 else f" ({speed / base['output_tokens_per_s']:.2f} ×)"
            row.append(f"{speed:.0f} tokens/s{share}, {token_ms:.0f} ms")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def test_the_readme_quotes_the_committed_results() -> None:
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert table(runs) in (ROOT / "README.md").read_text()


def test_a_second_start_is_fast_enough() -> None:
    starts = [json.loads(line) for line in STARTS.read_text().splitlines()]
    assert len(starts) >= 3
    assert all(start["results"]["ready_s"] <= SECOND_START_S for start in starts)


def test_a_first_answer_takes_what_a_tenth_takes() -> None:
    starts = [json.loads(line)["results"] for line in STARTS.read_text().splitlines()]
    first, tenth = (median(start[which] for start in starts) for which in ("first_answer_s", "tenth_answer_s"))
    assert first <= FIRST_OVER_TENTH * tenth


def test_results_say_where_they_come_from() -> None:
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert {(run["arguments"]["adapters"], run["arguments"]["concurrency"]) for run in runs} == {
        (adapters, concurrency) for adapters in (0, 1, 8, 64) for concurrency in CONCURRENCIES
    }
    for run in runs:
        assert run["results"]["failed"] == 0
        assert run["machine"]["git_commit"]
        assert not run["machine"]["git_dirty"]
        assert run["machine"]["cpu"]
        assert run["server_version"]["torch"]
