"""A refusal for everything of a LoRA folder that would be applied only in part."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.errors import (
    AdapterError,
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
    UnsupportedError,
)
from motet.adapters.methods import lower
from motet.adapters.source import read
from tests.support.bases import base_of, linears
from tests.support.models import tiny_llama
from tests.unit.adapters.conftest import Bench, Tensors, edit
from tests.unit.adapters.methods.changes import drop, poison, put, rename

Q0 = "model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"

# Both sides compute in float32, in another order of operations; weights are of order 1.
ATOL, RTOL = 2e-6, 1e-5

PREFIX = f"base_model.model.{Q0}"
REFUSED: dict[str, tuple[Callable[[Tensors], None], type[AdapterError], str]] = {
    "A is missing": (drop(Q0_A), MissingTensorError, re.escape(Q0_A)),
    "B is missing": (drop(Q0_B), MissingTensorError, re.escape(Q0_B)),
    "both are missing": (rename(f"{Q0}.", "moved."), MissingTensorError, re.escape(Q0)),
    "a pair too many": (
        put("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", torch.ones(4, 48)),
        UnmatchedTensorError,
        "1 tensors match no rule.*k_proj",
    ),
    "a module of no base": (
        put("base_model.model.model.layers.9.x.lora_A.weight", torch.ones(1)),
        UnmatchedTensorError,
        "layers.9",
    ),
    "a tensor without the prefix": (put("q_proj.lora_A.weight", torch.ones(1)), UnmatchedTensorError, "'q_proj.lora_A"),
    "another prefix": (rename("base_model.model.", "base_model."), MissingTensorError, "2 have no tensors"),
    "adapter name in the keys": (rename("lora_A.", "lora_A.default."), MissingTensorError, "lora_A.weight"),
    "A has another width": (put(Q0_A, torch.ones(4, 47)), ShapeError, r"\[4, 47\], expected \[4, 48\]"),
    "B has another width": (put(Q0_B, torch.ones(49, 4)), ShapeError, r"\[49, 4\], expected \[48, 4\]"),
    "B is transposed": (put(Q0_B, torch.ones(4, 48)), ShapeError, r"\[4, 48\], expected \[48, 4\]"),
    "A has another rank": (put(Q0_A, torch.ones(3, 48)), ShapeError, r"\[3, 48\], expected \[4, 48\]"),
    "A has a dimension too many": (put(Q0_A, torch.ones(4, 48, 1)), ShapeError, r"\[4, 48, 1\]"),
    "A is empty": (put(Q0_A, torch.ones(0, 48)), ShapeError, r"\[0, 48\]"),
    "NaN": (poison(Q0_A, float("nan")), NonFiniteError, re.escape(Q0_A)),
    "infinity": (poison(Q0_B, float("inf")), NonFiniteError, re.escape(Q0_B)),
    "minus infinity": (poison(Q0_B, -float("inf")), NonFiniteError, re.escape(Q0_B)),
    "beyond float32": (put(Q0_A, torch.full((4, 48), 1e300, dtype=torch.float64)), NonFiniteError, re.escape(Q0_A)),
    "integers": (put(Q0_A, torch.ones(4, 48, dtype=torch.int8)), ShapeError, "int8"),
    "booleans": (put(Q0_B, torch.ones(48, 4, dtype=torch.bool)), ShapeError, "bool"),
    "PoLAR": (put(f"{PREFIX}.lora_S.weight", torch.ones(4, 4)), ConfigError, "PoLAR"),
    "PoLAR, parametrised": (
        put(f"{PREFIX}.lora_S.parametrizations.weight.original", torch.ones(4, 4)),
        ConfigError,
        "PoLAR",
    ),
    "PoLAR, of some other spelling": (put(f"{PREFIX}.lora_S", torch.ones(4, 4)), UnmatchedTensorError, "lora_S"),
    "a frozen rotation of A": (put(f"{PREFIX}.lora_A_rho", torch.ones(4)), UnmatchedTensorError, "lora_A_rho"),
    "embedding": (
        put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 256)),
        UnmatchedTensorError,
        "embed_tokens",
    ),
    "magnitude without use_dora": (put(f"{PREFIX}.lora_magnitude_vector", torch.ones(48)), ConfigError, "use_dora"),
    "bias of B without lora_bias": (put(f"{PREFIX}.lora_B.bias", torch.ones(48)), UnmatchedTensorError, "lora_B.bias"),
    "base bias without bias": (
        put(f"{PREFIX}.base_layer.bias", torch.ones(48)),
        UnmatchedTensorError,
        "base_layer.bias",
    ),
    "a whole module": (
        put("base_model.model.model.norm.weight", torch.ones(48)),
        UnmatchedTensorError,
        r"model\.norm",
    ),
    "a head of another base": (put("base_model.model.lm_head.weight", torch.ones(99, 48)), ShapeError, "lm_head"),
    "KaSA's diagonal": (put(f"{PREFIX}.lora_diag", torch.ones(4)), UnmatchedTensorError, "lora_diag"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_do_not_fit_are_refused(
    llama: Bench, tmp_path: Path, change: Callable[[Tensors], None], error: type[AdapterError], message: str
) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"])
    llama.lower(folder)
    edit(folder, change)
    with pytest.raises(error, match=message):
        llama.lower(folder)


CONFIGS: dict[str, tuple[dict[str, Any], type[AdapterError], str]] = {
    "wrong rank": ({"r": 5}, ShapeError, r"\[4, 48\], expected \[5, 48\]"),
    "absurd rank": ({"r": 10**400}, ShapeError, r"\[4, 48\], expected"),
    "wrong rank by pattern": ({"rank_pattern": {"q_proj": 3}}, ShapeError, r"\[4, 48\], expected \[3, 48\]"),
    "more targets than tensors": ({"target_modules": ["q_proj", "k_proj"]}, MissingTensorError, "names 4.*2 have no"),
    "fewer targets than tensors": ({"layers_to_transform": [0]}, UnmatchedTensorError, "2 tensors match no rule"),
    "targets of another model": ({"target_modules": ["c_attn"]}, UnmatchedTensorError, "4 tensors"),
    "a norm": ({"target_modules": ["q_proj", "norm"]}, UnsupportedError, "norm"),
    "the embedding without tensors": ({"target_modules": ["q_proj", "embed_tokens"]}, MissingTensorError, "1 have no"),
    "trained tokens without tensors": ({"trainable_token_indices": [3]}, MissingTensorError, "trainable_tokens_delta"),
    "trained tokens of no list": ({"trainable_token_indices": "3"}, ConfigError, "no list of token ids"),
    "a trained token twice": ({"trainable_token_indices": [3, 3]}, ConfigError, "twice"),
    "trained tokens of a linear": ({"trainable_token_indices": {"q_proj": [3]}}, UnsupportedError, "'q_proj'"),
    "trained tokens under a pair": (
        {"trainable_token_indices": {"embed_tokens": [3]}, "target_modules": ["q_proj", "embed_tokens"]},
        AdapterError,
        "embed_tokens",
    ),
    "tied pairs": ({"ensure_weight_tying": True}, UnsupportedError, "tied layers"),
    "DoRA without magnitudes": ({"use_dora": True}, MissingTensorError, "lora_magnitude_vector"),
    "lora_bias without biases": ({"lora_bias": True}, MissingTensorError, r"lora_B\.bias"),
    "a saved module without tensors": ({"modules_to_save": ["lm_head"]}, MissingTensorError, r"lm_head\.weight"),
    "a saved module of no base": (
        {"modules_to_save": ["score"]},
        UnsupportedError,
        "names 'score', which 'base'",
    ),
    "saved modules that are none": ({"modules_to_save": "lm_head"}, ConfigError, "not a list of module names"),
    "LoftQ": ({"init_lora_weights": "loftq"}, UnsupportedError, "LoftQ"),
    "PiSSA at random": ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "initial"),
    "CorDA": ({"init_lora_weights": "corda"}, UnsupportedError, "CorDA"),
    "IA3": ({"peft_type": "IA3"}, UnsupportedError, "IA3.*methods served:.*lora"),
}


@pytest.mark.parametrize(("config", "error", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configuration_that_does_not_fit_is_refused(
    llama: Bench, tmp_path: Path, config: dict[str, Any], error: type[AdapterError], message: str
) -> None:
    folder = edit(llama.save(tmp_path / "adapter", target_modules=["q_proj"]), config=config)
    with pytest.raises(error, match=message):
        llama.lower(folder)


def test_no_tensors_and_no_targets_is_refused(llama: Bench, tmp_path: Path) -> None:
    folder = edit(
        llama.save(tmp_path / "adapter", target_modules=["q_proj"]), Tensors.clear, {"target_modules": ["absent"]}
    )
    with pytest.raises(ConfigError, match="names no linear layer of 'base'"):
        llama.lower(folder)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_methods_on_tied_ends_are_refused(llama: Bench, tmp_path: Path, module: str, init: str) -> None:
    """PEFT takes the start out of the weight that both ends share, or not at all: never answer wrongly."""
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj", module], init_lora_weights=init)
    with pytest.raises(UnsupportedError, match=module):
        llama.lower(folder)


def test_a_pair_on_the_ends_of_an_odd_vocabulary_is_refused(tmp_path: Path) -> None:
    bench = Bench(model := tiny_llama(vocab_size=251), base_of(model))
    folder = bench.save(tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedError, match=r"'lm_head'.*vocabulary of 251 .* multiple of 8; re-train without it"):
        bench.lower(folder)
    rest = bench.save(tmp_path / "rest", target_modules=["q_proj"], trainable_token_indices=[3])
    lowered = bench.lower(rest)
    assert lowered.overlays.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert lowered.overlays["lm_head.weight"] is lowered.overlays["model.embed_tokens.weight"]


def test_saved_layers_that_contradict_each_other_are_refused(llama: Bench, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"])
    edit(folder, put("base_model.model.lm_head.weight", torch.ones(256, 48)))
    assert llama.lower(folder).overlays.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    edit(folder, put("base_model.model.model.embed_tokens.weight", torch.zeros(256, 48)))
    with pytest.raises(ConfigError, match="tied"):
        llama.lower(folder)


def test_saved_layers_that_are_the_bases_cost_nothing(llama: Bench, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"])
    own = llama.model.lm_head.weight.detach()
    edit(folder, put("base_model.model.lm_head.weight", own.clone()))
    lowered = llama.lower(folder)
    assert all(name.endswith("q_proj") for name in lowered.effects)
    assert not lowered.overlays


def test_all_linear_leaves_the_head_alone(llama: Bench, tmp_path: Path) -> None:
    """As PEFT means it: its tensors have none of the head's."""
    folder = llama.save(tmp_path / "adapter", target_modules="all-linear")
    lowered = llama.lower(edit(folder, config={"target_modules": "all-linear"}))  # PEFT writes the list
    assert lowered.effects.keys() == linears(llama.base)


def test_a_saved_module_that_no_row_can_replace_is_refused(llama: Bench, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["norm"])
    assert "model.norm.weight" in llama.lower(folder).overlays
    with pytest.raises(UnsupportedError, match="cannot be replaced for single rows"):
        lower(read(folder), dataclasses.replace(llama.base, replaceable=frozenset()))


def test_missing_base_bias_is_refused(qwen2: Bench, tmp_path: Path) -> None:
    folder = qwen2.save(tmp_path / "adapter", target_modules=["q_proj"], bias="lora_only")
    edit(folder, drop(f"{PREFIX}.base_layer.bias"))
    with pytest.raises(MissingTensorError, match=r"q_proj\.bias"):
        qwen2.lower(folder)


def test_bias_of_a_linear_that_has_none_is_refused(llama: Bench, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"])
    edit(folder, put("base_model.model.model.layers.0.self_attn.k_proj.bias", torch.ones(24)), {"bias": "all"})
    with pytest.raises(UnmatchedTensorError, match=r"k_proj\.bias"):
        llama.lower(folder)


def test_second_bias_does_not_replace_the_low_rank_change(qwen2: Bench, tmp_path: Path) -> None:
    folder = qwen2.save(tmp_path / "adapter", target_modules=["q_proj"], bias="all")
    edit(folder, put(f"{PREFIX}.bias", torch.ones(48)))
    with pytest.raises(UnmatchedTensorError, match=r"q_proj\.bias"):
        qwen2.lower(folder)


def test_dora_on_a_row_of_zeros_is_refused(llama: Bench, tmp_path: Path) -> None:
    def no_change_and_no_length(tensors: Tensors) -> None:
        tensors[Q0_B].zero_()

    folder = edit(llama.save(tmp_path / "adapter", target_modules=["q_proj"], use_dora=True), no_change_and_no_length)
    weight = llama.model.get_submodule(Q0).weight
    kept = weight.detach().clone()
    llama.lower(folder)
    try:
        weight.data[3] = 0
        with pytest.raises(NonFiniteError, match="q_proj"):
            llama.lower(folder)
    finally:
        weight.data.copy_(kept)
