"""Trimmed merges keep the largest singular values of the merged weight, as NumPy finds them."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch

from motet.adapters import trimming
from motet.adapters.base import Target
from motet.adapters.errors import GateError
from tests.support.bases import base_of_names, residency_of
from tests.support.layouts_amt import PoolLayout, amt
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench

ALPHA = (0.5, 0.0, 0.3, 0.2)
CLOSE = TOLERANCES["trimmed weight", torch.float32]


@pytest.fixture(scope="module", params=[True, False], ids=["with a start", "without"])
def pool(llama: Bench, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PoolLayout:
    return amt(started=request.param)(llama.model, tmp_path_factory.mktemp("pool") / "pool", 1)


@pytest.mark.parametrize("share", [0.05, 0.5, 1])
def test_weights_and_errors_are_those_of_numpy(llama: Bench, pool: PoolLayout, share: float) -> None:
    lowered, found = trimming.trimmed(llama.lower(pool.folder), ALPHA, share, llama.base)
    oracle, errors = pool.trimmed(ALPHA, share)
    assert lowered.overlays.keys() == {f"{target}.weight" for target in pool.members}
    assert (lowered.effects, lowered.gate, lowered.exact) == ({}, None, False)
    widths = [min(oracle.get_submodule(target).weight.shape) for target in pool.members]
    assert found.ranks == (int(share * min(widths)), int(share * max(widths)))
    for path, weight_OI in lowered.overlays.items():
        expected_OI = oracle.get_parameter(path).detach()
        CLOSE.assert_close(weight_OI, expected_OI, magnitude=expected_OI.abs().max().expand_as(expected_OI))
    assert found.share == share
    assert found.largest == pytest.approx(max(errors.values()), abs=1e-6)
    assert found.mean == pytest.approx(statistics.mean(errors.values()), abs=1e-6)
    assert (found.largest > 0.1) == (share < 1)


def test_equal_asks_give_equal_bits(llama: Bench, pool: PoolLayout) -> None:
    one, other = (trimming.trimmed(llama.lower(pool.folder), ALPHA, 0.4, llama.base)[0] for _ in range(2))
    for path, weight_OI in one.overlays.items():
        assert torch.equal(weight_OI, other.overlays[path])


def test_the_outline_takes_what_the_weights_take(llama: Bench, pool: PoolLayout) -> None:
    lowered, _ = trimming.trimmed(llama.lower(pool.folder), ALPHA, 0.4, llama.base)
    needed = residency_of(llama.base).bytes_needed
    assert needed(trimming.outline(pool.members, llama.base)) == needed(lowered) > 0


def test_a_share_that_floating_point_puts_below_a_whole_number() -> None:
    """0.29 · 100 is 28.999999999999996."""
    base = replace(base_of_names(["q"]), targets={"q": Target(0, "q", 100, 200, has_bias=False)})
    for rank in range(1, 101):
        assert trimming.ranks(["q"], rank / 100, base) == {"q": rank}


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan"), 1e-3])
def test_a_share_that_cannot_be(llama: Bench, share: float) -> None:
    with pytest.raises(GateError, match="trim is") as error:
        trimming.ranks(["model.layers.0.self_attn.q_proj"], share, llama.base)
    assert error.value.field == "trim"
