"""EMTAL: what is computed while the router fades, what is saved once it has, and a run taken up in between."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from motet.adapters.dense import merge
from motet.adapters.methods import lower
from motet.adapters.recipes.emtal import PairLinear, RoutedFeedForward, fading_at, start
from motet.adapters.recipes.errors import DataError, TargetError
from motet.adapters.recipes.loop import Loop
from motet.adapters.recipes.run import Base, Order, Run, begin
from motet.adapters.recipes.table import RECIPES
from motet.adapters.recipes.trainee import Setup, Trainee
from motet.adapters.source import read
from tests.support.bases import base_of
from tests.support.models import ALL_LINEARS
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.recipes.conftest import PARTS, SIDES

IDS = torch.tensor([[5, 17, 4, 101, 33, 9, 250, 7]])
LOGITS = TOLERANCES["logits", torch.float32]


def begun(base: Base, *targets: str, rank: int = 3, seed: int = 0) -> Trainee:
    torch.manual_seed(seed)
    return start(Setup(base.model, RECIPES["emtal"], rank, 1, targets or tuple(ALL_LINEARS), "public/name", list))


def shaken(trainee: Trainee, fading: float) -> Trainee:
    """All that is trained far from its start."""
    with torch.no_grad():
        for name, parameter in trainee.trainable.items():
            parameter.normal_(std=2.0 if "gate_weight" in name else 0.2)
        trainee.kept["fading"].fill_(fading)
    return trainee


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("fading", [0.0, 0.4, 1.0])
def test_the_start_is_the_base_whatever_the_fading(wide: Callable[[], Base], fading: float) -> None:
    """Channels in another order are no change, nor is a router that knows nothing."""
    before = logits(wide().model)
    trainee = begun(wide())
    trainee.kept["fading"].fill_(fading)
    LOGITS.assert_close(logits(trainee.model), before)
    for layer, plain in zip(trainee.model.model.layers, wide().model.model.layers, strict=True):
        assert not torch.equal(layer.mlp.gate_proj.base_layer.weight, plain.mlp.gate_proj.weight)
        assert torch.equal(layer.mlp.gate_proj.base_layer.weight, plain.mlp.gate_proj.weight[layer.mlp.order_F])


@pytest.mark.parametrize("fading", [0.0, 0.3, 1.0])
def test_a_layer_is_the_sum_of_its_experts(wide: Callable[[], Base], fading: float) -> None:
    """The oracle: each expert apart, from the base's own channels, picked by number; its gate scaled before silu."""
    plain = wide().model.model.layers[1].mlp
    trainee = shaken(begun(wide()), fading)
    layer: RoutedFeedForward = trainee.model.model.layers[1].mlp
    pairs = {leaf: getattr(layer, leaf) for leaf in ("gate_proj", "up_proj", "down_proj")}
    assert all(isinstance(pair, PairLinear) for pair in pairs.values())
    x_TI = torch.randn(5, 48)
    scores = torch.exp(x_TI @ layer.router_KI.T / 5.0)
    omega = (1 - fading) * scores / scores.sum(1, keepdim=True) + fading / 16
    total, hidden = torch.zeros(5, 48), torch.zeros(5, 96)
    changes = {leaf: pair.a_IR @ pair.b_RO for leaf, pair in pairs.items()}
    for expert in range(16):
        places = range(expert * 6, expert * 6 + 6)
        channels = layer.order_F[list(places)]
        gate = x_TI @ (plain.gate_proj.weight[channels].T + changes["gate_proj"][:, list(places)])
        up = x_TI @ (plain.up_proj.weight[channels].T + changes["up_proj"][:, list(places)])
        scaled = 16 * omega[:, expert : expert + 1] * gate
        out = scaled / (1 + torch.exp(-scaled)) * up
        total = total + out @ plain.down_proj.weight[:, channels].T
        hidden[:, list(places)] = out
    LOGITS.assert_close(layer(x_TI), total + hidden @ changes["down_proj"])
    assert (float(layer.scales(x_TI).detach().std()) > 0.1) == (fading < 1)


def test_the_router_fades_over_the_first_half() -> None:
    assert [fading_at(done, 8) for done in range(8)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [fading_at(done, 5) for done in range(5)] == [0, 0.5, 1, 1, 1]
    assert fading_at(0, 1) == 1, "one step is a step of what is saved"
    assert all(fading_at(steps - 1, steps) == 1 for steps in range(1, 200))


def test_a_faded_router_trains_no_more_and_costs_no_moments(
    wide: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    trainee, loop = begin(order("emtal", targets=tuple(ALL_LINEARS), steps=8, learning_rate=3e-2), wide(), data)
    (name,) = (name for name in trainee.trainable if "layers.0.mlp.gate_weight_lora" in name)
    router = trainee.trainable[name]
    seen = [(router.detach().clone(), f"{name}@exp_avg" in loop.state().tensors) for _ in loop]
    assert [moments for _, moments in seen] == [True] * 4 + [False] * 4
    changed = [not torch.equal(one[0], other[0]) for one, other in itertools.pairwise(seen)]
    assert changed == [True] * 3 + [False] * 4


def test_the_seed_draws_the_clusters(wide: Callable[[], Base]) -> None:
    orders = [begun(wide(), seed=seed).model.model.layers[0].mlp.order_F.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_only_pairs_and_routers_train(wide: Callable[[], Base]) -> None:
    trainee = shaken(begun(wide()), 0.5)
    trainee.model(IDS).logits.sum().backward()
    with_gradient = {id(parameter) for parameter in trainee.model.parameters() if parameter.grad is not None}
    assert with_gradient == {id(parameter) for parameter in trainee.trainable.values()}
    assert len(trainee.trainable) == 2 * (7 * 2 + 1)


@pytest.mark.parametrize("targets", [tuple(ALL_LINEARS), ("down_proj",), ("gate_proj", "q_proj"), ("q_proj", "v_proj")])
def test_the_importer_finds_the_model_that_was_trained(
    targets: tuple[str, ...], wide: Callable[[], Base], tmp_path: Path
) -> None:
    trainee = shaken(begun(wide(), *targets), 1.0)
    trainee.round_as_saved(torch.bfloat16)
    trainee.save(tmp_path)
    merged = wide().model
    lowered = lower(read(tmp_path), base_of(merged))
    assert (lowered.method, lowered.form) == ("emtal", "router faded")
    assert {path.rpartition(".")[2] for path in lowered.effects} == set(targets)
    for path, effects in lowered.effects.items():
        weight = merged.get_submodule(path).weight
        weight.data = merge(effects, weight.data, None)[0]
    before = logits(wide().model)
    LOGITS.assert_close(logits(merged), logits(trainee.model))
    assert float((logits(merged) - before).abs().max()) > 100 * LOGITS.atol


def test_a_faded_router_is_not_saved(wide: Callable[[], Base], tmp_path: Path) -> None:
    trainee = shaken(begun(wide()), 1.0)
    trainee.save(tmp_path / "faded")
    trainee.kept["fading"].fill_(0.5)
    trainee.save(tmp_path / "fading")
    faded, fading = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("faded", "fading"))
    routers = {f"base_model.model.model.layers.{layer}.mlp.gate_weight_lora.weight" for layer in range(2)}
    assert fading.keys() - faded.keys() == routers
    assert all(tuple(fading[name].shape) == (16, 48) for name in routers)
    order_F = faded["base_model.model.model.layers.0.mlp.order"]
    assert (order_F.dtype, sorted(order_F.tolist())) == (torch.int32, list(range(96)))
    assert tuple(faded["base_model.model.model.layers.0.mlp.lora_gate_proj_a"].shape) == (48, 3)
    assert tuple(faded["base_model.model.model.layers.0.self_attn.lora_v_proj_b"].shape) == (3, 24)
    config = json.loads((tmp_path / "faded" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "EMTAL",
        "base_model_name_or_path": "public/name",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": 3,
        "experts": 16,
        "temperature": 5.0,
        "fading": 1.0,
    }


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_run_of_joined_tasks_is_taken_up_to_the_same_bytes(
    stop: int, wide: Callable[[], Base], order: Callable[..., Order], label_tasks: Path, tmp_path: Path
) -> None:
    """Stopped while the router fades, after it has, and before it is saved; the bank is part of the run."""
    asked = order("emtal", task=f"{SIDES}+{PARTS}", targets=("q_proj", "gate_proj", "down_proj"), batch=6)
    whole = Run(asked, wide(), label_tasks, tmp_path / "whole", resume=False, keep_every=1)
    losses = list(whole)
    halted = Run(asked, wide(), label_tasks, tmp_path / "halted", resume=False, keep_every=1)
    for _ in itertools.islice(halted, stop):
        pass
    torch.manual_seed(99)
    resumed = Run(asked, wide(), label_tasks, tmp_path / "halted", resume=True, keep_every=1)
    assert resumed.loop.done == stop
    list(resumed)
    assert list(resumed.loop.losses) == losses
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "halted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    kept = {name: tensor for name, tensor in resumed.trainee.kept.items() if name.startswith("quality.")}
    assert kept.keys() == {f"quality.{name}" for name in ("bank.0", "bank.1", "seen.0", "seen.1", "loss")}
    assert all(torch.equal(whole.trainee.kept[name], tensor) for name, tensor in kept.items())
    assert float(resumed.trainee.kept["fading"]) == 1


def test_what_was_learnt_is_held_only_where_all_tasks_have_label_words(
    wide: Callable[[], Base], order: Callable[..., Order], label_tasks: Path, data: Path
) -> None:
    def further(task: str, folder: Path) -> bool:
        trainee, _ = begin(order("emtal", task=task, batch=2), wide(), folder)
        assert ("quality.loss" in trainee.kept) == (trainee.further_loss is not None)
        return trainee.further_loss is not None

    (label_tasks / "text").symlink_to(data / "text")
    assert further(SIDES, label_tasks)
    assert not further("wikisql", label_tasks)
    assert not further(f"{SIDES}+wikisql", label_tasks)


def test_the_further_loss_changes_what_is_learnt(
    wide: Callable[[], Base], order: Callable[..., Order], label_tasks: Path
) -> None:
    asked = order("emtal", task=SIDES, batch=6)
    held, loop = begin(asked, wide(), label_tasks)
    first = list(loop)
    free, other = begin(asked, wide(), label_tasks)
    second = list(Loop(replace(free, further_loss=None), other.corpus, other._schedule))
    assert first[:2] == second[:2], "the bank is not full yet"
    assert first[-1] != second[-1]
    assert all(torch.isfinite(parameter).all() for parameter in held.trainable.values())


def test_label_words_of_several_tokens_are_refused(
    wide: Callable[[], Base], order: Callable[..., Order], data: Path
) -> None:
    with pytest.raises(DataError, match="the answer 'true' has 4 tokens in this base"):
        begin(order("emtal", task="boolq"), wide(), data)
    begin(order("lora", task="boolq"), wide(), data)


def test_channels_that_do_not_split_are_refused(base: Callable[[], Base], wide: Callable[[], Base]) -> None:
    with pytest.raises(TargetError, match=r"'model\.layers\.0\.mlp' has 72 channels, which do not split into 16 exp"):
        begun(base())
    begun(base(), "q_proj")


def test_a_target_outside_the_block_is_refused(wide: Callable[[], Base]) -> None:
    with pytest.raises(TargetError, match="--targets names 'lm_head'; emtal adapts q_proj, k_proj"):
        begun(wide(), "q_proj", "lm_head")


def test_biases_move_with_their_channels(wide: Callable[[], Base]) -> None:
    made = wide()
    for layer in made.model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))
    before = logits(copy.deepcopy(made.model))
    LOGITS.assert_close(logits(begun(made).model), before)
