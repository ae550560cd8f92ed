"""Every key is honoured, harmless or refused, and modules are matched as PEFT matches them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from motet.adapters.errors import ConfigError, UnsupportedError
from motet.adapters.methods.config_values import LONGEST_PATTERN
from motet.adapters.methods.peft_config import (
    BASE_CHANGING_INITS,
    INERT,
    INERT_WITH,
    NEUTRAL,
    PLAIN_INITS,
    SERVED,
    PeftLoraConfig,
    parse,
)
from tests.support.bases import base_of_names

SMALLEST: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def parsed(**changes: Any) -> PeftLoraConfig:
    return parse({**SMALLEST, **changes})


# --------------------------------------------------------------------------------------------------------------- keys


def test_every_field_of_the_installed_peft_is_in_exactly_one_table() -> None:
    """A field that PEFT adds must be judged before it is served."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert sorted(fields - SERVED - INERT - NEUTRAL.keys()) == []
    assert not SERVED & INERT
    assert not SERVED & NEUTRAL.keys()
    assert not INERT & NEUTRAL.keys()
    assert NEUTRAL.keys() >= INERT_WITH.keys()


def test_what_peft_writes_by_default_is_accepted() -> None:
    written = json.loads(json.dumps(LoraConfig(target_modules="all-linear").to_dict(), default=list))
    assert parse(written).r == 8


QUIET: list[tuple[str, Any]] = [(key, value) for key, row in NEUTRAL.items() for value in row[0]]


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_unserved_feature_is_refused_by_name(key: str) -> None:
    for value in (True, 7, "yes", ["lm_head"], {"x": 1}):
        with pytest.raises(UnsupportedError, match=f"^{key}=.*not served"):
            parsed(**{key: value})


@pytest.mark.parametrize(("key", "value"), QUIET)
def test_unserved_feature_that_is_off_is_accepted(key: str, value: Any) -> None:
    assert parsed(**{key: value}) == parsed()


@pytest.mark.parametrize("key", sorted(INERT))
def test_inert_key_changes_nothing(key: str) -> None:
    assert parsed(**{key: {"anything": [1]}}) == parsed()


@pytest.mark.parametrize("key", ["use_Dora", "lora_a", "", "peft-type", "r_pattern"])
def test_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        parsed(**{key: None})


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "lora", None, 1, ["LORA"]])
def test_other_peft_types_are_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedError, match="peft_type"):
        parsed(peft_type=kind)


# ------------------------------------------------------------------------------------------------------------- values

NO_FLAG: tuple[Any, ...] = (1, "true", [True], {"x": 1})
NO_TABLE: tuple[Any, ...] = (
    *(1, "q", ["q"], [["q", 1]]),
    *({"q": None}, {"q": "1"}, {"q": True}, {"q": [1]}, {"q": float("nan")}),
    *({"(": 2}, {"(?i)q_proj": 2}, {"a" * 2001: 2}),
)
BAD_VALUES: dict[str, tuple[Any, ...]] = {
    "r": (None, 0, -1, 2.0, "8", True, [8], float("nan")),
    "lora_alpha": (None, "16", True, [16], float("nan"), float("inf"), 10**400),
    "use_rslora": NO_FLAG,
    "use_dora": NO_FLAG,
    "lora_bias": NO_FLAG,
    "bias": (None, True, "some", ["none"], ""),
    "target_modules": (None, 1, True, [1], ["q", None], {"q": 1}, "(", "a" * 2001),
    "exclude_modules": (1, True, [1], {"q": 1}, "["),
    "layers_to_transform": ("1", 1.0, [1.0], ["1"], {"1": 1}, [None]),
    "layers_pattern": (1, True, {"x": 1}, [1], ["("], "*", "(?i)layers"),
    "rank_pattern": (*NO_TABLE, {"q": 0}, {"q": 2.0}),
    "alpha_pattern": NO_TABLE,
    "init_lora_weights": ("pizza", 1, 0, [True], {}, "pissa2"),
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in BAD_VALUES.items() for value in values],
    ids=lambda value: str(value)[:24],
)
def test_bad_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        parsed(**{key: value})


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_necessary_key(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse({name: value for name, value in SMALLEST.items() if name != key})


@pytest.mark.parametrize("nothing", [[], ""])
def test_no_target_modules(nothing: Any) -> None:
    with pytest.raises(ConfigError, match="target_modules is empty"):
        parsed(target_modules=nothing)


def test_dora_and_lora_bias_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        parsed(use_dora=True, lora_bias=True)


@pytest.mark.parametrize("init", PLAIN_INITS)
def test_inits_that_leave_the_base_alone(init: Any) -> None:
    assert parsed(init_lora_weights=init) == parsed()


@pytest.mark.parametrize("init", [*BASE_CHANGING_INITS, "pissa_niter_16"])
def test_inits_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(UnsupportedError, match="not the whole change"):
        parsed(init_lora_weights=init)


def test_eva_config_matters_only_without_eva() -> None:
    eva = {"rho": 2.0}
    assert parsed(init_lora_weights="eva", eva_config=eva) == parsed()
    with pytest.raises(UnsupportedError, match="eva_config"):
        parsed(eva_config=eva)


def test_pattern_of_the_greatest_length() -> None:
    pattern = "a" * LONGEST_PATTERN
    assert parsed(target_modules=pattern).target_modules == pattern


# ----------------------------------------------------------------------------------------------- matching, as PEFT does

LINEARS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
NAMES = [
    *(f"model.layers.{layer}.{linear}" for layer in (0, 1, 2, 10, 11) for linear in LINEARS.split()),
    "model.layers.1.mlp.experts.0.up_proj",
    "model.layers.0.mlp.experts.1.up_proj",
    "encoder.h.1.attn.q_proj",
    "layers.1.q_proj",
    "h.2.my_q_proj",
    "q_proj",
    "score.q_proj.inner",
]

PATTERNS: dict[str, list[str]] = {
    "none": [],
    "plain": ["q_proj"],
    "first of two": ["q_proj", "self_attn.q_proj"],
    "first of two, turned": ["self_attn.q_proj", "q_proj"],
    "overlapping expressions": [".*_proj", "down_proj", r"layers\.1\..*"],
    "dots are wildcards": ["layers.1.self_attn.q_proj", "layers.1.*"],
    "alternation": ["q_proj|v_proj", "self_attn.(k|o)_proj"],
    "anchored": ["^model.layers.0.self_attn.q_proj", "^q_proj"],
    "full path": ["model.layers.10.mlp.up_proj"],
    "part of a name": ["proj", "_proj", "my_q_proj"],
    "end anchor": ["up_proj$"],
    "inner number": [r"experts\.\d+\.up_proj", r"\d+.up_proj"],
    "groups of their own": [r"(q)_proj", r"(layers)\..*\.(k|v)_proj"],
    "empty": [""],
}


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS.keys())
@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_scale_as_peft_resolves_them(patterns: list[str], use_rslora: bool) -> None:
    ranks = {pattern: 20 + i for i, pattern in enumerate(patterns)}
    alphas = {pattern: 100.0 + i for i, pattern in enumerate(reversed(patterns))}
    config = parsed(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora)
    for name in NAMES:
        rank = ranks.get(get_pattern_key(list(ranks), name), 8)
        alpha = alphas.get(get_pattern_key(list(alphas), name), 16)
        assert config.rank(name) == rank
        assert config.scale(name) == pytest.approx(alpha / (rank**0.5 if use_rslora else rank), rel=1e-15)


MATCHING: dict[str, dict[str, Any]] = {
    "ending": {"target_modules": ["q_proj"]},
    "longer ending": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "list is no expression": {"target_modules": [".*_proj", "q_proj|k_proj"]},
    "full path": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "expression": {"target_modules": r".*\.(q|v)_proj"},
    "expression is of the whole path": {"target_modules": r"q_proj"},
    "expression with layers": {"target_modules": r"model\.layers\.(1|10)\..*"},
    "expression and exclusion": {"target_modules": r".*_proj", "exclude_modules": r".*\.mlp\..*"},
    "exclusion by ending": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["experts.0.up_proj"]},
    "exclusion of a full path": {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    "exclusion by expression": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.1\..*"},
    "exclusion of a part is none": {"target_modules": ["q_proj"], "exclude_modules": ["proj", "layers.1"]},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 10]},
    "layer zero": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "one layer": {"target_modules": ["up_proj"], "layers_to_transform": 1},
    "no layers are all layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers and a full path": {"target_modules": ["q_proj", "layers.1.q_proj"], "layers_to_transform": [2]},
    "layers and pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "other pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    "two patterns": {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": ["h", "layers"]},
    "pattern with a group": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(layers|h)"},
    "bare alternation": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "model|layers"},
    "pattern matches nothing": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "block"},
    "inner pattern": {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": ["experts"]},
    "empty pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    "everything at once": {
        "target_modules": ["self_attn.q_proj", "up_proj"],
        "exclude_modules": ["mlp.up_proj"],
        "layers_to_transform": [0, 1],
    },
}


@pytest.mark.parametrize("options", MATCHING.values(), ids=MATCHING.keys())
def test_targets_as_peft_matches_them(options: dict[str, Any]) -> None:
    config = LoraConfig(**options)
    expected = {name for name in NAMES if check_target_module_exists(config, name)}
    assert parsed(**options).expected_targets(base_of_names(NAMES)) == expected


def test_the_matching_cases_differ() -> None:
    """Each case would be pointless if it chose nothing, or as much as another."""
    found = [parsed(**options).expected_targets(base_of_names(NAMES)) for options in MATCHING.values()]
    assert sum(not names for names in found) == 2
    assert len(set(found)) > 15


@pytest.mark.parametrize("word", ["all-linear", "All-Linear"])
def test_all_linear_is_every_target(word: str) -> None:
    base = base_of_names(NAMES, other_modules=["model.embed_tokens", "lm_head"])
    assert parsed(target_modules=word).expected_targets(base) == set(NAMES)
    less = parsed(target_modules=word, exclude_modules=["q_proj"]).expected_targets(base)
    assert less == {name for name in NAMES if name != "q_proj" and not name.endswith(".q_proj")}


@pytest.mark.parametrize("rule", [["lm_head"], ["q_proj", "lm_head"], ".*"])
def test_naming_a_module_that_is_no_target_is_refused(rule: Any) -> None:
    base = base_of_names(NAMES, other_modules=["lm_head"])
    with pytest.raises(UnsupportedError, match="'lm_head', which is not among the linear layers"):
        parsed(target_modules=rule).expected_targets(base)


def test_layers_to_transform_beside_a_pattern_is_refused_as_peft_refuses_it() -> None:
    with pytest.raises(ConfigError, match="layers_to_transform"):
        parsed(target_modules=r".*q_proj", layers_to_transform=[0])
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(target_modules=r".*q_proj", layers_to_transform=[0])
