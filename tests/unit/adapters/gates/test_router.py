"""The router's factors are those of a module with batch-norm layers, and a row does not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch

from motet.adapters.errors import AdapterError, MissingTensorError, NonFiniteError, ShapeError, UnmatchedTensorError
from motet.adapters.gates.instance import part
from motet.adapters.gates.router import Router, is_statistic, shapes
from tests.support.layouts_ilora import Networks, gate_tensors, networks
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.gates.conftest import EXPERTS
from tests.unit.adapters.methods.changes import Change, drop, poison, put

FACTORS = TOLERANCES["gate factors", torch.float32]
STATES = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))


def weights(made: Networks, statistics: bool = True) -> dict[str, torch.Tensor]:
    return part(gate_tensors(made, statistics=statistics), "router")


@pytest.mark.parametrize("statistics", [True, False], ids=["stored statistics", "0 and 1"])
@pytest.mark.parametrize("experts", [1, 4, 8])
def test_factors_are_those_of_the_module(experts: int, statistics: bool) -> None:
    made = networks(16, experts, seed=5, statistics=statistics)
    with torch.no_grad():
        expected_NK = made.router(STATES)
    actual_NK = Router(weights(made, statistics), experts).factors(STATES)
    FACTORS.assert_close(actual_NK, expected_NK)
    assert experts == 1 or float(expected_NK.std(0).min()) > 0.05, "the users must differ"


def test_stored_statistics_count(made: Networks) -> None:
    stored, default = (Router(weights(made, kept), EXPERTS).factors(STATES) for kept in (True, False))
    assert (stored - default).abs().max() > 1e-2


def test_absent_statistics_are_0_and_1(made: Networks) -> None:
    filled = {
        name: torch.full_like(tensor, float(name.endswith("var"))) if is_statistic(name) else tensor
        for name, tensor in weights(made).items()
    }
    default = Router(weights(made, statistics=False), EXPERTS)
    assert torch.equal(Router(filled, EXPERTS).factors(STATES), default.factors(STATES))


def test_a_user_alone_has_the_factors_it_has_among_others(made: Networks) -> None:
    router = Router(weights(made), EXPERTS)
    for row, state_L in enumerate(STATES):
        FACTORS.assert_close(router.factors(state_L[None])[0], router.factors(STATES)[row])


def test_size_is_that_of_the_official_code() -> None:
    """90,772 trained parameters."""
    trained = {name: shape for name, shape in shapes(4).items() if not is_statistic(name)}
    assert sum(torch.Size(shape).numel() for shape in trained.values()) == 90_772


SPOILT: dict[str, tuple[Change, type[AdapterError], str]] = {
    "some of the statistics": (drop("bn1.running_mean"), MissingTensorError, r"'router\.bn1\.running_mean'"),
    "a missing weight": (drop("layer3.2.conv2.weight"), MissingTensorError, r"'router\.layer3\.2\.conv2\.weight'"),
    "another block": (put("layer4.0.conv1.weight", torch.ones(1)), UnmatchedTensorError, r"'router\.layer4\.0"),
    "other experts": (put("gate.fc.bias", torch.ones(3)), ShapeError, r"gate\.fc\.bias.*\[3\], expected \[4\]"),
    "NaN": (poison("gate.fc.weight", torch.nan), NonFiniteError, r"gate\.fc\.weight"),
    "a negative variance": (
        put("layer1.0.bn2.running_var", torch.full((16,), -0.1)),
        NonFiniteError,
        r"'router\.layer1\.0\.bn2\.running_var' holds a negative variance",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_other_tensors_are_refused(made: Networks, change: Change, error: type[AdapterError], message: str) -> None:
    tensors = weights(made)
    change(tensors)
    with pytest.raises(error, match=message):
        Router(tensors, EXPERTS)
