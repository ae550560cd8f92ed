"""Selections and deltas are taken as they are, and what does not fit the base is refused."""

from __future__ import annotations

from collections.abc import Callable
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
)
from tests.support.layouts_s2ft import s2ft_selection
from tests.unit.adapters.conftest import Bench, Tensors, edit

DOWN = "base_model.model.model.layers.0.mlp.down_proj.columns"
UP = "base_model.model.model.layers.1.mlp.up_proj.rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_the_one_that_was_saved(llama: Bench, tmp_path: Path, dtype: torch.dtype) -> None:
    layout = s2ft_selection(dtype)(llama.model, tmp_path / "adapter", 1)
    lowered = llama.lower(layout.folder)
    assert (lowered.method, lowered.form, lowered.exact) == ("s2ft", "selection and delta", True)
    assert lowered.effects.keys() == layout.deltas_OI.keys()
    for name, expected_OI in layout.deltas_OI.items():
        found_OI, effects = torch.zeros_like(expected_OI), lowered.effects[name]
        if effects.columns is not None:
            assert effects.columns.index_S.tolist() == sorted(effects.columns.index_S.tolist())
            found_OI[:, effects.columns.index_S] += effects.columns.v_OS
        if effects.rows is not None:
            found_OI[effects.rows.index_S] += effects.rows.v_SI
        torch.testing.assert_close(found_OI, expected_OI, atol=1e-7, rtol=0)  # the oracle added in float32


Change = Callable[[Tensors], Any]
REFUSED: dict[str, tuple[Change, type[AdapterError], str]] = {
    "an index without its delta": (lambda t: t.pop(f"{DOWN}.delta"), UnmatchedTensorError, r"columns\.index"),
    "a delta without its index": (lambda t: t.pop(f"{DOWN}.index"), MissingTensorError, r"columns\.index"),
    "a place beyond the base": (
        lambda t: t.__setitem__(f"{DOWN}.index", torch.tensor([72])),
        ShapeError,
        "names places 72 to 72; there are 0 to 71",
    ),
    "a negative place": (lambda t: t.__setitem__(f"{DOWN}.index", torch.tensor([-1])), ShapeError, "places -1 to -1"),
    "a place twice": (lambda t: t[f"{UP}.index"].__setitem__(0, t[f"{UP}.index"][1]), ShapeError, "a place twice"),
    "places that are no numbers of places": (
        lambda t: t.__setitem__(f"{DOWN}.index", torch.tensor([1.0])),
        ShapeError,
        "float32; it must be a list of",
    ),
    "no place": (
        lambda t: t.update({f"{DOWN}.index": torch.zeros(0, dtype=torch.int64), f"{DOWN}.delta": torch.ones(48, 0)}),
        ShapeError,
        "at least one",
    ),
    "a delta of another width": (lambda t: t.__setitem__(f"{DOWN}.delta", torch.ones(47, 1)), ShapeError, r"\[47, 1\]"),
    "rows given as columns": (lambda t: t.__setitem__(f"{UP}.delta", torch.ones(48, 5)), ShapeError, r"\[48, 5\]"),
    "NaN": (lambda t: t[f"{DOWN}.delta"].fill_(torch.nan), NonFiniteError, r"columns\.delta"),
    "a linear of no base": (
        lambda t: t.update({"base_model.model.x.rows.delta": torch.ones(1, 1)}),
        UnmatchedTensorError,
        "'x' is not among",
    ),
    "a tensor of another kind": (lambda t: t.update({"x": torch.ones(1)}), UnmatchedTensorError, "'x'"),
    "nothing": (lambda t: t.clear(), ConfigError, "holds no selection"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(
    llama: Bench, tmp_path: Path, change: Change, error: type[AdapterError], message: str
) -> None:
    folder = s2ft_selection()(llama.model, tmp_path / "adapter", 1).folder
    edit(folder, change)
    with pytest.raises(error, match=message):
        llama.lower(folder)


def test_an_unknown_key_is_refused(llama: Bench, tmp_path: Path) -> None:
    folder = s2ft_selection()(llama.model, tmp_path / "adapter", 1).folder
    edit(folder, config={"lora_alpha": 8})
    with pytest.raises(ConfigError, match="unknown key 'lora_alpha'"):
        llama.lower(folder)
