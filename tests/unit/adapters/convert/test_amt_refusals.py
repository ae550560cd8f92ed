"""Checkpoints and bases that do not make one pool are refused, and nothing is written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from motet.adapters.convert.amt import convert
from motet.adapters.convert.plain_pickle import read_plain_pickle
from motet.adapters.errors import (
    AdapterError,
    AdapterExistsError,
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
    UnsafeFormatError,
)
from tests.support.amt_vit import RANK, Made, State, dino_names, made, official, save
from tests.unit.adapters.methods.changes import Change, drop, put

QKV = "blocks.1.attn.qkv"


def edited(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def edit(state: State) -> None:
        state[f"backbone.{name}"] = change(state[f"backbone.{name}"])

    return edit


SPOILT: dict[str, tuple[Change, type[AdapterError], str]] = {
    "another norm": (edited("norm.weight", lambda w: w * 1.01), ConfigError, r"norm.weight' of best-1.pth is not that"),
    "a trained bias": (edited(f"{QKV}.bias", lambda w: w + 0.01), ConfigError, "qkv.bias"),
    "another position": (edited("pos_embed", lambda w: w + 0.01), ConfigError, "pos_embed"),
    "another image size": (edited("pos_embed", lambda w: w[:, :-1]), ShapeError, "pos_embed"),
    "another residual": (edited(f"{QKV}.weight", lambda w: w * 1.01), ConfigError, "did not begin alike"),
    "NaN": (edited(f"{QKV}.lora_B", lambda w: w * float("nan")), NonFiniteError, "lora_B"),
    "one A for all three": (edited(f"{QKV}.lora_A", lambda w: w[:RANK]), ShapeError, r"qkv.lora_A"),
    "no pair": (drop(f"backbone.{QKV}.lora_A"), MissingTensorError, "lora_A"),
    "no first pair": (drop("backbone.blocks.0.attn.qkv.lora_B"), MissingTensorError, "0 tensors"),
    "a vector": (edited("blocks.0.attn.qkv.lora_B", lambda w: w[:, 0]), ShapeError, "must be a matrix"),
    "no scale": (drop("scale_cls"), MissingTensorError, "scale_cls"),
    "a head": (put("head.weight", torch.ones(2)), UnmatchedTensorError, "head.weight"),
    "a layer more": (
        put("backbone.blocks.2.norm1.bias", torch.ones(2)),
        UnmatchedTensorError,
        "blocks.2",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, change: Change, error: type[AdapterError], message: str
) -> None:
    one = made(tmp_path)
    files = one.checkpoints(tmp_path)
    saved = one.pool.of_member(1)
    change(saved["model"])
    save(saved, files[1])
    with pytest.raises(error, match=message):
        convert(files, one.base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(one: Made, folder: Path, error: type[AdapterError], message: str, files: list[Path] | None = None) -> None:
    with pytest.raises(error, match=message):
        convert(one.checkpoints(folder) if files is None else files, one.base, folder / "out")
    assert not (folder / "out").exists()


def with_base(one: Made, base: Path) -> Made:
    return Made(one.model, base, one.pool)


def test_another_base_is_refused(tmp_path: Path) -> None:
    """Norms and positions alike, as of a model that was trained on: only the rank of the difference tells."""
    one = made(tmp_path)
    state = dino_names(one.model)
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"] + 1e-3
    state["blocks.0.mlp.fc1.weight"][0, 0] += 0.1
    other = save(state, tmp_path / "other.pth")
    refused(
        with_base(one, other), tmp_path, ConfigError, r"'layers.0.mlp.fc1' differs from 'other.pth' by more than rank 3"
    )


def test_a_pool_that_took_nothing_out_of_one_linear_is_refused(tmp_path: Path) -> None:
    one = made(tmp_path)
    one.pool.residual[f"{QKV}.weight"] = dino_names(one.model)[f"{QKV}.weight"]
    refused(one, tmp_path, ConfigError, r"not out of 'layers.1.attention.q_proj'")


def test_members_of_two_ranks_are_refused(tmp_path: Path) -> None:
    one = made(tmp_path)
    files = one.checkpoints(tmp_path)
    saved = one.pool.of_member(2)
    for name, values in saved["model"].items():
        if ".lora_A" in name:
            parts = 3 if ".qkv." in name else 1
            saved["model"][name] = torch.cat([part[:2] for part in values.chunk(parts)])
        elif ".lora_B" in name:
            saved["model"][name] = values[:, :2].clone()
    save(saved, files[2])
    refused(one, tmp_path, ConfigError, "best-2.pth has rank 2, best-0.pth 3", files)


def test_members_of_another_base_are_refused(tmp_path: Path) -> None:
    one = made(tmp_path)
    files = one.checkpoints(tmp_path)
    scaled = {name: 1.1 * values if "attn" in name else values for name, values in dino_names(one.model).items()}
    other = official(scaled, members=1)
    other.residual.update({name: dino_names(one.model)[name] for name in other.residual if "bias" in name})
    save(other.of_member(0), files[1])
    refused(one, tmp_path, ConfigError, "did not begin alike", files)


def test_a_whole_pool_is_converted_alone(tmp_path: Path) -> None:
    one = made(tmp_path)
    files = [*one.checkpoints(tmp_path), *one.checkpoints(tmp_path, packed=True)]
    refused(one, tmp_path, ConfigError, "merge.pth holds a whole pool", files)


def test_a_packed_pool_with_a_gap_is_refused(tmp_path: Path) -> None:
    one = made(tmp_path)
    saved = one.pool.packed()
    saved["model"] = {name: values for name, values in saved["model"].items() if not name.endswith("lora_B.1")}
    refused(one, tmp_path, MissingTensorError, "not .0 and on", [save(saved, tmp_path / "gap.pth")])


def test_no_checkpoint_is_no_pool(tmp_path: Path) -> None:
    refused(made(tmp_path), tmp_path, ConfigError, "there are no checkpoints", [])


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    one = made(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterExistsError, match="'out' is there already"):
        convert(one.checkpoints(tmp_path), one.base, tmp_path / "out")


NOT_A_STATE: dict[str, tuple[Any, type[AdapterError], str]] = {
    "a path": ({"model": {}, "args": argparse.Namespace(output_dir=Path("out"))}, UnsafeFormatError, "names pathlib"),
    "a function": ({"model": {}, "hook": print}, UnsafeFormatError, "print"),
    "a list": ([1, 2], UnsafeFormatError, "holds a list"),
    "numbers as names": ({1: 2}, UnsafeFormatError, "dictionary of names"),
    "no model": ({"state_dict": {}}, ConfigError, "has no 'model'"),
    "a model of numbers": ({"model": {"backbone.norm.bias": 1.0}}, ConfigError, "has no 'model' of tensors"),
    "nothing of AMT": ({"model": {"backbone.norm.bias": torch.ones(2)}}, MissingTensorError, "no checkpoint of AMT"),
}


@pytest.mark.parametrize(("content", "error", "message"), NOT_A_STATE.values(), ids=NOT_A_STATE.keys())
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, content: Any, error: type[AdapterError], message: str
) -> None:
    one = made(tmp_path)
    file = tmp_path / "one.pth"
    torch.save(content, file)
    refused(one, tmp_path, error, message, [file])


def test_a_damaged_file_is_named_without_its_path(tmp_path: Path) -> None:
    file = tmp_path / "one.pth"
    file.write_bytes(b"not a pickle")
    with pytest.raises(UnsafeFormatError, match=r"^one.pth is no checkpoint.*cannot be read \(UnpicklingError\)"):
        read_plain_pickle(file)


def no_vit(folder: Path) -> Path:
    save_file({"layers.0.weight": torch.ones(2, 2)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def other_norm(folder: Path) -> Path:
    """Of an epsilon that the authors' model does not compute with."""
    made(folder, "ViTModel's folder")
    path = folder / "folder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_eps": 1e-12}))
    return folder / "folder"


NOT_A_BASE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another model": (no_vit, "other.safetensors has no tensor 'blocks.0.attn.qkv.weight'"),
    "a checkpoint": (lambda folder: save({"teacher": {}}, folder / "t.pth"), "t.pth holds more than tensors"),
    "another norm": (other_norm, "layer_norm_eps=1e-12"),
}


@pytest.mark.parametrize(("base", "message"), NOT_A_BASE.values(), ids=NOT_A_BASE.keys())
def test_what_is_no_base_is_refused(tmp_path: Path, base: Callable[[Path], Path], message: str) -> None:
    one = with_base(made(tmp_path), base(tmp_path))
    refused(one, tmp_path, ConfigError, message)
