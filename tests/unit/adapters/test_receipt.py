"""The receipt's numbers are those of the dense matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters import signs
from motet.adapters.effects import ColumnSparse, RowSparse, SignDelta, TargetEffects
from motet.adapters.lowering import Lowering
from motet.adapters.receipt import receipt, relative_norm
from motet.adapters.version import Digest
from tests.support.bases import residency_of
from tests.support.models import ALL_LINEARS
from tests.unit.adapters.conftest import Bench, edit


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "r": 1}], ids=str)
def test_relative_norms_are_those_of_what_peft_merges(llama: Bench, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=ALL_LINEARS, **options)
    lowered, merged = llama.lower(folder), llama.merged(folder)
    for name, effects in lowered.effects.items():
        weight_OI = llama.base.weight(name)
        change = torch.linalg.vector_norm(merged.get_submodule(name).weight - weight_OI).item()
        expected = change / torch.linalg.vector_norm(weight_OI).item()
        assert relative_norm(effects, name, llama.base) == pytest.approx(expected, rel=1e-4)
        assert expected > 0.01


def test_biases_do_not_count(qwen2: Bench, tmp_path: Path) -> None:
    folder = qwen2.save(tmp_path / "adapter", target_modules=["q_proj"], bias="all")
    lowered = qwen2.lower(folder)
    only_bias = lowered.effects["model.layers.0.self_attn.k_proj"]
    assert only_bias.low_rank is None
    assert only_bias.bias is not None
    assert relative_norm(only_bias, "model.layers.0.self_attn.k_proj", qwen2.base) == 0


def test_sparse_changes_count(llama: Bench) -> None:
    name = "model.layers.0.self_attn.q_proj"
    width = llama.base.targets[name].in_width
    columns = ColumnSparse(torch.tensor([0, 7]), torch.ones(width, 2))
    rows = RowSparse(torch.tensor([1]), torch.full((1, width), 2.0))
    change = torch.zeros(width, width)
    change[:, [0, 7]] += 1
    change[1] += 2
    expected = float(change.norm() / llama.base.weight(name).norm())
    found = relative_norm(TargetEffects(columns=columns, rows=rows), name, llama.base)
    assert found == pytest.approx(expected, rel=1e-4)


def test_signs_count(llama: Bench) -> None:
    name = "model.layers.0.mlp.down_proj"
    change = torch.randn(48, 72)
    alpha = change.abs().mean()
    effects = TargetEffects(sign=SignDelta(signs.pack(change), alpha.reshape(1)))
    expected = float(alpha * (48 * 72) ** 0.5 / llama.base.weight(name).norm())
    assert relative_norm(effects, name, llama.base) == pytest.approx(expected, rel=1e-4)


def test_a_product_of_zero_has_norm_zero(llama: Bench, tmp_path: Path) -> None:
    folder = llama.save(tmp_path / "adapter", target_modules=["q_proj"], use_dora=False)

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    lowered = llama.lower(edit(folder, zero))
    assert {relative_norm(effects, name, llama.base) for name, effects in lowered.effects.items()} == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_facts(llama: Bench, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = llama.save(
        tmp_path / "adapter", r=3, use_dora=True, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 5}
    )
    lowered = llama.lower(folder)
    facts = receipt(Lowering(Digest("d"), lowered), llama.base, residency_of(llama.base, dtype=dtype).bytes_needed)
    assert (facts.method, facts.form, facts.scaling, facts.exact) == ("dora", "PEFT folder", "alpha/r", True)
    assert facts.ranks == (3, 5)
    assert (facts.targets_matched, facts.targets_expected) == (4, 4)
    assert facts.relative_norms.keys() == lowered.effects.keys()
    # Two layers: A and B of q (48 to 48) and of down (72 to 48), and DoRA's factor for each output.
    elements = 2 * (5 * (48 + 48) + 48 + 3 * (72 + 48) + 48)
    assert facts.resident_bytes == elements * dtype.itemsize
