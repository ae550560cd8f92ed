"""The centred form keeps its precision in bfloat16 however small the change is; the stacked one loses it."""

from __future__ import annotations

import itertools

import pytest
import torch

from motet.adapters.effects import LowRank
from motet.adapters.methods.centred import aligned, centred, recentred
from tests.bench.centred import CHANGES, measure
from tests.support.tolerances import TOLERANCES

RANK, IN, OUT = 6, 48, 40


def _pair(seed: int, rank: int = RANK) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator))


def _moved(pair: LowRank, by: float, seed: int = 9) -> LowRank:
    step = _pair(seed, pair.rank)
    return LowRank(pair.a_RI + by * step.a_RI, pair.b_OR + by * step.b_OR)


def _product(pair: LowRank) -> torch.Tensor:
    return pair.b_OR.double() @ pair.a_RI.double()


def _assert_same(found_OI: torch.Tensor, expected_OI: torch.Tensor) -> None:
    largest = expected_OI.abs().max().expand_as(expected_OI)
    TOLERANCES["lowered", torch.float32].assert_close(found_OI, expected_OI, magnitude=largest)


def test_bfloat16_serves_every_size_of_change_alike() -> None:
    """Logits hide what is lost here: it is at most some thousandths of W x, but all of what was trained."""
    rows = measure()
    assert [row.change for row in rows] == pytest.approx(list(CHANGES), rel=0.1)
    assert all(2e-3 < row.centred < 4e-3 for row in rows), rows
    assert max(row.centred for row in rows) < 1.5 * min(row.centred for row in rows)
    assert all(later.stacked > 2 * earlier.stacked for earlier, later in itertools.pairwise(rows)), rows
    assert rows[-1].stacked > 0.3


@pytest.mark.parametrize("by", [0.3, 1e-2, 1e-4])
def test_the_change_is_the_difference_of_the_products(by: float) -> None:
    start = _pair(1)
    trained = _moved(start, by)
    change = centred(trained, start)
    assert change.a_RI.dtype == change.b_OR.dtype == torch.float32
    assert change.rank == 2 * RANK
    _assert_same(_product(change), _product(trained) - _product(start))


def test_no_training_is_no_change() -> None:
    assert not _product(centred(_pair(1), _pair(1))).any()


@pytest.mark.parametrize("by", [0.3, 1e-2, 1e-3])
def test_a_stack_of_near_pairs_is_taken_apart_and_centred(by: float) -> None:
    """What PEFT's conversion writes; each operand is then as small as its part of the change."""
    start = _pair(1)
    trained = _moved(start, by)
    stack = LowRank(torch.cat([trained.a_RI, start.a_RI]), torch.cat([trained.b_OR, -start.b_OR], 1))
    change = recentred(stack)
    _assert_same(_product(change), _product(trained) - _product(start))
    sizes = (
        change.a_RI[:RANK].norm() * change.b_OR[:, :RANK].norm(),
        change.a_RI[RANK:].norm() * change.b_OR[:, RANK:].norm(),
    )
    assert max(sizes) < 3 * by * stack.a_RI.norm() * stack.b_OR.norm()


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_an_ordinary_pair_stays_as_it_is(rank: int) -> None:
    pair = _pair(3, rank)
    found = recentred(pair)
    assert torch.equal(found.a_RI, pair.a_RI)
    assert torch.equal(found.b_OR, pair.b_OR)


def test_a_stack_of_equal_signs_is_no_difference() -> None:
    start = _pair(1)
    stack = LowRank(torch.cat([start.a_RI, start.a_RI]), torch.cat([start.b_OR, start.b_OR], 1))
    _assert_same(_product(recentred(stack)), 2 * _product(start))


@pytest.mark.parametrize("turn", ["signs", "order", "rotation", "scale"])
def test_a_start_in_other_coordinates_is_aligned(turn: str) -> None:
    """An SVD on another machine: the same product from other factors, and yet a small difference."""
    start = _pair(1)
    generator = torch.Generator().manual_seed(2)
    t_RR = {
        "signs": torch.diag(torch.tensor([1.0, -1, 1, -1, -1, 1])),
        "order": torch.eye(RANK)[torch.randperm(RANK, generator=generator)],
        "rotation": torch.linalg.qr(torch.randn(RANK, RANK, generator=generator))[0],
        "scale": torch.diag(torch.tensor([2.0, 0.5, 1, 3, 1, 0.2])),
    }[turn].double()
    trained = _moved(start, 0.01)
    turned = LowRank(t_RR @ start.a_RI.double(), start.b_OR.double() @ torch.linalg.inv(t_RR))
    found = aligned(turned, trained)
    _assert_same(found.b_OR.double() @ found.a_RI.double(), _product(start))
    assert (found.a_RI - trained.a_RI).norm() < 0.05 * trained.a_RI.norm()
    _assert_same(_product(centred(trained, found)), _product(trained) - _product(start))


@pytest.mark.parametrize("kind", ["zero", "less rank"])
def test_a_start_that_cannot_be_aligned_keeps_its_product(kind: str) -> None:
    start, trained = _pair(1), _pair(2)
    broken = LowRank(start.a_RI.clone(), start.b_OR.clone())
    broken.a_RI[3:] = 0
    if kind == "zero":
        broken.a_RI[:] = 0
    found = aligned(broken, trained)
    assert torch.isfinite(found.a_RI).all()
    assert torch.isfinite(found.b_OR).all()
    torch.testing.assert_close(_product(found), _product(broken))
