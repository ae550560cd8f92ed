"""The page about other servers quotes the committed run, which had parity and a clean commit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.peers import table
from tests.bench.peers.ratios import ratios

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "peers-cpu.jsonl"
if not RESULTS.exists():
    pytest.skip("no run on a quiet machine is committed yet", allow_module_level=True)
RECORDS, END = table.read(RESULTS)


def test_the_page_quotes_the_committed_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert table.speeds(RECORDS) in page
    assert table.ratios(END) in page


def test_the_ratios_are_those_of_the_records() -> None:
    assert [(one.what, one.value, one.met) for one in ratios(RECORDS)] == [
        (one["what"], one["value"], one["met"]) for one in END["results"]
    ]


def test_results_say_where_they_come_from() -> None:
    assert END["parity"], "no answer was compared"
    for record in [*RECORDS, END]:
        assert record["machine"]["git_commit"]
        assert not record["machine"]["git_dirty"]
    for record in RECORDS:
        assert record["results"]["failed"] == 0, record["label"]
