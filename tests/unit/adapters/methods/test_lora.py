"""Lowering against PEFT's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.base import Kind
from tests.support.bases import linears
from tests.support.models import ALL_LINEARS
from tests.unit.adapters.conftest import Bench, Tensors, edit

Q0 = "model.layers.0.self_attn.q_proj"
Q0_A, Q0_B = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"

# Both sides compute in float32, in another order of operations; weights are of order 1.
ATOL, RTOL = 2e-6, 1e-5

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("lora", {"target_modules": ALL_LINEARS}),
    "rank one": ("lora", {"r": 1, "lora_alpha": 3, "target_modules": ["down_proj"]}),
    "rank above the width": ("lora", {"r": 50, "target_modules": ["k_proj"]}),
    "rsLoRA": ("rslora", {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}),
    "patterns": (
        "lora",
        {
            "target_modules": ALL_LINEARS,
            "rank_pattern": {"(k|o)_proj": 6, "layers.0.self_attn.q_proj": 2, "q_proj": 3},
            "alpha_pattern": {r"layers\.1\..*": 5, "mlp.up_proj": 40},
        },
    ),
    "rsLoRA with patterns": (
        "rslora",
        {
            "target_modules": ["q_proj", "o_proj"],
            "use_rslora": True,
            "rank_pattern": {"o_proj": 9},
            "alpha_pattern": {"o_proj": 2},
        },
    ),
    "expression": ("lora", {"target_modules": r".*layers\.1\.mlp\.(up|gate)_proj"}),
    "layers": ("lora", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "exclusion": ("lora", {"target_modules": ["v_proj", "q_proj"], "exclude_modules": r".*layers\.0.*q_proj"}),
    "all-linear": ("lora", {"target_modules": "all-linear"}),
    "negative alpha": ("lora", {"lora_alpha": -4, "target_modules": ["q_proj"]}),
    "DoRA": ("dora", {"target_modules": ALL_LINEARS, "use_dora": True}),
    "DoRA with rsLoRA": (
        "rslora+dora",
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 7},
        },
    ),
}
BIASED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_bias": ("lora", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "lora_alpha": 6}),
    "lora_bias with rsLoRA": ("rslora", {"target_modules": ["k_proj"], "lora_bias": True, "use_rslora": True}),
    "bias lora_only": ("lora", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "bias all": ("lora", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias all and lora_bias": ("lora", {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True}),
    "DoRA beside a bias": ("dora", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "DoRA with bias all": ("dora", {"target_modules": ["v_proj"], "use_dora": True, "bias": "all"}),
}
CASES = [
    *(pytest.param("llama", *case, id=f"llama, {name}") for name, case in SERVED.items()),
    *(pytest.param("qwen2", *case, id=f"qwen2, {name}") for name, case in BIASED.items()),
]


@pytest.mark.parametrize(("family", "method", "options"), CASES)
def test_effects_are_what_peft_merges(
    family: str, method: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bench: Bench = request.getfixturevalue(family)
    folder = bench.save(tmp_path / "adapter", **options)
    lowered, merged = bench.lower(folder), bench.merged(folder)
    assert (lowered.method, lowered.form, lowered.exact) == (method, "PEFT folder", True)
    changed = 0
    for name, target in bench.base.targets.items():
        effects, linear = lowered.effects.get(name), merged.get_submodule(name)
        merged_OI = linear.weight.T if target.kind is Kind.EMBEDDING else linear.weight
        weight_OI = bench.base.weight(name)
        bias_O = bench.base.bias(name) if target.has_bias else torch.zeros(target.out_width)
        if effects is None:
            assert torch.equal(merged_OI, weight_OI), f"{name} has no effects, but PEFT changes it"
        else:
            changed += 1
            if effects.low_rank:
                weight_OI = weight_OI + effects.low_rank.b_OR @ effects.low_rank.a_RI
            if effects.scale:
                weight_OI = (1 + effects.scale.delta_O)[:, None] * weight_OI
            if effects.bias:
                bias_O = bias_O + effects.bias.bias_O
            torch.testing.assert_close(weight_OI, merged_OI, atol=ATOL, rtol=RTOL)
        if target.has_bias:
            torch.testing.assert_close(bias_O, linear.bias, atol=ATOL, rtol=RTOL)
        else:
            assert not bias_O.any()
    assert changed == len(lowered.effects) > 0


@pytest.mark.parametrize("use_rslora", [False, True])
def test_product_is_pefts_delta_weight(llama: Bench, tmp_path: Path, use_rslora: bool) -> None:
    """Not only their sum with W: there, a small error of a small change would not show."""
    folder = llama.save(
        tmp_path / "adapter", r=3, target_modules=ALL_LINEARS, use_rslora=use_rslora, rank_pattern={"q_proj": 5}
    )
    lowered, peft_model = llama.lower(folder), llama.peft(folder)
    assert lowered.effects.keys() == linears(llama.base)
    assert lowered.expected_targets == len(linears(llama.base))
    assert lowered.scaling == ("alpha/sqrt(r)" if use_rslora else "alpha/r")
    for name, effects in lowered.effects.items():
        assert effects.low_rank is not None
        assert effects.low_rank.rank == (5 if name.endswith("q_proj") else 3)
        expected_OI = peft_model.base_model.model.get_submodule(name).get_delta_weight("default")
        found_OI = effects.low_rank.b_OR @ effects.low_rank.a_RI
        torch.testing.assert_close(found_OI, expected_OI, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_dtypes_are_lowered_in_float32(llama: Bench, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"])

    def cast(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit(folder, cast)
    low_rank = llama.lower(folder).effects[Q0].low_rank
    assert low_rank is not None
    assert low_rank.a_RI.dtype == low_rank.b_OR.dtype == torch.float32
