"""What S²FT selects, and that nothing else gets a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from motet.adapters.recipes.run import Base
from motet.adapters.recipes.s2ft import S2ftLinear, start
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.source import read
from tests.support.bases import base_of

IDS = torch.tensor([[5, 17, 4, 101, 33, 9, 250, 7]])


def begun(base: Base, *targets: str, rank: int = 2, seed: int = 0) -> Trainee:
    torch.manual_seed(seed)
    return start(Setup(base.model, RECIPES["s2ft"], rank, 1, targets, "x", list))


def layers(trainee: Trainee) -> dict[str, S2ftLinear]:
    return {path: layer for path, layer in trainee.model.named_modules() if isinstance(layer, S2ftLinear)}


@pytest.mark.parametrize("target", ["down_proj", "up_proj", "o_proj", "v_proj"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_as_many_parameters_as_lora_of_the_rank(base: Callable[[], Base], target: str, rank: int) -> None:
    """Up to one channel, or one head, of the whole model."""
    own = base()
    linears = [module for path, module in own.model.named_modules() if path.endswith(target)]
    lora = sum(rank * (linear.in_features + linear.out_features) for linear in linears)
    found = layers(begun(own, target, rank=rank))
    sizes = {layer.delta.shape[0 if layer.by_column else 1] for layer in found.values()}
    block = own.model.config.head_dim if target in ("o_proj", "v_proj") else 1
    assert abs(sum(layer.delta.numel() for layer in found.values()) - lora) <= max(lora * 0.01, block * max(sizes))


def test_heads_are_selected_whole(base: Callable[[], Base]) -> None:
    width = base().model.config.head_dim
    for layer in layers(begun(base(), "o_proj", "v_proj", rank=4)).values():
        heads = layer.index_S.view(-1, width)
        assert torch.equal(heads - heads[:, :1], torch.arange(width).expand_as(heads))
        assert bool((heads[:, 0] % width == 0).all())


def test_the_selection_is_the_seeds(base: Callable[[], Base]) -> None:
    def selected(seed: int) -> list[Any]:
        return [(path, layer.index_S.tolist()) for path, layer in layers(begun(base(), "down_proj", seed=seed)).items()]

    assert selected(0) == selected(0) != selected(1)
    numbers = {len(index) for seed in range(6) for _, index in selected(seed)}
    assert len(numbers) > 1, "layers get as many as chance gives them"


def test_nothing_else_gets_a_gradient(base: Callable[[], Base]) -> None:
    trainee = begun(base(), "down_proj", "v_proj")
    trainee.model(IDS).logits.sum().backward()
    deltas = {id(layer.delta) for layer in layers(trainee).values()}
    with_gradient = {id(parameter) for parameter in trainee.model.parameters() if parameter.grad is not None}
    assert with_gradient == deltas == {id(parameter) for parameter in trainee.trainable.values()}


def test_the_importer_takes_the_folder(base: Callable[[], Base], tmp_path: Any) -> None:
    from motet.adapters.methods import lower

    trainee = begun(base(), "down_proj", "v_proj")
    with torch.no_grad():
        for parameter in trainee.trainable.values():
            parameter.normal_()
    trainee.round_as_saved(torch.bfloat16)
    trainee.save(tmp_path)
    lowered = lower(read(tmp_path), base_of(base().model))
    assert (lowered.method, lowered.form) == ("s2ft", "selection and delta")
    for path, layer in layers(trainee).items():
        effects = lowered.effects[path]
        sparse = effects.columns if layer.by_column else effects.rows
        assert sparse is not None
        assert torch.equal(sparse.index_S, layer.index_S)
        saved = effects.columns.v_OS if effects.columns else effects.rows.v_SI  # type: ignore[union-attr]
        assert torch.equal(saved, layer.delta)
