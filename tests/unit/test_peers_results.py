"""The page about other servers quotes the committed run, which had parity and a clean commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench.peers import table
from tests.bench.peers.ratios import ratios

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "peers-cpu.jsonl"
if not RESULTS.exists():
    pytest.skip("no run on a quiet machine is committed yet", allow_module_level=True)
RECORDS, END = table.read(RESULTS)
TURNS, END_OF_TURNS = table.read(RESULTS.with_name("turns-cpu.jsonl"))


def test_the_page_quotes_the_committed_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert table.speeds(RECORDS) in page
    assert table.ratios(END) in page
    measured = [line for line in table.ratios(END_OF_TURNS).splitlines() if "not measured" not in line]
    assert "\n".join(measured[2:]) in page


@pytest.mark.parametrize(("records", "end"), [(RECORDS, END), (TURNS, END_OF_TURNS)])
def test_the_ratios_are_those_of_the_records(records: list[dict[str, Any]], end: dict[str, Any]) -> None:
    assert [(one.what, one.value, one.met) for one in ratios(records)] == [
        (one["what"], one["value"], one["met"]) for one in end["results"]
    ]


def test_the_aims_are_met() -> None:
    missed = {one.what for one in ratios(RECORDS) if not one.met}
    assert missed <= {one.what for one in ratios(TURNS) if one.met}, "the page says why one server tells more than two"


def test_results_say_where_they_come_from() -> None:
    assert END["parity"], "no answer was compared"
    assert END_OF_TURNS["parity"], "no answer was compared"
    for record in [*RECORDS, END, *TURNS, END_OF_TURNS]:
        assert record["machine"]["git_commit"]
        assert not record["machine"]["git_dirty"]
    for record in [*RECORDS, *TURNS]:
        assert record["results"]["failed"] == 0, record["label"]
