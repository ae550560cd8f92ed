"""The leading components against torch's SVD."""

from __future__ import annotations

import pytest
import torch

from motet.adapters.methods.principal import leading


def _matrix(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """Float64 with chosen singular values."""
    generator = torch.Generator().manual_seed(rows + columns)
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return (u * values) @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(20, 30), (30, 20), (25, 25), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 4])
def test_product_and_rest_are_those_of_the_svd(rows: int, columns: int, rank: int) -> None:
    values = torch.linspace(2, 0.1, min(rows, columns, 12), dtype=torch.float64)
    matrix = _matrix(rows, columns, values)
    found = leading(matrix, rank)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert (found.pair.a_RI.shape, found.pair.b_OR.shape) == ((rank, columns), (rows, rank))
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    torch.testing.assert_close(found.pair.b_OR @ found.pair.a_RI, expected, atol=1e-12, rtol=1e-12)
    assert found.rest == pytest.approx(float(torch.linalg.vector_norm(values[rank:])), rel=1e-9, abs=1e-12)


def test_both_factors_share_the_singular_values() -> None:
    pair = leading(_matrix(30, 20, torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64)), 3).pair
    torch.testing.assert_close(pair.a_RI @ pair.a_RI.T, torch.diag(torch.tensor([9.0, 4, 1]).double()))
    torch.testing.assert_close(pair.b_OR.T @ pair.b_OR, torch.diag(torch.tensor([9.0, 4, 1]).double()))


def test_small_components_do_not_drown_in_float32() -> None:
    """A start of KPM is a thousandth of the weight, and its last components a thousandth of the start."""
    values = torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64)
    matrix = _matrix(40, 60, values)
    found = leading(matrix, 3)
    assert found.rest < 1e-9  # float32 would leave 1e-7
    assert torch.linalg.svdvals(found.pair.b_OR @ found.pair.a_RI)[2] == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_matrix_of_zeros_is_its_own_product(rank: int) -> None:
    found = leading(torch.zeros(5, 7), rank)
    assert torch.isfinite(found.pair.a_RI).all()
    assert not (found.pair.b_OR @ found.pair.a_RI).any()
    assert found.rest == 0


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (8, 5)])
def test_a_rank_above_the_width_is_filled_with_zeros(rows: int, columns: int) -> None:
    """So that the pair has the rank that was asked for."""
    matrix = _matrix(rows, columns, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    found = leading(matrix, 10)
    assert found.pair.rank == 10
    torch.testing.assert_close(found.pair.b_OR @ found.pair.a_RI, matrix, atol=1e-12, rtol=1e-12)
