"""A residual model must be the base but for a start of the adapter's rank in each target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from motet.adapters.errors import (
    AdapterError,
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
)
from motet.adapters.spec import Declared
from tests.support.layout import Layout
from tests.support.models import reference_copy, tiny_llama
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench, Tensors, edit_tensors, product
from tests.unit.adapters.methods.changes import drop, poison, put, replace_with

Q0 = "model.layers.0.self_attn.q_proj"


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"


NORM = "model.layers.1.input_layernorm.weight"
RESIDUALS: dict[str, tuple[Callable[[Tensors], None], type[AdapterError], str]] = {
    "with another norm": (lambda tensors: tensors[NORM].mul_(1.01), ConfigError, NORM),
    "with another embedding": (
        lambda tensors: tensors["model.embed_tokens.weight"][7].add_(0.1),
        ConfigError,
        "embed_tokens",
    ),
    "with a tensor too many": (put("model.extra.weight", torch.ones(3)), UnmatchedTensorError, "model.extra"),
    "without a target": (drop(f"{Q0}.weight"), UnmatchedTensorError, "q_proj"),
    "without a norm": (drop(NORM), AdapterError, NORM),
    "without a linear that is no target": (drop("model.layers.1.mlp.up_proj.weight"), AdapterError, "up_proj"),
    "with NaN": (poison(f"{Q0}.weight", float("nan")), NonFiniteError, "q_proj"),
    "with NaN elsewhere": (lambda tensors: tensors[NORM].fill_(float("nan")), NonFiniteError, NORM),
    "of another width": (replace_with(f"{Q0}.weight", (48, 47)), ShapeError, r"\[48, 47\]"),
    "of another vocabulary": (replace_with("model.embed_tokens.weight", (300, 48)), ShapeError, r"\[300, 48\]"),
    "of a rank too many": (
        lambda tensors: tensors[f"{Q0}.weight"].add_(1e-3 * torch.outer(torch.ones(48), torch.arange(48.0) - 20)),
        ConfigError,
        "q_proj.*more than rank 6",
    ),
    "quantised to four bits": (lambda tensors: _quantise(tensors, 15), ConfigError, "more than rank 6"),
    "of integers": (put(f"{Q0}.weight", torch.ones(48, 48, dtype=torch.int8)), ShapeError, "int8"),
}


def _quantise(tensors: Tensors, steps: int) -> None:
    for name, tensor in tensors.items():
        if "_proj" in name:
            step = tensor.abs().max() * 2 / steps
            tensor.copy_((tensor / step).round() * step)


@pytest.mark.parametrize(("change", "error", "message"), RESIDUALS.values(), ids=RESIDUALS.keys())
def test_a_residual_model_that_does_not_fit_is_refused(
    llama: Bench,
    begun: Layout,
    residual: Path,
    change: Callable[[Tensors], None],
    error: type[AdapterError],
    message: str,
) -> None:
    llama.lower(begun.folder, Declared(residual=residual))
    edit_tensors(_file(residual), change)
    with pytest.raises(error, match=message):
        llama.lower(begun.folder, Declared(residual=residual))


def test_the_residual_of_another_base_is_refused(llama: Bench, begun: Layout, tmp_path: Path) -> None:
    tiny_llama(seed=5, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="more than rank"):
        llama.lower(begun.folder, Declared(residual=tmp_path / "other"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_itself_is_no_residual(llama: Bench, begun: Layout, tmp_path: Path, dtype: torch.dtype) -> None:
    """Nothing was taken out but rounding: the adapter is plain, or it was trained on something else."""
    reference_copy(llama.model).to(dtype).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError):
        llama.lower(begun.folder, Declared(residual=tmp_path / "base"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_residual_model_of_fewer_digits_is_read_up_to_its_rounding(
    llama: Bench, begun: Layout, residual: Path, dtype: torch.dtype
) -> None:
    """The trainer's rounding of W_res is not part of ΔW; what remains of it is that within the start's own rank."""

    def cast(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit_tensors(_file(residual), cast)
    lowered = llama.lower(begun.folder, Declared(residual=residual))
    for target, expected_OI in begun.deltas_OI.items():
        scale = torch.linalg.vector_norm(llama.base.weight(target)).double()
        error = torch.linalg.vector_norm(product(lowered, target) - expected_OI) / scale
        assert error < TOLERANCES["start from a residual", dtype].rtol, target
