from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.plan import Plan


def plan(measured: list[str], takes_s: float = 0) -> Plan[str]:
    def measure(run: str, model: Path, data: Path) -> dict[str, Any]:
        assert (model.name, data.name) == ("model", "data")
        measured.append(run)
        time.sleep(takes_s)
        return {"letters": len(run)}

    return Plan(
        "lengths",
        "How long words are.\n\nMore.",
        ("one", "three", "seven"),
        label=str.title,
        arguments=lambda run: {"word": run},
        measure=measure,
        tell=lambda results: results["letters"],
        packages=("torch",),
    )


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return [
        *(
            "--results",
            str(tmp_path / "out.jsonl"),
            "--model",
            str(tmp_path / "model"),
            "--data",
            str(tmp_path / "data"),
        )
    ]


def test_a_run_that_the_results_hold_is_left_out(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    results, measured = tmp_path / "out.jsonl", list[str]()
    results.write_text(json.dumps({"arguments": {"word": "three"}}) + "\n")
    assert plan(measured).carry_out(options) == 0
    assert measured == ["one", "seven"]
    lines = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    assert [(line["label"], line["arguments"], line["results"]) for line in lines] == [
        ("One", {"word": "one"}, {"letters": 3}),
        ("Seven", {"word": "seven"}, {"letters": 5}),
    ]
    assert all(
        line["versions"].keys() == {"torch"} and line["machine"].keys() >= {"cpu", "git_commit"} for line in lines
    )
    assert str(tmp_path) not in results.read_text()
    assert capsys.readouterr().out == "One 3\nSeven 5\n"
    plan(measured).carry_out(options)
    assert measured == ["one", "seven"]


def test_no_run_is_begun_after_the_time_is_over(options: list[str]) -> None:
    measured: list[str] = []
    plan(measured, takes_s=0.2).carry_out([*options, "--until", "0.1"])
    assert measured == ["one"]
