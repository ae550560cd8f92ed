"""AMT's official checkpoints become a pool whose mixtures compute what the official merged model computes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from motet.adapters.base import BaseModel, Target
from motet.adapters.convert.amt import Converted, convert
from motet.adapters.dense import merge
from motet.adapters.effects import Lowered, LowRank, TargetEffects
from motet.adapters.methods import lower
from motet.adapters.source import read
from tests.support.amt_vit import (
    BASES,
    IMAGE,
    RANK,
    Official,
    dino_names,
    features,
    made,
    save,
    tiny_vit,
)
from tests.support.tolerances import TOLERANCES

MIXTURES = ([1, 0, 0], [0, 0, 1], [0.25, 0.5, 0.25])


def as_base(model: nn.Module) -> BaseModel:
    """What adapters see: the linears of the blocks, by their paths."""
    linears = {path: one for path, one in model.named_modules() if type(one) is nn.Linear and "layers." in path}
    weights = {path: linear.weight.detach() for path, linear in linears.items()}

    def unknown(path: str) -> Any:
        raise AssertionError(path)

    return BaseModel(
        name="vit",
        fingerprint="0" * 64,
        targets={
            path: Target(index, path, linear.in_features, linear.out_features, has_bias=True)
            for index, (path, linear) in enumerate(linears.items())
        },
        other_modules=frozenset(),
        weight=weights.__getitem__,
        bias=unknown,
        weight_norm=unknown,
        parameter_names=frozenset(),
        parameter=unknown,
    )


@torch.no_grad()
def class_tokens(model: Any, lowered: Lowered, alpha: list[float], pixels_NCHW: torch.Tensor) -> torch.Tensor:
    """Of transformers' own model with the mixture merged densely."""
    assert lowered.gate is not None
    changed = copy.deepcopy(model)
    for name, effects in lowered.effects.items():
        assert effects.low_rank is not None
        g_R = torch.tensor(alpha, dtype=torch.float32)[lowered.gate.groups[name]]
        pair = LowRank(effects.low_rank.a_RI, effects.low_rank.b_OR * g_R)
        linear = changed.get_submodule(name)
        linear.weight.copy_(merge(TargetEffects(pair), linear.weight, None)[0])
    changed = getattr(changed, "vit", changed)
    tokens: torch.Tensor = changed(pixel_values=pixels_NCHW).last_hidden_state[:, 0]
    return tokens


@pytest.mark.parametrize("packed", [False, True], ids=["a checkpoint a member", "one of the pool"])
@pytest.mark.parametrize("base", BASES)
def test_mixtures_compute_what_the_official_model_computes(tmp_path: Path, base: str, packed: bool) -> None:
    one = made(tmp_path, base)
    found = convert(one.checkpoints(tmp_path, packed), one.base, tmp_path / "out")
    assert (found.members, found.rank, found.started) == (3, RANK, True)
    adapted = as_base(one.model)
    lowered = lower(read(tmp_path / "out"), adapted)
    assert lowered.effects.keys() == adapted.targets.keys()
    assert lowered.expected_targets == 12
    pixels_NCHW = torch.randn(4, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7))
    plain = features(dino_names(one.model), pixels_NCHW)
    for alpha in MIXTURES:
        expected_ND = features(one.pool.merged(alpha), pixels_NCHW)
        assert (expected_ND - plain).abs().max() > 0.01
        TOLERANCES["image features", torch.float32].assert_close(
            class_tokens(one.model, lowered, alpha, pixels_NCHW), expected_ND
        )


def test_the_oracle_is_transformers_model_of_the_base() -> None:
    model = tiny_vit()
    pixels_NCHW = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = model(pixel_values=pixels_NCHW).last_hidden_state[:, 0]
    TOLERANCES["image features", torch.float32].assert_close(expected, features(dino_names(model), pixels_NCHW))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())  # type: ignore[no-any-return]


def test_what_the_members_learnt_of_the_classifier_is_kept(tmp_path: Path) -> None:
    """Of a pool the mean, because nothing published says better; and the strengths, where every checkpoint has one."""
    one = made(tmp_path)
    found = convert(one.checkpoints(tmp_path, epsilon=8), one.base, tmp_path / "out")
    assert found == Converted(3, RANK, started=True, scales_cls=(10.0, 10.25, 10.5))
    config = config_of(tmp_path / "out")
    assert (config["scale_cls"], config["bias_cls"], config["strengths"]) == (10.25, 0.0, [8.0, 8.0, 8.0])
    assert (config["r"], config["lora_alpha"], config["members"]) == (RANK, RANK, 3)
    convert(one.checkpoints(tmp_path, packed=True), one.base, tmp_path / "packed")
    config = config_of(tmp_path / "packed")
    assert (config["scale_cls"], "strengths" in config) == (10.0, False)


def test_the_start_is_in_the_coordinates_of_the_members(tmp_path: Path) -> None:
    """Else A_p - A_0 would be as large as A_0, and the centred form would protect nothing."""
    one = made(tmp_path)
    convert(one.checkpoints(tmp_path), one.base, tmp_path / "out")
    for name, a_RI in read(tmp_path / "out").tensors.items():
        if ".lora_A.initial." in name:
            for place in range(3):
                member_RI = read(tmp_path / "out").tensors[name.replace("initial", str(place))]
                assert (member_RI - a_RI).norm() < 0.5 * a_RI.norm(), name


def test_the_prefix_can_be_said(tmp_path: Path) -> None:
    one = made(tmp_path)
    convert(one.checkpoints(tmp_path), one.base, tmp_path / "out", prefix="vit.")
    assert all(name.startswith("base_model.model.vit.layers.") for name in read(tmp_path / "out").tensors)


def test_members_trained_on_the_base_itself_have_no_start(tmp_path: Path) -> None:
    """Started from zeros, as plain LoRA: nothing was taken out."""
    one = made(tmp_path)
    small = [
        {linear: (a_RI.roll(1, 1), 0.05 * b_OR.roll(1, 0)) for linear, (a_RI, b_OR) in pairs.items()}
        for pairs in one.pool.pairs
    ]
    plain = Official(dino_names(one.model), small, one.pool.scales_cls)
    found = convert([save(plain.packed(), tmp_path / "merge.pth")], one.base, tmp_path / "out")
    assert not found.started
    assert not any("initial" in name for name in read(tmp_path / "out").tensors)
