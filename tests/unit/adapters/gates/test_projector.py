"""The projector is two linears around the exact GELU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from motet.adapters.errors import MissingTensorError, ShapeError
from motet.adapters.gates.instance import part
from motet.adapters.gates.projector import Projector
from tests.support.layouts_ilora import Networks, gate_tensors
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.gates.conftest import WIDTH

ITEMS = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def weights(made: Networks) -> dict[str, torch.Tensor]:
    return part(gate_tensors(made), "projector")


def test_rows_are_those_of_the_module(made: Networks) -> None:
    with torch.no_grad():
        expected_ND = made.projector(ITEMS)
        approximate_ND = nn.Sequential(
            made.projector.mlp_proj[0], nn.GELU(approximate="tanh"), made.projector.mlp_proj[2]
        )(ITEMS)
    close = TOLERANCES["user state", torch.float32]
    close.assert_close(Projector(weights(made), WIDTH).rows(ITEMS), expected_ND)
    with pytest.raises(AssertionError, match="elements differ"):
        close.assert_close(approximate_ND, expected_ND)


def test_another_width_is_refused(made: Networks) -> None:
    with pytest.raises(ShapeError, match=r"'projector\.mlp_proj\.\d\.\w+' has shape"):
        Projector(weights(made), WIDTH + 1)


def test_half_a_projector_is_refused(made: Networks) -> None:
    tensors = weights(made)
    del tensors["mlp_proj.2.bias"]
    with pytest.raises(MissingTensorError, match=r"'projector\.mlp_proj\.2\.bias'"):
        Projector(tensors, WIDTH)
