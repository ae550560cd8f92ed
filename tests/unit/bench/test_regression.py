from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.regression import MOST_LOSS, expected_here, losses

ROOT = Path(__file__).parents[3]
FIGURES = ROOT / "docs" / "results" / "regression-cpu.jsonl"


def test_a_loss_is_said_with_its_figures() -> None:
    assert losses({"a": 1.14, "b": 0.5}, {"a": 1.0, "b": 1.0}) == []
    assert losses({"a": 1.16}, {"a": 1.0}) == ["a: 1.160, recorded was 1.000, 15% more is allowed"]
    assert losses({}, {"a": 1.0}) == ["a: not measured any more; record the figures again"]


def test_the_latest_figures_of_this_processor_count(tmp_path: Path) -> None:
    here = json.loads(FIGURES.read_text().splitlines()[0])["machine"]
    lines = [
        {"machine": {**here, "cpu": cpu}, "results": {"a": value}}
        for cpu, value in ((_cpu(), 1.0), (_cpu(), 2.0), ("another", 3.0))
    ]
    file = tmp_path / "figures.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert expected_here(file) == {"a": 2.0}
    file.write_text(json.dumps(lines[-1]))
    assert expected_here(file) is None


def _cpu() -> str:
    from tests.bench.machine import Machine

    return Machine.here().cpu


@pytest.mark.slow
def test_no_step_became_slower() -> None:
    expected = expected_here(FIGURES)
    if expected is None:
        pytest.skip(f"no figures of {_cpu()!r} are recorded; python -m tests.bench.regression --out records them")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.regression"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert losses(found, expected) == []
    assert MOST_LOSS == 0.15
