"""PoLAR's layer and its landing field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from motet.adapters.recipes.polar import INFEASIBILITY_PENALTY, PolarLinear, landing_field
from motet.adapters.recipes.run import Base, Order, begin
from tests.support.tolerances import TOLERANCES

CLOSE = TOLERANCES["dense merge", torch.float32]


def tall(n: int, rank: int, seed: int) -> torch.Tensor:
    return torch.randn(n, rank, generator=torch.Generator().manual_seed(seed))


def test_the_field_is_the_papers_with_its_large_matrices() -> None:
    """(G Mᵀ - M Gᵀ) M + lambda M (Mᵀ M - 1), here with the [n, n] products the formula is written in."""
    g, m = tall(12, 3, 1).double(), tall(12, 3, 2).double()
    expected = (g @ m.T - m @ g.T) @ m + INFEASIBILITY_PENALTY * m @ (m.T @ m - torch.eye(3))
    CLOSE.assert_close(landing_field(g.float(), m.float()), expected, magnitude=expected.abs() + 10)


def test_the_field_is_tangent_at_an_orthonormal_factor() -> None:
    """There MᵀF is skew: to first order a step keeps MᵀM = 1."""
    m = torch.linalg.qr(tall(12, 3, 0)).Q
    skew = m.T @ landing_field(tall(12, 3, 1), m)
    CLOSE.assert_close(skew + skew.T, torch.zeros(3, 3), magnitude=torch.ones(3, 3))


def test_without_a_gradient_the_field_leads_back_to_orthonormal_columns() -> None:
    m = 1.2 * torch.linalg.qr(tall(12, 3, 0)).Q
    field = landing_field(torch.zeros_like(m), m)
    assert float((field * m).sum()) > 0, "descent makes the factor shorter"
    exact = torch.linalg.qr(m).Q
    assert float(landing_field(torch.zeros_like(m), exact).abs().max()) < 1e-6


def test_a_layer_starts_as_its_base_with_orthonormal_factors() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 8)
    layer = PolarLinear(base, 3, 32)
    x_TI = torch.randn(5, 12)
    assert torch.equal(layer(x_TI), base(x_TI))
    CLOSE.assert_close(layer.a_RI @ layer.a_RI.T, torch.eye(3), magnitude=torch.ones(3, 3))
    CLOSE.assert_close(layer.b_OR.T @ layer.b_OR, torch.eye(3), magnitude=torch.ones(3, 3))


def test_a_layer_computes_its_dense_change() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 8)
    layer = PolarLinear(base, 3, 32)
    nn.init.normal_(layer.s_RR)
    dense_OI = base.weight + 32 / 3 * layer.b_OR @ layer.s_RR @ layer.a_RI
    x_TI = torch.randn(5, 12)
    CLOSE.assert_close(layer(x_TI), x_TI @ dense_OI.T + base.bias, magnitude=torch.full((5, 8), 10.0))


def test_training_keeps_the_factors_nearly_but_not_exactly_orthonormal(
    base: Callable[[], Base], order: Callable[..., Order], data: Any
) -> None:
    def distance(changes: Callable[[], None] | None) -> tuple[float, float]:
        trainee, loop = begin(order("polar", alpha=32, steps=20), base(), data)
        if changes is not None:
            object.__setattr__(trainee, "correct_gradients", changes)
        for _ in loop:
            pass
        layers = [module for module in trainee.model.modules() if isinstance(module, PolarLinear)]
        assert len(layers) == 4
        off = [float((layer.a_RI @ layer.a_RI.T - torch.eye(3)).detach().norm()) for layer in layers]
        return max(off), float(layers[0].s_RR.detach().norm())

    landed, core = distance(None)
    plain, _ = distance(lambda: None)
    assert 0 < landed < plain / 2, "the correction is what keeps them"
    assert core > 0.01
