"""Channels go back to the base's places, a faded router changes nothing, and the order decides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.dense import merge
from motet.adapters.effects import Lowered
from motet.adapters.source import read
from tests.support.layouts_emtal import FEED_FORWARD, Adjusted, cluster, emtal
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench, Tensors, edit, product

MLP = "base_model.model.model.layers.0.mlp"
SELF = "base_model.model.model.layers.0.self_attn"
WIDTH, HIDDEN, EXPERTS, RANK = 72, 48, 8, 4
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def saved(llama: Bench, tmp_path: Path, **options: Any) -> Path:
    return emtal(**options)(llama.model, tmp_path / "adapter", 1).folder


@torch.no_grad()
def merged(llama: Bench, lowered: Lowered) -> Any:
    """The untouched base with every change added to its weights."""
    model = copy.deepcopy(llama.model)
    for name, effects in lowered.effects.items():
        linear = model.get_submodule(name)
        linear.weight.copy_(merge(effects, linear.weight, None)[0])
    return model


def test_the_folder_is_recognised(llama: Bench, tmp_path: Path) -> None:
    lowered = llama.lower(saved(llama, tmp_path))
    assert (lowered.method, lowered.form, lowered.scaling, lowered.exact) == ("emtal", "router faded", "none", True)
    assert lowered.expected_targets == len(lowered.effects) == 7 * llama.model.config.num_hidden_layers
    for effects in lowered.effects.values():
        assert effects.low_rank is not None
        assert effects.low_rank.rank == RANK
        assert effects.low_rank.a_RI.is_contiguous()
        assert effects.low_rank.b_OR.is_contiguous()


@torch.no_grad()
def test_the_fold_is_the_sum_over_experts_of_the_clustered_model(llama: Bench, tmp_path: Path) -> None:
    """Each expert owns the channels of one cluster; with a faded router all of them count alike."""
    layout = emtal(FEED_FORWARD)(llama.model, tmp_path / "adapter", 1)
    folded = merged(llama, llama.lower(layout.folder)).model.layers[1].mlp
    feed = layout.oracle.model.layers[1].mlp
    x_TI = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    expected_TI = torch.zeros_like(x_TI)
    for expert, rows in enumerate(torch.arange(WIDTH).chunk(EXPERTS)):
        gate_TC, up_TC = (part(x_TI)[:, rows] for part in (feed.gate, feed.up))
        scale_T1 = feed.scales(x_TI)[:, expert, None]
        assert scale_T1.unique().tolist() == [1.0]
        h_TC = feed.act(scale_T1 * gate_TC) * up_TC
        expected_TI += h_TC @ (feed.down.linear.weight[:, rows].T + feed.down.a_IR[rows] @ feed.down.b_RO)
    TOLERANCES["dense merge", torch.float32].assert_close(folded(x_TI), expected_TI, magnitude=expected_TI.abs().max())


@torch.no_grad()
def test_the_router_matters_until_it_has_faded(llama: Bench, tmp_path: Path) -> None:
    """What is refused below 1 would have been another model."""
    layout = emtal()(llama.model, tmp_path / "adapter", 1)
    faded = layout.oracle(input_ids=PROMPT).logits
    for block in layout.oracle.model.layers:
        block.mlp.fading = 0.9
    assert (layout.oracle(input_ids=PROMPT).logits - faded).abs().max() > 0.01


@torch.no_grad()
def test_reordered_channels_alone_are_the_base(llama: Bench) -> None:
    model = copy.deepcopy(llama.model)
    for block in model.model.layers:
        cluster(block.mlp, torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1)))
    expected = llama.model(input_ids=PROMPT).logits
    TOLERANCES["logits", torch.float32].assert_close(model(input_ids=PROMPT).logits, expected)


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda order_F: torch.arange(len(order_F)),
    "its inverse": torch.argsort,
}


@pytest.mark.parametrize("other", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("linears", [("gate_proj", "up_proj"), ("down_proj",)], ids=["rows", "columns"])
@torch.no_grad()
def test_another_order_is_another_model(
    llama: Bench, tmp_path: Path, linears: tuple[str, ...], other: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Taking the pairs as they are stored, or moving them the wrong way, would be silently wrong."""

    def reorder(tensors: Tensors) -> None:
        tensors.update({name: other(tensors[name]) for name in tensors if name.endswith(".order")})

    layout = emtal(linears)(llama.model, tmp_path / "adapter", 1)
    expected = layout.oracle(input_ids=PROMPT).logits
    found = merged(llama, llama.lower(layout.folder))(input_ids=PROMPT).logits
    TOLERANCES["logits", torch.float32].assert_close(found, expected)
    wrong = merged(llama, llama.lower(edit(layout.folder, reorder)))(input_ids=PROMPT).logits
    assert (wrong - expected).abs().max() > 0.01


def test_an_order_without_pairs_and_a_router_without_them_change_nothing(llama: Bench, tmp_path: Path) -> None:
    folder = saved(llama, tmp_path, linears=("v_proj",))
    before = llama.lower(folder)
    order = torch.randperm(WIDTH)
    edit(folder, lambda t: t.update({f"{MLP}.order": order, f"{MLP}.gate_weight_lora.weight": torch.ones(8, 48)}))
    after = llama.lower(folder)
    assert after.effects.keys() == before.effects.keys()
    assert all(torch.equal(product(after, name), product(before, name)) for name in after.effects)


def test_half_precision_is_taken_as_it_is(llama: Bench, tmp_path: Path) -> None:
    folder = saved(llama, tmp_path)

    def halve(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.bfloat16()

    edit(folder, halve)
    low_rank = llama.lower(folder).effects["model.layers.0.self_attn.q_proj"].low_rank
    assert low_rank is not None
    assert low_rank.a_RI.dtype == torch.float32
    assert torch.equal(low_rank.a_RI, read(folder).tensors[f"{SELF}.lora_q_proj_a"].float().T)


def test_settings_that_mean_nothing_here_are_allowed(llama: Bench, tmp_path: Path) -> None:
    folder = edit(
        saved(llama, tmp_path), config={"base_model_name_or_path": None, "inference_mode": True, "fading": 1.0}
    )
    assert llama.lower(folder).effects


def test_the_oracle_computes_with_the_pair(llama: Bench) -> None:
    linear = llama.model.model.layers[0].mlp.up_proj
    x_TI, a_IR, b_RO = torch.ones(1, HIDDEN), torch.ones(HIDDEN, 1), torch.arange(72.0)[None]
    torch.testing.assert_close(Adjusted(linear, a_IR, b_RO)(x_TI), linear(x_TI) + HIDDEN * torch.arange(72.0))
