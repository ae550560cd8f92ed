"""CorDA's own architecture: a model directory that must be the base but for its split linears."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.errors import (
    AdapterError,
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
    UnsafeFormatError,
)
from motet.adapters.spec import Declared
from tests.support.bases import base_of, linears
from tests.support.layouts_corda import corda_official
from tests.support.models import tiny_llama
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench, edit_tensors, product
from tests.unit.adapters.methods.changes import Tensors, drop, poison, put, rename, replace_with

Q0 = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm.weight"


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.fixture
def directory(llama: Bench, tmp_path: Path) -> Path:
    return llama.layout("corda-official", tmp_path / "made").folder


def test_the_checkpoints_code_is_never_run(llama: Bench, directory: Path) -> None:
    """`auto_map` names modules of the directory; importing one would end the process."""
    assert "auto_map" in json.loads((directory / "config.json").read_text())
    with pytest.raises(SystemExit):
        exec((directory / "modeling_oursvd_llama.py").read_text())
    assert llama.lower(directory).method == "corda"


def test_a_is_not_b(llama: Bench, directory: Path) -> None:
    """ALinear is what PEFT calls B; the names the other way round do not fit."""

    def swap(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".ALinear." in name]:
            other = name.replace(".ALinear.", ".BLinear.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit_tensors(_file(directory), swap)
    with pytest.raises(ShapeError, match="Linear"):
        llama.lower(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_directories_of_fewer_digits_are_read_up_to_their_rounding(
    llama: Bench, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The official code saves float16; the start is then only as exact as the rounded residual."""
    layout = corda_official(dtype)(llama.model, tmp_path / "made", 1)
    lowered = llama.lower(layout.folder)
    for target, expected_OI in layout.deltas_OI.items():
        scale = torch.linalg.vector_norm(llama.base.weight(target)).double()
        error = torch.linalg.vector_norm(product(lowered, target) - expected_OI) / scale
        assert error < TOLERANCES["start from a residual", dtype].rtol, target


def test_biases_are_where_the_official_code_puts_them(tmp_path: Path) -> None:
    """In ALinear; the base's own is replaced by it, so that an equal one changes nothing."""
    model = tiny_llama(num_hidden_layers=2, attention_bias=True)
    torch.nn.init.normal_(model.get_submodule(Q0).bias, std=0.3)
    bench = Bench(model, base_of(model))
    layout = corda_official()(model, tmp_path / "made", 1)
    bias = bench.lower(layout.folder).effects[Q0].bias
    assert bias is None or not bias.bias_O.any()
    edit_tensors(_file(layout.folder), lambda tensors: tensors[f"{Q0}.ALinear.bias"].add_(0.25))
    moved = bench.lower(layout.folder).effects[Q0].bias
    assert moved is not None
    torch.testing.assert_close(moved.bias_O, torch.full((48,), 0.25))
    edit_tensors(_file(layout.folder), drop(f"{Q0}.ALinear.bias"))
    with pytest.raises(AdapterError, match="bias"):
        bench.lower(layout.folder)


SPOILT: dict[str, tuple[Callable[[Tensors], None], type[AdapterError], str]] = {
    "another norm": (lambda tensors: tensors[NORM].mul_(1.01), ConfigError, NORM),
    "another embedding": (
        lambda tensors: tensors["model.embed_tokens.weight"][7].add_(0.1),
        ConfigError,
        "embed_tokens",
    ),
    "a head of its own": (put("lm_head.weight", torch.ones(256, 48)), ConfigError, "lm_head"),
    "a tensor too many": (put("model.extra.weight", torch.ones(3)), UnmatchedTensorError, "model.extra"),
    "without ALinear": (drop(f"{Q0}.ALinear.weight"), UnmatchedTensorError, "ALinear"),
    "without BLinear": (drop(f"{Q0}.BLinear.weight"), UnmatchedTensorError, "BLinear"),
    "without a residual": (drop(f"{Q0}.weight_residual"), UnmatchedTensorError, "q_proj"),
    "without a norm": (drop(NORM), AdapterError, NORM),
    "without a linear": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(Q0)],
        AdapterError,
        "q_proj",
    ),
    "a linear of no base": (rename("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"), UnmatchedTensorError, "layers.7"),
    "the residual is transposed": (replace_with(f"{Q0}.weight_residual", (48, 47)), ShapeError, r"\[48, 47\]"),
    "another rank": (replace_with(f"{Q0}.ALinear.weight", (48, 3)), ShapeError, r"\[48, 3\], expected \[48, 4\]"),
    "NaN": (poison(f"{Q0}.weight_residual", float("nan")), NonFiniteError, "weight_residual"),
    "infinity": (poison(f"{Q0}.ALinear.weight", float("inf")), NonFiniteError, "ALinear"),
    "a change beyond twice the rank": (
        lambda tensors: tensors[f"{Q0}.weight_residual"].add_(1e-3 * torch.randn(48, 48)),
        ConfigError,
        "q_proj.*rank 8",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_directory_that_does_not_fit_is_refused(
    llama: Bench, directory: Path, change: Callable[[Tensors], Any], error: type[AdapterError], message: str
) -> None:
    llama.lower(directory)
    edit_tensors(_file(directory), change)
    with pytest.raises(error, match=message):
        llama.lower(directory)


@pytest.mark.parametrize("name", ["initial", "residual", "trained_on_base"])
def test_declarations_that_mean_nothing_here_are_refused(
    llama: Bench, directory: Path, tmp_path: Path, name: str
) -> None:
    """The directory is complete; whoever declares more means another folder."""
    other = llama.layout("pissa-residual-initial", tmp_path / "other")
    declared = {
        "initial": other.declared,
        "residual": Declared(residual=tmp_path / "other" / "residual"),
        "trained_on_base": Declared(trained_on_base=True),
    }[name]
    with pytest.raises(ConfigError, match=name):
        llama.lower(directory, declared)


@pytest.mark.parametrize("rank", [None, 0, -4, "4", 4.0, True, 3, 5])
def test_a_rank_that_is_none_or_another_is_refused(llama: Bench, directory: Path, rank: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "lora_r": rank}))
    with pytest.raises((ConfigError, ShapeError)):
        llama.lower(directory)


def test_the_directory_of_another_base_is_refused(llama: Bench, tmp_path: Path) -> None:
    other = tiny_llama(seed=5, num_hidden_layers=2)
    layout = corda_official()(other, tmp_path / "made", 1)
    with pytest.raises(ConfigError, match="another"):
        llama.lower(layout.folder)


def test_weights_as_a_pickle_are_refused(llama: Bench, directory: Path) -> None:
    _file(directory).rename(directory / "pytorch_model.bin")
    with pytest.raises(UnsafeFormatError, match="pickle"):
        llama.lower(directory)


def test_a_merged_model_is_a_full_fine_tune(llama: Bench, tmp_path: Path) -> None:
    """As PiSSA's and CorDA's authors publish them too: weights are replaced, bit for bit."""
    merged = llama.merged(llama.layout("pissa", tmp_path / "pissa").folder)
    merged.save_pretrained(tmp_path / "model")
    lowered = llama.lower(tmp_path / "model")
    assert (lowered.method, lowered.exact, lowered.effects) == ("full-model", True, {})
    assert {path.removesuffix(".weight") for path in lowered.overlays} == linears(llama.base)
    assert all(torch.equal(merged.get_parameter(path), values) for path, values in lowered.overlays.items())
