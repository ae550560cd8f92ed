"""The same weights under another configuration are another model; other spellings of the same one are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.errors import ConfigError
from motet.adapters.methods import lower
from motet.adapters.methods.model_config import require_same_computation
from motet.adapters.source import read
from tests.support.bases import base_of
from tests.support.layouts import make
from tests.support.layouts_full import fine_tuned
from tests.support.layouts_s2ft import s2ft_fused
from tests.support.models import FAMILIES, tiny_llama

ABSENT = object()
"""Stands for a key that is taken away."""


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A fine-tune of the family's tiny model as transformers saves it."""
    return fine_tuned("layers.1.", dtype=dtype)(FAMILIES[family](), folder, 1).folder


def edit(folder: Path, changes: Mapping[str, Any]) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))
    return folder


def check(folder: Path, family: str) -> None:
    require_same_computation(read(folder), base_of(FAMILIES[family]()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_of_the_same_base_passes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model", dtype)
    base = base_of(FAMILIES[family]())
    assert lower(read(folder), base).overlays
    assert len(base.config) > 15


def test_a_padded_vocabulary_passes(tmp_path: Path) -> None:
    folder = s2ft_fused(padded_rows=8)(tiny_llama(), tmp_path / "model", 1).folder
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 264
    assert lower(read(folder), base_of(tiny_llama())).method == "s2ft"


def test_cordas_own_keys_pass_and_no_others(tmp_path: Path) -> None:
    folder = make("corda-official", tiny_llama(), tmp_path / "model").folder
    assert lower(read(folder), base_of(tiny_llama())).method == "corda"
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        lower(read(edit(folder, {"rms_norm_eps": 1e-3})), base_of(tiny_llama()))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": ABSENT, "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": ABSENT, "rope_theta": 10000},
        {"rope_theta": 10000.0},
        {"head_dim": ABSENT},
        {"mlp_bias": ABSENT, "attention_bias": ABSENT, "pretraining_tp": ABSENT},
        {"dtype": "bfloat16", "torch_dtype": "float16", "transformers_version": "4.31.0", "_name_or_path": "elsewhere"},
        {"architectures": ["LlamaModel"], "use_cache": False, "pad_token_id": 7, "eos_token_id": [2, 3]},
        {
            "attention_dropout": 0.1,
            "initializer_range": 0.5,
            "unsloth_version": "2024.9",
            "gone": False,
            "unknown": None,
        },
        {"max_position_embeddings": 4096},
    ],
    ids=str,
)
def test_other_words_for_the_same_pass(changes: Mapping[str, Any], tmp_path: Path) -> None:
    check(edit(saved("llama", tmp_path / "model"), changes), "llama")


THETA = {"rope_theta": 500000.0, "rope_type": "default"}
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
REFUSED: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "rope_theta": ("llama", {"rope_parameters": THETA}, r"rope_parameters=.*500000.* has .*10000"),
    "rope_theta, old": ("llama", {"rope_parameters": ABSENT, "rope_theta": 500000.0}, r"rope_parameters=.*500000"),
    "both, contradicting": ("llama", {"rope_theta": 500000.0}, r"rope_theta=500000.*contradict each other"),
    "rope_scaling": ("llama", {"rope_parameters": LINEAR}, r"rope_parameters=.*linear"),
    "rope_scaling, old": (
        "llama",
        {"rope_parameters": ABSENT, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        r"rope_parameters=.*linear",
    ),
    "rms_norm_eps": ("llama", {"rms_norm_eps": 1e-5}, r"says rms_norm_eps=1e-05, the base 'base' has 1e-06"),
    "hidden_act": ("llama", {"hidden_act": "gelu"}, r"hidden_act='gelu'.*'silu'"),
    "heads": ("llama", {"num_attention_heads": 2}, r"num_attention_heads=2.* has 4"),
    "key heads": ("llama", {"num_key_value_heads": 4}, r"num_key_value_heads=4.* has 2"),
    "head_dim": ("llama", {"head_dim": 24}, r"head_dim=24.* has 12"),
    "layers": ("llama", {"num_hidden_layers": 2}, r"num_hidden_layers=2.* has 3"),
    "tied": ("llama", {"tie_word_embeddings": False}, r"tie_word_embeddings=False.* has True"),
    "biases": ("llama", {"attention_bias": True}, r"attention_bias=True.* has False"),
    "a default that the base has not": ("llama", {"tie_word_embeddings": ABSENT}, "tie_word_embeddings"),
    "an unknown key": ("llama", {"logit_scale": 0.5}, r"logit_scale=0\.5.* has nothing"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "another family": ("llama", {"model_type": "mistral"}, r"model_type='mistral'.* has 'llama'"),
    "no family": ("llama", {"model_type": ABSENT}, "model_type=nothing"),
    "nonsense": ("llama", {"num_attention_heads": 0}, "cannot be read as that of a 'llama' model"),
    "window": ("gemma3", {"sliding_window": 64}, r"sliding_window=64.* has 7"),
    "kinds of layers": ("gemma3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    "softcapping": ("gemma3", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0.* has nothing"),
    "attention scale": ("gemma3", {"query_pre_attn_scalar": 64}, r"query_pre_attn_scalar=64.* has 16"),
}


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_another_computation_is_refused(family: str, changes: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model")
    check(folder, family)
    with pytest.raises(ConfigError, match=message) as refusal:
        check(edit(folder, changes), family)
    assert str(tmp_path) not in str(refusal.value)


def test_a_loader_that_lowers_asks(tmp_path: Path) -> None:
    folder = edit(saved("llama", tmp_path / "model"), {"rope_parameters": THETA})
    with pytest.raises(ConfigError, match="rope_parameters"):
        lower(read(folder), base_of(tiny_llama()))


def test_the_length_counts_where_the_rotation_depends_on_it(tmp_path: Path) -> None:
    dynamic = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    base = base_of(tiny_llama(rope_parameters=dynamic))
    folder = edit(saved("llama", tmp_path / "model"), {"rope_parameters": dynamic})
    require_same_computation(read(folder), base)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        require_same_computation(read(edit(folder, {"max_position_embeddings": 4096})), base)


def test_a_text_model_within_another_is_looked_at(tmp_path: Path) -> None:
    folder = saved("gemma3", tmp_path / "model")
    path = folder / "config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": own}))
    check(folder, "gemma3")
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": {**own, "sliding_window": 64}}))
    with pytest.raises(ConfigError, match="sliding_window"):
        check(folder, "gemma3")
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": 3}))
    with pytest.raises(ConfigError, match="text_config is no object"):
        check(folder, "gemma3")


def test_the_bases_own_configuration_is_not_changed_by_reading(tmp_path: Path) -> None:
    base = base_of(tiny_llama())
    before = json.dumps(base.config, default=str)
    files = read(edit(saved("llama", tmp_path / "model"), {"rope_parameters": ABSENT, "rope_theta": 1e4}))
    written = json.dumps(files.config)
    require_same_computation(files, base)
    assert (json.dumps(base.config, default=str), json.dumps(files.config)) == (before, written)


def test_a_base_without_configuration_says_nothing(tmp_path: Path) -> None:
    base = dataclasses.replace(base_of(tiny_llama()), config={})
    require_same_computation(read(edit(saved("llama", tmp_path / "model"), {"rms_norm_eps": 1.0})), base)
