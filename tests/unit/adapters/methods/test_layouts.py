"""Every layout of low rank, lowered for a base of its own: the change is the one it was made from, the base stays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from motet.adapters.effects import Lowered
from motet.adapters.methods import lower
from motet.adapters.source import read
from tests.support.bases import base_of
from tests.support.layout import Layout
from tests.support.layouts import FULL_LAYOUTS, POLAR_LAYOUTS, RESIDUAL_LAYOUTS, SPARSE_LAYOUTS, layouts_of, make
from tests.support.models import FAMILIES
from tests.support.tolerances import TOLERANCES

CASES = [
    (family, name)
    for family in ("llama", "qwen2")
    for name in layouts_of(family)
    if name not in {**SPARSE_LAYOUTS, **FULL_LAYOUTS}
]


@pytest.fixture(scope="module")
def models() -> Mapping[str, Any]:
    return {family: FAMILIES[family]() for family in ("llama", "qwen2")}


@pytest.mark.parametrize(("family", "name"), CASES, ids=map("-".join, CASES))
def test_the_change_is_the_one_that_was_trained(
    models: Mapping[str, Any], family: str, name: str, tmp_path: Path
) -> None:
    model = models[family]
    before = copy.deepcopy(model.state_dict())
    layout = make(name, model, tmp_path / "made")
    lowered = lower(read(layout.folder, layout.declared), base_of(model))
    assert (lowered.method, lowered.exact) == (layout.method, True)
    assert layout.deltas_OI.keys() == {name for name, effects in lowered.effects.items() if effects.low_rank}
    assert lowered.expected_targets == len(layout.deltas_OI)
    for target, expected_OI in layout.deltas_OI.items():
        low_rank = lowered.effects[target].low_rank
        assert low_rank is not None
        assert low_rank.a_RI.dtype == low_rank.b_OR.dtype == torch.float32
        found_OI = low_rank.b_OR.double() @ low_rank.a_RI.double()
        largest = expected_OI.abs().max().expand_as(expected_OI)
        TOLERANCES["lowered", torch.float32].assert_close(found_OI, expected_OI, magnitude=largest)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def _ranks(lowered: Lowered) -> set[int]:
    return {effects.low_rank.rank for effects in lowered.effects.values() if effects.low_rank}


@pytest.mark.parametrize("name", sorted(RESIDUAL_LAYOUTS.keys() & set(layouts_of("llama"))))
def test_a_residual_kind_costs_twice_its_rank_at_most(models: Mapping[str, Any], name: str, tmp_path: Path) -> None:
    layout, lowered = _lowered(name, models["llama"], tmp_path)
    exact_ranks = {target: int(torch.linalg.matrix_rank(delta)) for target, delta in layout.deltas_OI.items()}
    assert max(_ranks(lowered)) <= max(exact_ranks.values())


@pytest.mark.parametrize("name", POLAR_LAYOUTS)
def test_polar_costs_its_own_rank(models: Mapping[str, Any], name: str, tmp_path: Path) -> None:
    layout, lowered = _lowered(name, models["llama"], tmp_path)
    for target, delta_OI in layout.deltas_OI.items():
        low_rank = lowered.effects[target].low_rank
        assert low_rank is not None
        assert low_rank.rank == int(torch.linalg.matrix_rank(delta_OI))


def _lowered(name: str, model: Any, folder: Path) -> tuple[Layout, Lowered]:
    layout = make(name, model, folder / "made")
    return layout, lower(read(layout.folder, layout.declared), base_of(model))
