"""What is no pool for this base is refused, and the message says which part of it."""

from __future__ import annotations

import json
import shutil
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
from motet.adapters.spec import Declared
from tests.support.layouts_amt import PoolLayout, amt
from tests.support.models import tiny_llama
from tests.unit.adapters.conftest import Bench, Tensors, edit
from tests.unit.adapters.methods.changes import Change, drop, poison, put, rename, replace_with

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
QV = ["q_proj", "v_proj"]


def pool(llama: Bench, tmp_path: Path, **options: Any) -> PoolLayout:
    return amt(**{"targets": QV, **options})(llama.model, tmp_path / "pool", 1)


def drop_all(part: str) -> Change:
    def change(tensors: Tensors) -> None:
        gone = [name for name in tensors if part in name]
        assert gone
        for name in gone:
            del tensors[name]

    return change


SPOILT: dict[str, tuple[Change, type[AdapterError], str]] = {
    "half a pair": (drop(f"{STEM}.lora_B.2.weight"), MissingTensorError, r"q_proj.lora_B.2.weight' is missing"),
    "a member less": (drop_all(".3.weight"), MissingTensorError, r"lora_A.3.weight' is missing"),
    "a member too many": (put(f"{STEM}.lora_A.4.weight", torch.ones(3, 48)), UnmatchedTensorError, r"lora_A.4.weight"),
    "half a start": (drop(f"{STEM}.lora_B.initial.weight"), MissingTensorError, "lora_B.initial.weight' is missing"),
    "a start of some targets": (drop_all("layers.0.self_attn.q_proj.lora_A.initial"), MissingTensorError, "initial"),
    "no start of one target": (
        lambda tensors: [drop(f"{STEM}.lora_{letter}.initial.weight")(tensors) for letter in "AB"] and None,
        MissingTensorError,
        "has a start, but not for 'model.layers.0.self_attn.q_proj'",
    ),
    "a start alone": (
        lambda tensors: (
            [drop(f"{STEM}.lora_{letter}.{p}.weight")(tensors) for letter in "AB" for p in range(4)] and None
        ),
        MissingTensorError,
        "q_proj.lora_A.0.weight' is missing",
    ),
    "another rank": (replace_with(f"{STEM}.lora_A.1.weight", (2, 48)), ShapeError, r"\[2, 48\], expected \[3, 48\]"),
    "another width": (replace_with(f"{STEM}.lora_B.1.weight", (47, 3)), ShapeError, r"\[47, 3\], expected \[48, 3\]"),
    "another start's rank": (replace_with(f"{STEM}.lora_A.initial.weight", (4, 48)), ShapeError, r"\[4, 48\]"),
    "NaN": (poison(f"{STEM}.lora_A.1.weight", float("nan")), NonFiniteError, "lora_A.1.weight"),
    "infinity in the start": (poison(f"{STEM}.lora_B.initial.weight", float("inf")), NonFiniteError, "initial"),
    "a tensor of no rule": (put(f"{STEM}.lora_magnitude_vector", torch.ones(48)), UnmatchedTensorError, "magnitude"),
    "a plain pair": (put(f"{STEM}.lora_A.weight", torch.ones(3, 48)), UnmatchedTensorError, "lora_A.weight"),
    "a module the base has not": (rename("q_proj", "qkv_proj"), UnmatchedTensorError, "qkv_proj"),
    "a module that is no linear": (rename("self_attn.q_proj", "input_layernorm"), UnmatchedTensorError, "layernorm"),
    "names without PEFT's prefix": (rename("base_model.model.", ""), UnmatchedTensorError, "match no rule"),
    "integers": (put(f"{STEM}.lora_A.1.weight", torch.ones(3, 48, dtype=torch.int8)), ShapeError, "int8"),
    "nothing": (drop_all("lora"), MissingTensorError, "has 0 tensors"),
}


@pytest.mark.parametrize(("change", "error", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_pool_that_is_not_whole_is_refused(
    llama: Bench, tmp_path: Path, change: Change, error: type[AdapterError], message: str
) -> None:
    layout = pool(llama, tmp_path)
    llama.lower(layout.folder)
    edit(layout.folder, change)
    with pytest.raises(error, match=message):
        llama.lower(layout.folder)


CONFIGS: dict[str, tuple[dict[str, Any], type[AdapterError], str]] = {
    "no members": ({"members": 0}, ConfigError, "members=0"),
    "half a member": ({"members": 4.0}, ConfigError, "members=4.0"),
    "a member more": ({"members": 5}, MissingTensorError, "lora_A.4.weight"),
    "a member fewer": ({"members": 3}, UnmatchedTensorError, "3.weight"),
    "absurdly many": ({"members": 10**9}, MissingTensorError, "members=1000000000, but the folder has 40 tensors"),
    "no rank": ({"r": None}, ConfigError, "r=None"),
    "no alpha": ({"lora_alpha": None}, ConfigError, "lora_alpha=None"),
    "alpha that is NaN": ({"lora_alpha": float("nan")}, ConfigError, "lora_alpha=nan"),
    "another alpha": ({"lora_alpha": 6}, ConfigError, "start is not a part of 'base'.*lora_alpha is wrong"),
    "a key nobody knows": ({"top_k": 2}, ConfigError, "unknown key 'top_k'"),
    "a scale that turns classes round": ({"scale_cls": -10}, ConfigError, "scale_cls=-10 must be above 0"),
    "a scale that is a word": ({"scale_cls": "10"}, ConfigError, "scale_cls='10'"),
    "a bias that is a word": ({"bias_cls": "0"}, ConfigError, "bias_cls='0'"),
    "a strength too few": ({"strengths": [0, 1, 2]}, ConfigError, "not a list of 4 numbers"),
    "a strength that is a word": ({"strengths": [0, 1, 2, "3"]}, ConfigError, "strengths='3'"),
    "a name that is none": ({"base_model_name_or_path": 3}, ConfigError, "base_model_name_or_path=3"),
    "a mode that is none": ({"inference_mode": "yes"}, ConfigError, "inference_mode='yes'"),
}


@pytest.mark.parametrize(("config", "error", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_configuration_that_is_no_pool_of_this_folder_is_refused(
    llama: Bench, tmp_path: Path, config: dict[str, Any], error: type[AdapterError], message: str
) -> None:
    layout = pool(llama, tmp_path)
    edit(layout.folder, config=config)
    with pytest.raises(error, match=message):
        llama.lower(layout.folder)


def test_a_configuration_that_says_less_is_read(llama: Bench, tmp_path: Path) -> None:
    """Only r, lora_alpha and members are needed."""
    layout = pool(llama, tmp_path)
    path = layout.folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "AMT", "r": 3, "lora_alpha": 3, "members": 4}))
    assert llama.lower(layout.folder).method == "amt"


def test_a_pool_of_another_base_is_refused(llama: Bench, tmp_path: Path) -> None:
    """The start is a part of the base it was trained on, and of no other."""
    other = tiny_llama(seed=5, num_hidden_layers=2)
    folder = amt(targets=QV)(other, tmp_path / "pool", 1).folder
    with pytest.raises(ConfigError, match=r"start is not a part of 'base'.*belongs to another base"):
        llama.lower(folder)


def test_a_member_with_another_beginning_is_refused(llama: Bench, tmp_path: Path) -> None:
    def replace(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in tensors:
            if ".lora_A.2." in name:
                tensors[name] = torch.randn(tensors[name].shape, generator=generator)

    folder = edit(pool(llama, tmp_path).folder, replace)
    with pytest.raises(ConfigError, match="A of member 2 and A of the start have cosine"):
        llama.lower(folder)


def test_members_whose_start_was_left_out_are_refused(llama: Bench, tmp_path: Path) -> None:
    """They would be added to a base that still holds what was taken out of it: the disaster of plain PiSSA folders."""
    folder = edit(pool(llama, tmp_path).folder, drop_all(".initial."))
    with pytest.raises(UnsupportedError, match=r"member 0 looks trained on a residual model.*lora_A\.initial"):
        llama.lower(folder)
    lowered = llama.lower(folder, Declared(trained_on_base=True))
    assert lowered.form == "pool of 4 members"


def test_a_start_of_zeros_is_no_start(llama: Bench, tmp_path: Path) -> None:
    def empty(tensors: Tensors) -> None:
        for name in tensors:
            if ".initial." in name:
                tensors[name] = torch.zeros_like(tensors[name])

    folder = edit(pool(llama, tmp_path).folder, empty)
    with pytest.raises(ConfigError, match="start is not a part"):
        llama.lower(folder)


def test_a_pool_needs_no_declaration_and_takes_none(llama: Bench, tmp_path: Path) -> None:
    folder = pool(llama, tmp_path).folder
    with pytest.raises(ConfigError, match="trained_on_base contradicts"):
        llama.lower(folder, Declared(trained_on_base=True))
    shutil.copytree(folder, tmp_path / "start")
    with pytest.raises(ConfigError, match="a pool holds its own start"):
        llama.lower(folder, Declared(initial=tmp_path / "start"))
