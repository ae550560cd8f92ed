"""An iLoRA folder that does not say exactly what to serve is refused, with what is wrong."""

from __future__ import annotations

import json
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
from tests.support.layouts_ilora import GatedLayout, ilora
from tests.unit.adapters.conftest import Bench, Tensors, edit, edit_tensors
from tests.unit.adapters.methods.changes import drop, poison, put, replace_with

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def layout(llama: Bench, tmp_path: Path) -> GatedLayout:
    return ilora(llama.model, tmp_path / "adapter")


CONFIGS: dict[str, tuple[dict[str, Any], type[AdapterError], str]] = {
    "a rank no multiple of the experts": ({"num_moe": 3}, ConfigError, "num_moe=3 does not divide r=8"),
    "an unknown key": ({"target_modules": ["q_proj"]}, ConfigError, "unknown key 'target_modules'"),
    "no experts": ({"num_moe": 0}, ConfigError, "num_moe=0 is not a whole number of at least 1"),
    "another rank": ({"r": 16}, ShapeError, r"lora_A\.weight' has shape \[8, 48\], expected \[16, 48\]"),
    "an alpha that is no number": ({"lora_alpha": "32"}, ConfigError, "lora_alpha='32' is not a finite number"),
    "other items": ({"items": 38}, ShapeError, "says items=38, so 'sasrec.item.* should have 39 rows, and has 38"),
    "another length": (
        {"history_length": 9},
        ShapeError,
        "says history_length=9, so .* should have 9 rows, and has 10",
    ),
    "other experts": ({"num_moe": 2}, ShapeError, r"says num_moe=2, so 'router\.gate\.fc\.weight' should have 2 rows"),
    "a placeholder too few": ({"placeholders": {"history": "[H]"}}, ConfigError, "is not an object of two different"),
    "one placeholder for both": (
        {"placeholders": {"history": "[H]", "candidates": "[H]"}},
        ConfigError,
        "is not an object of two different tokens",
    ),
    "a base that is no name": ({"base_model_name_or_path": 7}, ConfigError, "base_model_name_or_path=7 is neither"),
    "a mode that is no truth value": ({"inference_mode": "no"}, ConfigError, "inference_mode='no' is not true or"),
    "the authors' own folder": (
        {"peft_type": "MOELORA"},
        UnsupportedError,
        "neither the router nor SASRec.* convert the Lightning checkpoint .*motet convert ilora",
    ),
}


@pytest.mark.parametrize(("config", "error", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_other_configurations_are_refused(
    llama: Bench, layout: GatedLayout, config: Mapping[str, Any], error: type[AdapterError], message: str
) -> None:
    edit(layout.folder, config=config)
    with pytest.raises(error, match=message):
        llama.lower(layout.folder)


@pytest.mark.parametrize("key", ["history_length", "items", "lora_alpha", "num_moe", "placeholders", "r"])
def test_a_missing_key_is_refused(llama: Bench, layout: GatedLayout, key: str) -> None:
    file = layout.folder / "adapter_config.json"
    config = json.loads(file.read_text())
    del config[key]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"has no '{key}'"):
        llama.lower(layout.folder)


Change = Callable[[Tensors], Any]
STEM = f"base_model.model.{Q_PROJ}"
PAIRS: dict[str, tuple[Change, type[AdapterError], str]] = {
    "half a pair": (drop(f"{STEM}.lora_B.weight"), MissingTensorError, r"q_proj\.lora_B\.weight"),
    "a gate of its own": (put(f"{STEM}.gating.linear_layer.weight", torch.ones(4, 64)), UnmatchedTensorError, "gating"),
    "a linear of no base": (
        put("base_model.model.x.lora_A.weight", torch.ones(1)),
        UnmatchedTensorError,
        "'x' is not among",
    ),
    "the head": (
        lambda t: t.update(
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(8, 48),
                "base_model.model.lm_head.lora_B.weight": torch.ones(256, 8),
            }
        ),
        UnmatchedTensorError,
        "'lm_head' is not among the linear layers",
    ),
    "NaN": (poison(f"{STEM}.lora_A.weight", torch.nan), NonFiniteError, r"lora_A\.weight"),
    "nothing": (lambda tensors: tensors.clear(), ConfigError, "holds no pair"),
}
GATES: dict[str, tuple[Change, type[AdapterError], str]] = {
    "no router": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("router.")],
        MissingTensorError,
        "has no router",
    ),
    "no SASRec": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("sasrec.")],
        MissingTensorError,
        "has no sasrec",
    ),
    "another network": (put("other.weight", torch.ones(1)), UnmatchedTensorError, "match no rule: 'other.weight'"),
    "another base's projector": (
        replace_with("projector.mlp_proj.0.weight", (64, 64)),
        ShapeError,
        r"'projector\.mlp_proj\.0\.weight' has shape \[64, 64\], expected \[48, 64\]",
    ),
    "half the statistics": (drop("router.bn1.running_var"), MissingTensorError, r"router\.bn1\.running_var"),
    "infinity": (poison("router.gate.fc.weight", torch.inf), NonFiniteError, r"router\.gate\.fc\.weight"),
}


@pytest.mark.parametrize(("change", "error", "message"), PAIRS.values(), ids=PAIRS.keys())
def test_other_pairs_are_refused(
    llama: Bench, layout: GatedLayout, change: Change, error: type[AdapterError], message: str
) -> None:
    edit(layout.folder, change)
    with pytest.raises(error, match=message):
        llama.lower(layout.folder)


@pytest.mark.parametrize(("change", "error", "message"), GATES.values(), ids=GATES.keys())
def test_other_networks_are_refused(
    llama: Bench, layout: GatedLayout, change: Change, error: type[AdapterError], message: str
) -> None:
    edit_tensors(layout.folder / "gate.safetensors", change)
    with pytest.raises(error, match=message):
        llama.lower(layout.folder)


def test_a_folder_without_the_gates_file_is_refused(llama: Bench, layout: GatedLayout) -> None:
    (layout.folder / "gate.safetensors").unlink()
    with pytest.raises(MissingTensorError, match="the folder has no sasrec"):
        llama.lower(layout.folder)
