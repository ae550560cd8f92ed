"""Replaced parameters act on the adapter's rows only, wherever those lie, and cost nothing where nobody has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from motet.adapters.errors import ArenaFullError
from motet.server.model.overlay import OverlaidModules, OverlayPlan, RowDims
from tests.support.harness import Harness
from tests.support.layouts_full import fine_tuned
from tests.support.models import reference_copy, tiny_llama


@dataclass
class Step:
    overlays: OverlayPlan | None = None


@pytest.fixture
def norm() -> nn.Module:
    return nn.LayerNorm(4)


X = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))


def test_only_the_adapters_rows_are_computed_again(norm: nn.Module) -> None:
    step = Step()
    overlaid = OverlaidModules({"norm": norm}, step, {"norm": 1})
    base = norm(X)
    overlaid.install()
    assert torch.equal(norm(X), base)
    weight, bias = torch.full((4,), 2.0), torch.ones(4)
    step.overlays = OverlayPlan([(1, 3, {"norm.weight": weight}), (3, 4, {}), (4, 6, {"norm.bias": bias, "x.w": bias})])
    found = norm(X)
    assert torch.equal(found[:, [0, 3]], base[:, [0, 3]])
    torch.testing.assert_close(found[:, 1:3], 2 * base[:, 1:3])
    torch.testing.assert_close(found[:, 4:], base[:, 4:] + 1)


def test_rows_may_be_any_dimension(norm: nn.Module) -> None:
    """Norms of single heads: [1, heads, T, width]."""
    dims = RowDims({"norm": norm, "idle": nn.LayerNorm(4)})
    for rows in (7, 3):
        dims.expect(rows)
        norm(torch.zeros(1, 3, rows, 4))
    learnt = dims.finish()
    assert learnt == {"norm": 2}
    step = Step(OverlayPlan([(0, 2, {"norm.bias": torch.ones(4)})]))
    OverlaidModules({"norm": norm}, step, learnt).install()
    found = norm(X.view(1, 2, 3, 4))
    assert torch.equal(found[:, :, 2], nn.functional.layer_norm(X.view(1, 2, 3, 4), (4,))[:, :, 2])


def test_a_module_whose_rows_cannot_be_told_from_heads_cannot_be_replaced(norm: nn.Module) -> None:
    dims = RowDims({"norm": norm})
    dims.expect(3)
    norm(torch.zeros(1, 3, 3, 4))
    assert dims.finish() == {}


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    return lambda *parts: fine_tuned(*parts)(tiny_llama(), tmp_path / "model", 1).folder


def hooks(harness: Harness) -> int:
    return sum(len(module._forward_hooks) for module in harness.loaded.model.modules())


def test_a_server_without_such_adapters_has_no_hooks(trained: Callable[..., Path]) -> None:
    harness = Harness(reference_copy(tiny_llama()))
    harness.run([([5, 6, 7], None)])
    assert hooks(harness) == 0
    harness.load("full", trained("norm"))
    harness.run([([5, 6, 7], None)])
    assert hooks(harness) == 0
    harness.run([([5, 6, 7], "full"), ([5, 6, 7], None)])
    installed = hooks(harness)
    assert installed > 0
    harness.run([([5, 6, 7], "full")])
    assert hooks(harness) == installed


def test_a_model_that_does_not_fit_is_refused_and_leaves_nothing(trained: Callable[..., Path]) -> None:
    folder = trained("")
    needed = sum(parameter.numel() * 4 for parameter in tiny_llama().parameters())
    harness = Harness(tiny_llama(), arena_bytes=needed - 4096)
    with pytest.raises(ArenaFullError, match=r"needs [0-9,]+ bytes"):
        harness.load("full", folder)
    assert harness.registry.residency.used_bytes == 0
    roomy = Harness(tiny_llama(), arena_bytes=needed + 4096)
    roomy.load("full", folder)
    assert needed <= roomy.registry.residency.used_bytes <= needed + 4096  # the tied embedding lies there once
    roomy.registry.unload("full")
    assert roomy.registry.residency.used_bytes == 0
