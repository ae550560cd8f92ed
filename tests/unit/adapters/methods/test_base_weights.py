"""A model directory equals the resident base up to the coarser of two roundings, and in every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from motet.adapters.errors import ConfigError, MissingTensorError, NonFiniteError, ShapeError, UnmatchedTensorError
from motet.adapters.methods.base_weights import require_base_weights, rounding, stored
from motet.adapters.source import AdapterFiles, Layout
from motet.adapters.version import Digest
from tests.support.bases import base_of
from tests.support.models import reference_copy, tiny_llama

NORM = "model.layers.1.input_layernorm.weight"
VALUES = "model.layers.1.self_attn.v_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _directory(tensors: Mapping[str, torch.Tensor]) -> AdapterFiles:
    return AdapterFiles(Layout.MODEL, {}, tensors, Digest("d"), 0)


def _tensors(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone().to(dtype) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(num_hidden_layers=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resident", DTYPES)
def test_copies_in_any_two_dtypes_are_the_same(model: Any, dtype: torch.dtype, resident: torch.dtype) -> None:
    base = base_of(reference_copy(model).to(resident))
    require_base_weights(_directory(_tensors(model, dtype)), base, changed=())


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("name", [VALUES, UP, "model.embed_tokens.weight"])
def test_one_element_beyond_the_rounding_is_found(model: Any, name: str, dtype: torch.dtype, change: float) -> None:
    tensors = _tensors(model, dtype)
    tensors[name].view(-1)[tensors[name].abs().argmax()] *= 1 + change
    with pytest.raises(ConfigError, match=name):
        require_base_weights(_directory(tensors), base_of(model), changed=())
    require_base_weights(_directory(tensors), base_of(model), changed=(name,))


def test_every_tensor_must_be_there(model: Any) -> None:
    tensors = _tensors(model)
    del tensors[NORM]
    with pytest.raises(MissingTensorError, match=NORM):
        require_base_weights(_directory(tensors), base_of(model), changed=())
    require_base_weights(_directory(tensors), base_of(model), changed=(), replaced=(NORM,))


def test_a_tied_head_may_be_written_out(model: Any) -> None:
    tensors = {**_tensors(model), "lm_head.weight": model.model.embed_tokens.weight.detach().clone()}
    require_base_weights(_directory(tensors), base_of(model), changed=())
    tensors["lm_head.weight"][3, 3] += 0.5
    with pytest.raises(ConfigError, match="lm_head"):
        require_base_weights(_directory(tensors), base_of(model), changed=())


def test_a_computed_buffer_is_no_weight(model: Any) -> None:
    """Old checkpoints hold it."""
    tensors = {**_tensors(model), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    require_base_weights(_directory(tensors), base_of(model), changed=())


def test_what_the_base_has_not_is_refused(model: Any) -> None:
    with pytest.raises(UnmatchedTensorError, match=r"layers\.2\.x"):
        require_base_weights(_directory({**_tensors(model), "layers.2.x": torch.ones(1)}), base_of(model), changed=())


def test_stored_checks_what_it_hands_out() -> None:
    files = _directory({"w": torch.ones(2, 3), "nan": torch.tensor([torch.nan]), "int": torch.ones(1).int()})
    assert stored(files, "w", (2, 3)).shape == (2, 3)
    with pytest.raises(UnmatchedTensorError, match="'v'"):
        stored(files, "v", (2, 3))
    with pytest.raises(ShapeError, match=r"\[2, 3\], expected \[3, 2\]"):
        stored(files, "w", (3, 2))
    with pytest.raises(NonFiniteError, match="'nan'"):
        stored(files, "nan", (1,))
    with pytest.raises(ShapeError, match="int32"):
        stored(files, "int", (1,))


def test_the_coarser_dtype_decides() -> None:
    fine = torch.tensor([1.0, 1 / 3])
    coarse = fine.bfloat16()
    assert rounding(fine, fine) < rounding(fine, coarse.float()) == rounding(coarse, fine)
    assert rounding(fine.half(), fine) < rounding(coarse, fine)
