"""Every method and layout, alone and among all others: the logits are its oracle's, and it is called what it is."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch

from tests.parity.conftest import Served
from tests.support.layouts import LAYOUTS, layouts_of
from tests.support.models import VOCABULARY
from tests.support.tolerances import TOLERANCES

Prompts = Mapping[str | None, list[int]]


@pytest.fixture(scope="module")
def prompts(served: Served) -> Prompts:
    """One prompt for each layout and for the base, 1 to 40 tokens."""
    chance = random.Random(11)
    return {
        name: [chance.randrange(3, VOCABULARY) for _ in range(chance.randint(1, 40))]
        for name in [None, *served.layouts]
    }


@pytest.fixture(scope="module")
def mixed(served: Served, prompts: Prompts) -> Mapping[str | None, torch.Tensor]:
    """Logits [V] of each after its prompt, all computed in one batch."""
    return dict(zip(prompts, served.harness.logits([(prompt, name) for name, prompt in prompts.items()]), strict=True))


def _require(layout: str, served: Served) -> None:
    if layout not in layouts_of(served.family):
        pytest.skip(f"there is no {layout} for {served.family}")


@pytest.mark.parametrize("among", ["alone", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_the_oracles(
    served: Served, layout: str, among: str, prompts: Prompts, mixed: Mapping[str | None, torch.Tensor]
) -> None:
    _require(layout, served)
    prompt = prompts[layout]
    actual = mixed[layout] if among == "mixed" else served.harness.logits([(prompt, layout)])[0]
    expected = served.expected_logits(prompt, layout)
    TOLERANCES["logits", torch.float32].assert_close(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_change_is_far_above_the_tolerance(served: Served, layout: str) -> None:
    """The comparison means something: the oracle itself differs from the base."""
    _require(layout, served)
    prompt = list(range(3, 15))
    change = (served.expected_logits(prompt, layout) - served.expected_logits(prompt, None)).abs().max()
    assert change > 100 * TOLERANCES["logits", torch.float32].atol


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_method_is_reported(served: Served, layout: str) -> None:
    _require(layout, served)
    receipt = served.harness.registry.get(layout).receipt
    assert (receipt.method, receipt.exact) == (served.layouts[layout].method, True)
    assert receipt.form


def test_the_base_is_what_it_was(served: Served) -> None:
    """No import writes to the base: methods that train on a residual model must not leave it behind."""
    base = served.harness.loaded.base
    for name in base.targets:
        assert torch.equal(base.parameter(f"{name}.weight"), served.reference.get_submodule(name).weight), name


def test_base_logits_among_all(served: Served, prompts: Prompts, mixed: Mapping[str | None, torch.Tensor]) -> None:
    TOLERANCES["logits", torch.float32].assert_close(mixed[None], served.expected_logits(prompts[None], None))
