"""For each user iLoRA changes the base by the sum of its experts, weighed by the gate's factors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.effects import Lowered
from motet.adapters.errors import GateError
from motet.adapters.gates.instance import InstanceGate, UserInput
from motet.adapters.spec import Declared
from tests.support.layouts_ilora import GatedLayout, ilora
from tests.support.models import ALL_LINEARS
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench, edit_tensors, product
from tests.unit.adapters.methods.changes import put

Q_PROJ = "model.layers.0.self_attn.q_proj"
HISTORIES = [[5], [36, 0], list(range(10)), [7, 7, 7]]


@pytest.fixture
def layout(llama: Bench, tmp_path: Path) -> GatedLayout:
    return ilora(llama.model, tmp_path / "adapter")


def gated_product(lowered: Lowered, target: str, factors_G: torch.Tensor) -> torch.Tensor:
    """B diag(g) A [O, I] float64, as a request with these factors is served."""
    assert lowered.gate is not None
    low_rank = lowered.effects[target].low_rank
    assert low_rank is not None
    g_R = factors_G.double()[lowered.gate.groups[target]]
    return (low_rank.b_OR.double() * g_R) @ low_rank.a_RI.double()


def assert_same_change(actual_OI: torch.Tensor, expected_OI: torch.Tensor) -> None:
    largest = expected_OI.abs().max().expand_as(expected_OI)
    TOLERANCES["lowered", torch.float32].assert_close(actual_OI, expected_OI, magnitude=largest)


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 12, "experts": 3, "alpha": 5.5}, {"rank": 4, "linears": ["v_proj", "down_proj"]}, {"experts": 8}],
    ids=str,
)
def test_each_user_has_the_sum_of_the_experts(llama: Bench, tmp_path: Path, options: dict[str, Any]) -> None:
    layout = ilora(llama.model, tmp_path / "adapter", **options)
    lowered = llama.lower(layout.folder)
    assert lowered.effects.keys() == layout.pairs.keys()
    assert lowered.expected_targets == 2 * len(options.get("linears", ALL_LINEARS))
    assert lowered.gate is not None
    for factors_K in InstanceGate(lowered.gate).factors([UserInput(history=history) for history in HISTORIES]):
        for target in lowered.effects:
            change_OI = layout.change(target, factors_K.tolist())
            assert_same_change(gated_product(lowered, target, factors_K), change_OI)


def test_factors_are_those_of_the_saved_networks(llama: Bench, layout: GatedLayout) -> None:
    gate = llama.lower(layout.folder).gate
    assert gate is not None
    actual_NK = InstanceGate(gate).factors([UserInput(history=history) for history in HISTORIES])
    expected_NK = torch.stack([layout.networks.weights(history) for history in HISTORIES])
    TOLERANCES["gate factors", torch.float32].assert_close(actual_NK, expected_NK)


def test_one_hot_factors_select_a_slice(llama: Bench, layout: GatedLayout) -> None:
    lowered = llama.lower(layout.folder)
    a_RI, b_OR = layout.pairs[Q_PROJ]
    for expert, factors_K in enumerate(torch.eye(4)):
        rows = slice(2 * expert, 2 * expert + 2)
        expected_OI = 16 * b_OR[:, rows].double() @ a_RI[rows].double()
        assert_same_change(gated_product(lowered, Q_PROJ, factors_K), expected_OI)


def test_the_scale_is_that_of_an_expert(llama: Bench, layout: GatedLayout) -> None:
    """Rank 8 and alpha 32 in 4 experts: 32 / (8 / 4) = 16, not 4; equal factors are plain LoRA of scale 4."""
    lowered = llama.lower(layout.folder)
    a_RI, b_OR = (factor.double() for factor in layout.pairs[Q_PROJ])
    assert_same_change(product(lowered, Q_PROJ), 16 * b_OR @ a_RI)
    assert_same_change(gated_product(lowered, Q_PROJ, torch.full((4,), 0.25)), 4 * b_OR @ a_RI)
    assert (lowered.method, lowered.scaling, lowered.exact) == ("ilora", "alpha/(r/K)", True)


def test_one_expert_is_lora(llama: Bench, tmp_path: Path) -> None:
    layout = ilora(llama.model, tmp_path / "adapter", experts=1, alpha=6)
    lowered = llama.lower(layout.folder)
    plain = shutil.copytree(layout.folder, tmp_path / "plain")
    (plain / "gate.safetensors").unlink()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 6, "target_modules": ALL_LINEARS}
    (plain / "adapter_config.json").write_text(json.dumps(config))
    lora = llama.lower(plain, Declared(trained_on_base=True))
    assert lowered.gate is not None
    (factors_K,) = InstanceGate(lowered.gate).factors([UserInput(history=[1])])
    assert factors_K.tolist() == [1.0]
    for target in lora.effects:
        assert_same_change(gated_product(lowered, target, factors_K), product(lora, target))


def test_the_dense_oracle_is_the_base_plus_the_change(llama: Bench, layout: GatedLayout) -> None:
    """What later tests of requests are compared with, checked against what is lowered."""
    lowered = llama.lower(layout.folder)
    weights = [0.7, 0.1, 0.2, 0.0]
    tokens = torch.tensor([[3, 9, 27, 81, 5]])
    merged = layout.oracle([0.0] * 4)
    with torch.no_grad():
        assert torch.equal(merged(tokens).logits, llama.model(tokens).logits)
        for target in lowered.effects:
            merged.get_submodule(target).weight += gated_product(lowered, target, torch.tensor(weights))
        expected = layout.oracle(weights)(tokens).logits
        TOLERANCES["logits", torch.float32].assert_close(merged(tokens).logits, expected)
        assert (layout.oracle(weights[::-1])(tokens).logits - expected).abs().max() > 0.01


def test_groups_and_facts(llama: Bench, layout: GatedLayout) -> None:
    gate = llama.lower(layout.folder).gate
    assert gate is not None
    assert (gate.kind, gate.size, gate.groups.keys()) == ("router", 4, layout.pairs.keys())
    assert {tuple(group_R.tolist()) for group_R in gate.groups.values()} == {(0, 0, 1, 1, 2, 2, 3, 3)}
    assert {group_R.dtype for group_R in gate.groups.values()} == {torch.int64}
    assert gate.facts == {
        "history_length": 10,
        "items": 37,
        "placeholders": {"history": "[HistoryEmb]", "candidates": "[CansEmb]"},
        "width": 48,
    }
    saved = load_file(layout.folder / "gate.safetensors")
    assert gate.tensors.keys() == saved.keys()
    assert all(torch.equal(gate.tensors[name], tensor) for name, tensor in saved.items())


def test_stored_halves_become_float32(llama: Bench, layout: GatedLayout) -> None:
    edit_tensors(layout.folder / "gate.safetensors", lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    gate = llama.lower(layout.folder).gate
    assert gate is not None
    assert {tensor.dtype for tensor in gate.tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "iLoRA folder, stored batch-norm statistics"),
        ({"statistics": False}, "iLoRA folder, batch-norm statistics 0 and 1"),
        ({"projector": False}, "iLoRA folder, stored batch-norm statistics, no projector"),
    ],
    ids=str,
)
def test_what_official_checkpoints_lack(llama: Bench, tmp_path: Path, options: dict[str, Any], form: str) -> None:
    layout = ilora(llama.model, tmp_path / "adapter", **options)
    lowered = llama.lower(layout.folder)
    assert lowered.form == form
    assert lowered.gate is not None
    gate = InstanceGate(lowered.gate)
    factors_NK = gate.factors([UserInput(history=history) for history in HISTORIES])
    expected_NK = torch.stack([layout.networks.weights(history) for history in HISTORIES])
    TOLERANCES["gate factors", torch.float32].assert_close(factors_NK, expected_NK)
    if options.get("projector", True):
        assert gate.item_rows([0]).shape == (1, 48)
    else:
        with pytest.raises(GateError, match="no projector"):
            gate.item_rows([0])


def test_counters_of_batch_norm_mean_nothing(llama: Bench, layout: GatedLayout) -> None:
    edit_tensors(layout.folder / "gate.safetensors", put("router.bn1.num_batches_tracked", torch.tensor(7)))
    gate = llama.lower(layout.folder).gate
    assert gate is not None
    assert "router.bn1.num_batches_tracked" not in gate.tensors
