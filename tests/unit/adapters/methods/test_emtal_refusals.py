"""An EMTAL folder that cannot be said exactly, or does not belong to the base, is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from motet.adapters.spec import Declared
from tests.support.bases import base_of_names
from tests.support.layouts_emtal import emtal
from tests.unit.adapters.conftest import Bench, Tensors, edit

MLP = "base_model.model.model.layers.0.mlp"
SELF = "base_model.model.model.layers.0.self_attn"
WIDTH, HIDDEN, RANK = 72, 48, 4


def saved(llama: Bench, tmp_path: Path, **options: Any) -> Path:
    return emtal(**options)(llama.model, tmp_path / "adapter", 1).folder


Change = Callable[[Tensors], Any]
REFUSED: dict[str, tuple[Change, type[AdapterError], str]] = {
    "an order that is missing": (
        lambda t: t.pop(f"{MLP}.order"),
        MissingTensorError,
        r"layers\.0\.mlp\.order' is missing: the pairs of 'model\.layers\.0\.mlp' are in the order of its clusters",
    ),
    "a channel twice": (
        lambda t: t[f"{MLP}.order"].__setitem__(0, t[f"{MLP}.order"][1]),
        ShapeError,
        r"mlp\.order' names a place twice",
    ),
    "a channel beyond the base": (
        lambda t: t[f"{MLP}.order"].add_(1),
        ShapeError,
        "names places 1 to 72; there are 0 to 71",
    ),
    "a negative channel": (lambda t: t[f"{MLP}.order"].sub_(1), ShapeError, "names places -1 to 70"),
    "an order of some channels": (
        lambda t: t.__setitem__(f"{MLP}.order", torch.arange(71)),
        ShapeError,
        r"mlp\.order' has 71 places, expected 72",
    ),
    "an order that is no list": (
        lambda t: t.__setitem__(f"{MLP}.order", torch.arange(72)[None]),
        ShapeError,
        r"shape \[1, 72\] and dtype torch.int64; it must be a list",
    ),
    "an order of fractions": (
        lambda t: t.__setitem__(f"{MLP}.order", torch.arange(72).float()),
        ShapeError,
        "float32; it must be a list",
    ),
    "a without b": (lambda t: t.pop(f"{SELF}.lora_q_proj_b"), MissingTensorError, "lora_q_proj_b' is missing"),
    "b without a": (lambda t: t.pop(f"{MLP}.lora_up_proj_a"), MissingTensorError, "lora_up_proj_a' is missing"),
    "a transposed": (
        lambda t: t.__setitem__(f"{SELF}.lora_o_proj_a", torch.ones(RANK, HIDDEN)),
        ShapeError,
        r"lora_o_proj_a' has shape \[4, 48\], expected \[48, 4\]",
    ),
    "b of another width": (
        lambda t: t.__setitem__(f"{MLP}.lora_gate_proj_b", torch.ones(RANK, WIDTH - 1)),
        ShapeError,
        r"lora_gate_proj_b' has shape \[4, 71\], expected \[4, 72\]",
    ),
    "a pair of another rank": (
        lambda t: t.update({f"{SELF}.lora_o_proj_a": torch.ones(48, 3), f"{SELF}.lora_o_proj_b": torch.ones(3, 48)}),
        ShapeError,
        r"\[48, 3\], expected \[48, 4\]",
    ),
    "NaN in a pair": (lambda t: t[f"{MLP}.lora_down_proj_a"].fill_(torch.nan), NonFiniteError, "lora_down_proj_a"),
    "NaN in the router": (
        lambda t: t[f"{MLP}.gate_weight_lora.weight"].fill_(torch.nan),
        NonFiniteError,
        "gate_weight_lora",
    ),
    "a router of other experts": (
        lambda t: t.__setitem__(f"{MLP}.gate_weight_lora.weight", torch.ones(9, HIDDEN)),
        ShapeError,
        r"gate_weight_lora.weight' has shape \[9, 48\], expected \[8, 48\]",
    ),
    "a router of another width": (
        lambda t: t.__setitem__(f"{MLP}.gate_weight_lora.weight", torch.ones(8, WIDTH)),
        ShapeError,
        r"\[8, 72\], expected \[8, 48\]",
    ),
    "a linear of no base": (
        lambda t: t.update({"base_model.model.x.lora_q_proj_a": torch.ones(1, 1)}),
        UnmatchedTensorError,
        r"x\.lora_q_proj_a",
    ),
    "an order of no feed-forward layer": (
        lambda t: t.update({f"{SELF}.order": torch.arange(72)}),
        UnmatchedTensorError,
        r"self_attn\.order",
    ),
    "a tensor of another kind": (lambda t: t.update({"x": torch.ones(1)}), UnmatchedTensorError, "'x'"),
    "nothing": (lambda t: t.clear(), ConfigError, "holds no pair"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(
    llama: Bench, tmp_path: Path, change: Change, error: type[AdapterError], message: str
) -> None:
    folder = edit(saved(llama, tmp_path), change)
    with pytest.raises(error, match=message):
        llama.lower(folder)


SETTINGS: dict[str, tuple[Mapping[str, Any], type[AdapterError], str]] = {
    "not yet faded": (
        {"fading": 0.75},
        UnsupportedError,
        "fading=0.75 is below 1: the router still scales .* every token.*; train on until fading is 1",
    ),
    "almost faded": ({"fading": 0.9999999}, UnsupportedError, "is below 1"),
    "no fading yet": ({"fading": 0}, UnsupportedError, "fading=0 is below 1"),
    "more than faded": ({"fading": 1.5}, ConfigError, "fading=1.5 is not between 0"),
    "fading below 0": ({"fading": -1}, ConfigError, "fading=-1 is not between 0"),
    "fading that is no number": ({"fading": "1"}, ConfigError, "fading='1' is not a finite number"),
    "fading that is true": ({"fading": True}, ConfigError, "fading=True is not a finite number"),
    "fading that is no finite number": ({"fading": float("nan")}, ConfigError, "fading=nan is not a finite number"),
    "no fading": ({"fading": None}, ConfigError, "fading=None"),
    "experts that do not divide": (
        {"experts": 7},
        ConfigError,
        r"experts=7 do not divide the 72 channels of 'model\.layers\.0\.mlp' evenly",
    ),
    "no experts": ({"experts": 0}, ConfigError, "experts=0 is not a whole number of at least 1"),
    "half an expert": ({"experts": 1.5}, ConfigError, "experts=1.5"),
    "no rank": ({"r": None}, ConfigError, "r=None"),
    "another rank": ({"r": 5}, ShapeError, r"expected \[48, 5\]"),
    "cold": ({"temperature": 0}, ConfigError, "temperature=0 is not above 0"),
    "warmth of a word": ({"temperature": "5"}, ConfigError, "temperature='5' is not a finite number"),
    "another task": ({"task_type": "SEQ_CLS"}, ConfigError, "task_type='SEQ_CLS' is none of CAUSAL_LM"),
    "a base of no name": ({"base_model_name_or_path": 1}, ConfigError, "base_model_name_or_path=1 is neither"),
    "inference_mode of a word": ({"inference_mode": "yes"}, ConfigError, "inference_mode='yes' is not true or false"),
    "an unknown key": ({"lora_alpha": 8}, ConfigError, "unknown key 'lora_alpha'"),
}


@pytest.mark.parametrize(("config", "error", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_a_setting_that_cannot_be_is_refused(
    llama: Bench, tmp_path: Path, config: Mapping[str, Any], error: type[AdapterError], message: str
) -> None:
    folder = edit(saved(llama, tmp_path, router=False), config=config)
    with pytest.raises(error, match=message):
        llama.lower(folder)


@pytest.mark.parametrize("declared", [Declared(trained_on_base=True), "initial"])
def test_a_declared_start_is_refused(llama: Bench, tmp_path: Path, declared: Any) -> None:
    folder = saved(llama, tmp_path)
    with pytest.raises(ConfigError, match="emtal adapters hold their whole change"):
        llama.lower(folder, Declared(initial=folder) if declared == "initial" else declared)


def test_fused_channels_of_unknown_order_are_refused(llama: Bench, tmp_path: Path) -> None:
    """A pair on gate_up_proj would have to be put back by rules nobody wrote down."""
    folder = saved(llama, tmp_path, linears=("q_proj",))
    edit(
        folder,
        lambda t: t.update(
            {f"{MLP}.lora_gate_up_proj_a": torch.ones(4, 4), f"{MLP}.lora_gate_up_proj_b": torch.ones(4, 4)}
        ),
    )
    base = base_of_names(["model.layers.0.mlp.gate_up_proj"])
    with pytest.raises(UnsupportedError, match=r"'model\.layers\.0\.mlp\.gate_up_proj' has an EMTAL pair, but is none"):
        lower(read(folder), base)
