"""A gated adapter with its gate fixed is the plain adapter of those factors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from motet.adapters.dense import merge
from motet.adapters.effects import GateSpec
from motet.adapters.errors import GateError
from motet.adapters.gates.fixed import explicit, fixed, uniform
from tests.support.layouts_amt import amt
from tests.support.layouts_ilora import ilora
from tests.support.tolerances import TOLERANCES
from tests.unit.adapters.conftest import Bench

WEIGHTS = (0.5, 0.0, 0.3, 0.2)


@pytest.mark.parametrize("kind", ["router", "pool"])
def test_it_computes_what_the_dense_model_does(llama: Bench, tmp_path: Path, kind: str) -> None:
    layout = ilora(llama.model, tmp_path / "users") if kind == "router" else amt()(llama.model, tmp_path / "pool", 5)
    lowered = llama.lower(layout.folder)
    oracle, plain = layout.oracle(WEIGHTS), fixed(lowered, explicit(lowered.gate, WEIGHTS))
    assert plain.gate is None
    for target, effects in plain.effects.items():
        weight_OI, _ = merge(effects, llama.base.weight(target), None)
        TOLERANCES["dense merge", torch.float32].assert_close(weight_OI, oracle.get_submodule(target).weight)


def test_a_plain_adapter_stays_as_it_is(llama: Bench, tmp_path: Path) -> None:
    lowered = llama.lower(llama.save(tmp_path, target_modules=["q_proj"]))
    assert fixed(lowered, explicit(lowered.gate, None)) is lowered
    with pytest.raises(GateError, match="has no gate"):
        explicit(None, WEIGHTS)


@pytest.mark.parametrize(("weights", "said"), [(None, "give 4 weights"), ((0.5, 0.5), "2 numbers"), ((1.0,) * 4, "su")])
def test_what_cannot_fix_it(weights: tuple[float, ...] | None, said: str) -> None:
    spec = GateSpec("pool", 4, {}, facts={"scale_cls": None, "bias_cls": None})
    assert uniform(spec) == (0.25,) * 4
    with pytest.raises(GateError, match=said):
        explicit(spec, weights)
