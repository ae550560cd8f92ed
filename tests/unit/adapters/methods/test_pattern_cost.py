"""No pattern of a configuration stops the server: those that do not end are refused, and all others match as before."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from motet.adapters.errors import ConfigError
from motet.adapters.methods import pattern_cost
from motet.adapters.methods.config_values import MOST_PATTERNS
from motet.adapters.methods.pattern_cost import require_bounded
from motet.adapters.source import CONFIG_FILE
from tests.unit.adapters.conftest import Bench, edit

MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(30) for name in "qkvo"] + ["model.embed_tokens"]
ENDLESS = {
    "(.+)+x": "target_modules",
    "(.|.)*x": "exclude_modules",
    "(?:.?){60}x": "rank_pattern",
    ".*.*.*.*.*.*.*.*.*.*.*.*x": "alpha_pattern",
    "(?=(.+)+x)q_proj": "layers_pattern",
    "(.|.)" * 30 + "x": "target_modules",
}
"""Each costs half a second of a processor."""
FINE = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.([0-9]|1[0-9])\.self_attn\.(q|k|v)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:k_proj|v_proj|q_proj|out_proj|gate_proj).*?)",
    r"^(?!.*visual)(?!.*lm_head).*(?:q|k|v|o|gate|up|down)_proj.*",
    r"(?:model\.)?(?:layers\.)?[\d]{1,}\.(?:self_attn)\.(?:(?:k_proj|q_proj))",
]


@pytest.mark.parametrize(("pattern", "key"), ENDLESS.items(), ids=ENDLESS.values())
def test_what_does_not_end_is_refused(pattern: str, key: str) -> None:
    value: Any = {pattern: 1} if key in ("rank_pattern", "alpha_pattern") else [pattern] if "layers" in key else pattern
    started_s = time.process_time()
    with pytest.raises(ConfigError, match=r"take more than 0\.5 s"):
        require_bounded({key: value}, MODULES)
    assert time.process_time() - started_s < 0.3, "this process matched it"


@pytest.mark.parametrize("pattern", FINE)
def test_what_people_write_is_fine(pattern: str) -> None:
    require_bounded({"target_modules": pattern, "rank_pattern": {pattern: 4}}, MODULES)


def test_names_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(pattern_cost.subprocess, "run", never)
    config = {"target_modules": ["(q"], "rank_pattern": {r"model\.layers\.0\.q_proj$": 1}, "exclude_modules": 5}
    require_bounded(config, MODULES)


def test_an_adapter_with_such_a_pattern_is_refused(llama: Bench, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"])
    config = {"target_modules": "(" + ".|" * 5 + "q)*_proj_", "rank_pattern": {}}
    with pytest.raises(ConfigError, match=r"take more than 0\.5 s"):
        llama.lower(edit(folder, config=config))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_the_number_of_patterns_is_bounded_and_so_is_their_time(llama: Bench, tmp_path: Path, key: str) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"])
    table = {f"other.{i}": 2 for i in range(MOST_PATTERNS)}
    started_s = time.process_time()
    llama.lower(edit(folder, config={key: table}))
    assert time.process_time() - started_s < 4
    with pytest.raises(ConfigError, match=f"{key} has 4,097 patterns, more than 4,096"):
        llama.lower(edit(folder, config={key: {**table, "one.more": 2}}))
    assert len(json.loads((folder / CONFIG_FILE).read_text())[key]) == MOST_PATTERNS + 1
