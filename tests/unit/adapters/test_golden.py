"""golden.json is read strictly, and compared position by position."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.adapters import golden
from motet.adapters.effects import GateSpec, Lowered
from motet.adapters.errors import ConfigError, CorruptSourceError, GoldenError, SourceError, UnsafePathError
from motet.adapters.golden import GOLDEN_FILE, Golden, GoldenPrompt, compare, parse

PROMPT: dict[str, Any] = {"tokens": [5, 6, 7], "logprobs": [-0.5, -2]}
CONTENT: dict[str, Any] = {"tolerance": 0.1, "prompts": [PROMPT]}
PARSED = Golden(0.1, (GoldenPrompt((5, 6, 7), (-0.5, -2.0)),))

PLAIN = Lowered("lora", "plain", "alpha/r", {}, 0)
POOL = replace(PLAIN, gate=GateSpec("pool", 2, {}, facts={"scale_cls": None, "bias_cls": None}))


def read(folder: Path, lowered: Lowered = PLAIN) -> Golden | None:
    return golden.read(folder, lowered)


def written(folder: Path, content: object) -> Path:
    (folder / GOLDEN_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_what_it_says(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert read(written(tmp_path, CONTENT)) == PARSED


def test_what_is_written_is_read_exactly() -> None:
    awkward = Golden(1e-7, (GoldenPrompt((0, 49151), (-1 / 3,)), GoldenPrompt((1, 2, 3), (0.0, -123.456))))
    assert parse(golden.dump(awkward).encode()) == awkward


@pytest.mark.parametrize(
    "change",
    [
        {"tolerance": 0},
        {"tolerance": -1},
        {"tolerance": 10.5},
        {"tolerance": True},
        {"tolerance": "0.1"},
        {"tolerance": None},
        {"tolerance": float("nan")},
        {"tolerance": 10**400},
        {"prompts": []},
        {"prompts": {}},
        {"prompts": [PROMPT] * 65},
        {"prompts": [{"tokens": [1] * 300, "logprobs": [-1] * 299}] * 60},
        {"prompts": [PROMPT, 3]},
        {"prompts": [{**PROMPT, "text": "a"}]},
        {"prompts": [{"tokens": [1, 2]}]},
        {"prompts": [{**PROMPT, "tokens": [5]}]},
        {"prompts": [{"tokens": [], "logprobs": []}]},
        {"prompts": [{"tokens": [5], "logprobs": []}]},
        {"prompts": [{**PROMPT, "tokens": [5, 6, -1]}]},
        {"prompts": [{**PROMPT, "tokens": [5, 6, 7.0]}]},
        {"prompts": [{**PROMPT, "tokens": [5, 6, True]}]},
        {"prompts": [{**PROMPT, "tokens": "567"}]},
        {"prompts": [{**PROMPT, "logprobs": [-1]}]},
        {"prompts": [{**PROMPT, "logprobs": [-1, -1, -1]}]},
        {"prompts": [{**PROMPT, "logprobs": [-1, 0.1]}]},
        {"prompts": [{**PROMPT, "logprobs": [-1, None]}]},
        {"prompts": [{**PROMPT, "logprobs": [-1, float("-inf")]}]},
        {"prompts": [{**PROMPT, "logprobs": [-1, float("nan")]}]},
        {"comment": "x"},
        {"gate": None},
        {"gate": 0.5},
        {"gate": {"weights": [0.5, 0.5]}},
        {"gate": [0.5, "0.5"]},
        {"gate": [True, 0]},
        {"gate": [float("nan"), 1]},
    ],
)
def test_what_it_cannot_say(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"golden\.json"):
        read(written(tmp_path, {**CONTENT, **change}))


def test_the_gate_is_the_adapters(tmp_path: Path) -> None:
    gated = {**CONTENT, "gate": [0.25, 0.75]}
    found = read(written(tmp_path, gated), POOL)
    assert found == replace(PARSED, gate=(0.25, 0.75))
    assert json.loads(golden.dump(found)) == {**gated, "prompts": [{"tokens": [5, 6, 7], "logprobs": [-0.5, -2.0]}]}
    for content, lowered, said in (
        (CONTENT, POOL, "give 2 weights"),
        (gated, PLAIN, "has no gate"),
        ({**CONTENT, "gate": [0.25, 0.25]}, POOL, "sum"),
        ({**CONTENT, "gate": [1]}, POOL, "1 numbers"),
    ):
        with pytest.raises(GoldenError, match=r"gate of golden\.json") as error:
            read(written(tmp_path, content), lowered)
        assert said in str(error.value)


@pytest.mark.parametrize("key", CONTENT)
def test_no_key_may_be_missing(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"no key '{key}'"):
        read(written(tmp_path, {k: value for k, value in CONTENT.items() if k != key}))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"tolerance": 1, "tolerance": 2}', "[" * 100_000])
def test_no_json_object(tmp_path: Path, content: str) -> None:
    with pytest.raises(CorruptSourceError):
        read(written(tmp_path, content))


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CorruptSourceError, match="more than the limit"):
        read(written(tmp_path, " " * (golden.MOST_BYTES + 1)))


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    written(tmp_path, CONTENT)
    (folder / GOLDEN_FILE).symlink_to(tmp_path / GOLDEN_FILE)
    with pytest.raises(UnsafePathError):
        read(folder)


@pytest.mark.parametrize("what", ["a folder", "a link to nothing"])
def test_what_is_there_but_no_file_is_not_skipped(tmp_path: Path, what: str) -> None:
    if what == "a folder":
        (tmp_path / GOLDEN_FILE).mkdir()
    else:
        os.symlink("nothing", tmp_path / GOLDEN_FILE)
    with pytest.raises(SourceError):
        read(tmp_path)


TWO = Golden(0.25, (GoldenPrompt((1, 2), (-1.0,)), GoldenPrompt((3, 4, 5), (-2.0, -3.0))))


@pytest.mark.parametrize("served", [[[-1.0], [-2.0, -3.0]], [[-1.25], [-2.25, -2.75]]])
def test_within_the_tolerance(served: list[list[float]]) -> None:
    compare(TWO, served)


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ([[-1.0], [-2.0, -3.5]], "prompt 1 of golden.json, position 2: the served log-probability is -3.5000"),
        ([[-1.5], [-2.0, -3.0]], "prompt 0 of golden.json, position 1: the served log-probability is -1.5000"),
        ([[-1.5], [-2.0, -9.0]], "prompt 1 of golden.json, position 2"),
        ([[float("nan")], [-2.0, -3.0]], "prompt 0 of golden.json, position 1: the served log-probability is nan"),
        ([[-1.0], [float("-inf"), -3.0]], "prompt 1 of golden.json, position 1"),
    ],
)
def test_the_worst_position_is_named(served: list[list[float]], said: str) -> None:
    with pytest.raises(GoldenError) as error:
        compare(TWO, served)
    assert said in str(error.value)
    assert "tolerance of 0.25" in str(error.value)
    if "nan" not in said:
        assert "expected is -" in str(error.value)
