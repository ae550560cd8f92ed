"""Whole models become what was trained: S²FT's few columns and rows in whatever order, of others whole weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from motet.adapters.checkpoint import WHOLE
from motet.adapters.effects import Lowered
from motet.adapters.errors import (
    AdapterError,
    ConfigError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnmatchedTensorError,
    UnsupportedError,
)
from motet.adapters.methods.full_model import lower
from motet.adapters.source import read
from tests.support.bases import base_of
from tests.support.layouts_full import fine_tuned
from tests.support.layouts_s2ft import s2ft_fused
from tests.support.models import tiny_llama, tiny_qwen2

PROMPT = torch.arange(3, 40)[None]


def dense(lowered: Lowered, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Target → ΔW [O, I] float64."""
    deltas = {}
    for name, effects in lowered.effects.items():
        delta_OI = torch.zeros(shapes[name], dtype=torch.float64)
        if effects.columns is not None:
            delta_OI[:, effects.columns.index_S] = effects.columns.v_OS.double()
        if effects.rows is not None:
            delta_OI[effects.rows.index_S] = effects.rows.v_SI.double()
        deltas[name] = delta_OI
    return deltas


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2], ids=["llama", "qwen2"])
@pytest.mark.parametrize(
    "options", [{}, {"reorder": False}, {"padded_rows": 8}, {"heads": (0, 0, 0)}, {"channels": (0, 0, 3)}], ids=str
)
def test_the_change_is_the_one_that_was_trained(make: Callable[[], Any], options: Any, tmp_path: Path) -> None:
    model = make()
    layout = s2ft_fused(**options)(model, tmp_path / "model", 1)
    base = base_of(model)
    lowered = lower(read(layout.folder), base)
    assert (lowered.method, lowered.exact) == ("s2ft", True)
    assert ("reordered" in lowered.form) == options.get("reorder", True)
    shapes = {name: (target.out_width, target.in_width) for name, target in base.targets.items()}
    found = dense(lowered, shapes)
    assert found.keys() == layout.deltas_OI.keys()
    for name, delta_OI in layout.deltas_OI.items():
        assert torch.equal(found[name].float(), delta_OI.float()), name  # the difference, rounded once
        few_columns = name.endswith(("o_proj", "down_proj"))
        assert (lowered.effects[name].columns is not None) == few_columns, name
        assert (lowered.effects[name].rows is not None) != few_columns, name


@torch.no_grad()
def test_the_base_with_the_change_is_the_official_model(tmp_path: Path) -> None:
    model = tiny_llama()
    layout = s2ft_fused()(model, tmp_path / "model", 2)
    base = base_of(model)
    lowered = lower(read(layout.folder), base)
    shapes = {name: (target.out_width, target.in_width) for name, target in base.targets.items()}
    for name, delta_OI in dense(lowered, shapes).items():
        model.get_submodule(name).weight += delta_OI
    torch.testing.assert_close(model(PROMPT).logits, layout.oracle(PROMPT).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_a_coarser_type_is_what_it_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    """What was not trained is recognised through the rounding; what was trained becomes the checkpoint's weight."""
    model = tiny_llama()
    layout = s2ft_fused(dtype)(model, tmp_path / "model", 3)
    base = base_of(model)
    lowered = lower(read(layout.folder), base)
    assert lowered.effects.keys() == layout.deltas_OI.keys()
    for name, effects in lowered.effects.items():
        exact_OI = layout.deltas_OI[name] + base.weight(name).to(dtype).double()
        if effects.columns is not None:
            found_OS = base.weight(name)[:, effects.columns.index_S].double() + effects.columns.v_OS.double()
            expected_OS = exact_OI[:, effects.columns.index_S]
            torch.testing.assert_close(found_OS, expected_OS, atol=1e-7, rtol=0)


Q0 = "model.layers.0.self_attn.q_proj.weight"
GATE0 = "model.layers.0.mlp.gate_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], None]


def swap_query_heads_between_groups(tensors: dict[str, torch.Tensor]) -> None:
    heads = tensors[Q0].reshape(4, 12, 48)
    tensors[Q0] = heads[[2, 1, 0, 3]].reshape(48, 48).contiguous()


REFUSED: dict[str, tuple[Change, type[AdapterError], str]] = {
    "a row of gate_proj was trained too": (
        lambda tensors: tensors[GATE0][3].add_(0.1),
        ConfigError,
        "1 of 72 cannot be recognised",
    ),
    "a channel twice": (
        lambda tensors: tensors[GATE0][3].copy_(tensors[GATE0][4]),
        ConfigError,
        "hold a row of the base twice",
    ),
    "heads parted from their keys": (swap_query_heads_between_groups, ConfigError, "moved away from the key heads"),
    "a missing norm": (lambda tensors: tensors.__delitem__("model.norm.weight"), MissingTensorError, "norm.weight"),
    "an unknown tensor": (
        lambda tensors: tensors.__setitem__("model.extra.weight", torch.ones(2)),
        UnmatchedTensorError,
        "extra",
    ),
    "another width": (
        lambda tensors: tensors.__setitem__(DOWN1, torch.ones(48, 71)),
        ShapeError,
        r"\[48, 71\], expected \[48, 72\]",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_directory_that_is_no_such_fine_tune_is_refused(
    change: Change, error: type[AdapterError], message: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    layout = s2ft_fused()(model, tmp_path / "model", 4)
    tensors = load_file(layout.folder / WHOLE)
    change(tensors)
    save_file(tensors, layout.folder / WHOLE, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        lower(read(layout.folder), base_of(model))


def test_the_base_itself_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="nothing was trained"):
        lower(read(tmp_path / "model"), base_of(model))


def test_lisa_touches_what_it_touched(tmp_path: Path) -> None:
    """Bit for bit, and nothing else; the embedding acts on both of its ends."""
    model = tiny_llama()
    layout = fine_tuned("layers.1.", "embed_tokens", "model.norm")(model, tmp_path / "model", 1)
    lowered = lower(read(layout.folder), base_of(model))
    assert (lowered.method, lowered.exact, lowered.effects) == ("full-model", True, {})
    touched = {path for path, _ in model.named_parameters() if "layers.1." in path or "layers" not in path}
    assert lowered.overlays.keys() == touched | {"lm_head.weight"}
    assert lowered.overlays["lm_head.weight"] is lowered.overlays["model.embed_tokens.weight"]
    trained = dict(layout.oracle.named_parameters())
    assert all(torch.equal(lowered.overlays[path], trained[path]) for path in touched)


def test_trained_biases_of_targets_are_added(tmp_path: Path) -> None:
    model = tiny_qwen2()
    layout = fine_tuned("layers.0.self_attn.q_proj.bias")(model, tmp_path / "model", 1)
    lowered = lower(read(layout.folder), base_of(model))
    ((name, effects),) = lowered.effects.items()
    assert effects.bias is not None
    found_O = effects.bias.bias_O + model.get_submodule(name).bias
    torch.testing.assert_close(found_O, layout.oracle.get_submodule(name).bias, atol=1e-6, rtol=0)
    assert not lowered.overlays


def test_a_parameter_that_no_row_can_replace_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    layout = fine_tuned("model.norm")(model, tmp_path / "model", 1)
    base = dataclasses.replace(base_of(model), replaceable=frozenset())
    with pytest.raises(UnsupportedError, match=r"'model\.norm\.weight' was trained, which cannot be replaced"):
        lower(read(layout.folder), base)


def test_a_padded_embedding_is_checked_like_any_tensor(tmp_path: Path) -> None:
    layout = s2ft_fused(padded_rows=8)(tiny_llama(), tmp_path / "model", 1)
    tensors = load_file(layout.folder / WHOLE)
    tensors["model.embed_tokens.weight"][3, 3] = torch.nan
    save_file(tensors, layout.folder / WHOLE, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="embed_tokens"):
        lower(read(layout.folder), base_of(tiny_llama()))
