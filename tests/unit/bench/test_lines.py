import json
import math
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.bench.lines import append, surroundings


def test_a_line_says_when_and_with_what_it_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    append(file, {**surroundings("torch"), "results": 1})
    append(file, {"label": "größer"}, {"label": "second of two"})
    first, *others = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert first["versions"] == {"torch": version("torch")}
    assert {"utc", "machine", "load_before", "results"} <= set(first)
    assert [other["label"] for other in others] == ["größer", "second of two"]


def test_what_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(file, {"fine": 1}, {"figure": math.nan})
    assert not file.exists()
