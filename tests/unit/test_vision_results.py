"""The figures of images in docs/methods.md are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"
RESULTS = ROOT / "docs" / "results" / "vision-cpu.jsonl"


def test_the_page_quotes_the_committed_run() -> None:
    (line,) = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert line["machine"]["git_commit"]
    assert not line["machine"]["git_dirty"]
    speed, accuracy = line["results"]["speed"], line["results"]["few_shot"]["accuracy"]
    times = [speed[name]["median_ms"] for name in ("transformers", "base", "1 adapter", "8 adapters")]
    right = [accuracy[name] for name in ("base", "member 0", "member 1", "uniform", "scored on a view, top 2")]
    page = PAGE.read_text()
    assert f"| {' · '.join(f'{value:.1f}' for value in times)} |" in page
    cells = [f"{one['accuracy']:.2f} ± {one['standard_error']:.2f}" for one in right]
    assert f"| {' · '.join(cells)} |" in page
    assert all(abs(value - 0.5) < 0.003 for alpha in line["results"]["few_shot"]["alpha"] for value in alpha)
