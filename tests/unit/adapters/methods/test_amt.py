"""A pool is one gated pair a target: every mixture of it is W_res + Σ α_p B_p A_p on the untouched base."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters import lowered_file
from motet.adapters.dense import merge
from motet.adapters.effects import Lowered, LowRank, TargetEffects
from tests.support.layouts_amt import PoolLayout, amt
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench, Tensors, edit, edit_tensors

MEMBERS, RANK = 4, 3
Q0 = "model.layers.0.self_attn.q_proj"
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
MIXTURES: dict[str, list[float]] = {
    "the first alone": [1, 0, 0, 0],
    "the last alone": [0, 0, 0, 1],
    "two": [0.25, 0, 0.75, 0],
    "all alike": [0.25, 0.25, 0.25, 0.25],
    "all": [0.125, 0.5, 0.0625, 0.3125],
}


def pool(llama: Bench, tmp_path: Path, **options: Any) -> PoolLayout:
    return amt(**options)(llama.model, tmp_path / "pool", 1)


def gated(lowered: Lowered, target: str, alpha: Sequence[float]) -> LowRank:
    """The target's pair with the request's gate in B."""
    low_rank, gate = lowered.effects[target].low_rank, lowered.gate
    assert low_rank is not None
    assert gate is not None
    g_R = torch.tensor(alpha, dtype=torch.float32)[gate.groups[target]]
    return LowRank(low_rank.a_RI, low_rank.b_OR * g_R)


def delta(lowered: Lowered, target: str, alpha: Sequence[float]) -> torch.Tensor:
    """B (g ⊙ A) [O, I] float64."""
    pair = gated(lowered, target, alpha)
    return pair.b_OR.double() @ pair.a_RI.double()


@torch.no_grad()
def merged(llama: Bench, lowered: Lowered, alpha: Sequence[float]) -> Any:
    model = copy.deepcopy(llama.model)
    for target in lowered.effects:
        linear = model.get_submodule(target)
        linear.weight.copy_(merge(TargetEffects(gated(lowered, target, alpha)), linear.weight, None)[0])
    return model


def test_the_folder_is_recognised(llama: Bench, tmp_path: Path) -> None:
    lowered = llama.lower(pool(llama, tmp_path, scale_cls=9.5, bias_cls=0, strengths=[0, 2, 4, 8]).folder)
    assert (lowered.method, lowered.form) == ("amt", "pool of 4 members, centred on their start")
    assert (lowered.scaling, lowered.exact) == ("alpha/r", True)
    assert lowered.expected_targets == len(lowered.effects) == 7 * llama.model.config.num_hidden_layers
    gate = lowered.gate
    assert gate is not None
    assert (gate.kind, gate.size, dict(gate.tensors)) == ("pool", MEMBERS, {})
    assert gate.facts == {
        "members": 4,
        "strengths": [0.0, 2.0, 4.0, 8.0],
        "scale_cls": 9.5,
        "bias_cls": 0.0,
        "needs_sum_one": True,
    }
    assert gate.groups.keys() == lowered.effects.keys()
    for target, effects in lowered.effects.items():
        assert effects.low_rank is not None
        assert effects.low_rank.rank == 2 * MEMBERS * RANK == len(gate.groups[target])
        assert gate.groups[target].dtype == torch.int64
        for factor in (effects.low_rank.a_RI, effects.low_rank.b_OR):
            assert factor.is_contiguous()
            assert factor.dtype == torch.float32


def test_what_a_folder_does_not_say_is_not_made_up(llama: Bench, tmp_path: Path) -> None:
    gate = llama.lower(pool(llama, tmp_path).folder).gate
    assert gate is not None
    assert [gate.facts[name] for name in ("strengths", "scale_cls", "bias_cls")] == [None, None, None]


@pytest.mark.parametrize("options", [{}, {"r": 2, "lora_alpha": 5.0}], ids=["s = 1", "s = 2.5"])
@pytest.mark.parametrize("alpha", MIXTURES.values(), ids=MIXTURES.keys())
def test_every_mixture_is_the_trained_model_of_it(
    llama: Bench, tmp_path: Path, alpha: list[float], options: dict[str, float]
) -> None:
    layout = pool(llama, tmp_path, **options)
    lowered = llama.lower(layout.folder)
    for target in lowered.effects:
        expected_OI = layout.delta(target, alpha)
        TOLERANCES["lowered", torch.float32].assert_close(
            delta(lowered, target, alpha), expected_OI, expected_OI.abs().max()
        )


@torch.no_grad()
def test_logits_of_mixtures(llama: Bench, tmp_path: Path) -> None:
    layout = pool(llama, tmp_path)
    lowered = llama.lower(layout.folder)
    logits = []
    for alpha in MIXTURES.values():
        expected = layout.oracle(alpha)(input_ids=PROMPT).logits
        TOLERANCES["logits", torch.float32].assert_close(
            merged(llama, lowered, alpha)(input_ids=PROMPT).logits, expected
        )
        logits.append(expected)
    assert all((one - other).abs().max() > 0.01 for i, one in enumerate(logits) for other in logits[:i])


def test_an_untrained_pool_is_the_base_exactly(llama: Bench, tmp_path: Path) -> None:
    """Members that did not move from their start change nothing, not even a rounding error."""

    def stay(tensors: Tensors) -> None:
        for name in tensors:
            letter_and_label = name.removesuffix(".weight").rpartition(".")
            tensors[name] = tensors[f"{letter_and_label[0]}.initial.weight"].clone()

    lowered = llama.lower(edit(pool(llama, tmp_path).folder, stay))
    for target in lowered.effects:
        assert not delta(lowered, target, MIXTURES["all"]).any(), target


def test_operands_in_bfloat16_keep_the_change(llama: Bench, tmp_path: Path) -> None:
    """Stacked with -B_0 A_0 at the end, rounding would be of the size of what was taken out, not of the change."""
    layout, alpha = pool(llama, tmp_path), MIXTURES["two"]
    lowered = llama.lower(layout.folder)

    def error(a_RI: torch.Tensor, b_OR: torch.Tensor, expected_OI: torch.Tensor) -> float:
        found_OI = b_OR.bfloat16().double() @ a_RI.bfloat16().double()
        return float(torch.linalg.vector_norm(found_OI - expected_OI) / torch.linalg.vector_norm(expected_OI))

    for target in lowered.effects:
        pair, expected_OI = gated(lowered, target, alpha), layout.delta(target, alpha)
        every = [*layout.members[target], layout.starts[target]]
        stacked_RI = torch.cat([a_RI for a_RI, _ in every])
        stacked_OR = torch.cat([w * b_OR for w, (_, b_OR) in zip([*alpha, -1.0], every, strict=True)], 1)
        centred = error(pair.a_RI, pair.b_OR, expected_OI)
        assert centred < 2**-8, target
        assert error(stacked_RI, stacked_OR, expected_OI) > 2 * centred, target


@pytest.mark.parametrize("alpha", [*MIXTURES.values(), [0, 0, 0, 0], [1, 1, 0.5, 0]])
def test_a_pool_without_a_start_is_a_sum_of_changes(llama: Bench, tmp_path: Path, alpha: list[float]) -> None:
    layout = pool(llama, tmp_path, started=False, lora_alpha=6)
    lowered = llama.lower(layout.folder)
    assert lowered.gate is not None
    assert (lowered.form, lowered.gate.facts["needs_sum_one"]) == ("pool of 4 members", False)
    for target in lowered.effects:
        assert gated(lowered, target, alpha).rank == MEMBERS * RANK
        largest = layout.delta(target, [1, 1, 1, 1]).abs().max()
        TOLERANCES["lowered", torch.float32].assert_close(
            delta(lowered, target, alpha), layout.delta(target, alpha), largest
        )


def test_one_member_is_a_pool_too(llama: Bench, tmp_path: Path) -> None:
    layout = pool(llama, tmp_path, members=1, targets=["v_proj"])
    lowered = llama.lower(layout.folder)
    assert lowered.expected_targets == len(lowered.effects) == 2
    for target in lowered.effects:
        expected_OI = layout.delta(target, [1])
        TOLERANCES["lowered", torch.float32].assert_close(
            delta(lowered, target, [1]), expected_OI, expected_OI.abs().max()
        )


def test_members_in_bfloat16_are_read(llama: Bench, tmp_path: Path) -> None:
    """A folder saved with fewer digits: its start is still that of this base."""
    layout = pool(llama, tmp_path)
    edit_tensors(
        layout.folder / "adapter_model.safetensors",
        lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}),
    )
    lowered = llama.lower(layout.folder)
    rounded = dataclasses.replace(
        layout,
        starts={name: (a.bfloat16().float(), b.bfloat16().float()) for name, (a, b) in layout.starts.items()},
        members={
            name: [(a.bfloat16().float(), b.bfloat16().float()) for a, b in pairs]
            for name, pairs in layout.members.items()
        },
    )
    expected_OI = rounded.delta(Q0, MIXTURES["all"])
    TOLERANCES["lowered", torch.float32].assert_close(
        delta(lowered, Q0, MIXTURES["all"]), expected_OI, expected_OI.abs().max()
    )


def test_a_lowered_pool_is_kept_as_it_is(llama: Bench, tmp_path: Path) -> None:
    lowered = llama.lower(pool(llama, tmp_path, scale_cls=10.0, strengths=[0, 1, 2, 3]).folder)
    again = lowered_file.parse(lowered_file.dump(lowered))
    assert lowered.gate is not None
    assert again.gate is not None
    assert again.gate.facts == lowered.gate.facts
    for target in lowered.effects:
        assert torch.equal(again.gate.groups[target], lowered.gate.groups[target])
        assert torch.equal(delta(again, target, MIXTURES["all"]), delta(lowered, target, MIXTURES["all"]))
