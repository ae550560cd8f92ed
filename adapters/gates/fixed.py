"""A gated adapter with its gate fixed: the plain adapter that a request with these factors is answered by.

Must not know: requests, what computes factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from motet.adapters.effects import GateSpec, Lowered, LowRank, TargetEffects
from motet.adapters.errors import GateError
from motet.adapters.gates.build import build
from motet.adapters.gates.instance import InstanceGate, UserInput


def explicit(gate: GateSpec | None, weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """Factors that are given by themselves, as a request gives them; None where the adapter has no gate.

    Raises:
        GateError: the adapter has no gate and weights are given, or the other way round, or they are no weights of it.
    """
    if gate is None:
        if weights is not None:
            raise GateError("gate", "the adapter has no gate; leave the weights out")
        return None
    if weights is None:
        raise GateError("gate", f"the adapter computes with a gate of {gate.size} factors; give {gate.size} weights")
    own = build(gate)
    if isinstance(own, InstanceGate):
        return tuple(own.factors([UserInput(weights=weights)])[0].tolist())
    return own.factors(weights)


def uniform(gate: GateSpec) -> tuple[float, ...]:
    """The same for every factor, with a sum of one."""
    return (1 / gate.size,) * gate.size


def fixed(lowered: Lowered, factors: Sequence[float] | None) -> Lowered:
    """The adapter without its gate: ``B' = B diag(ω[groups])``.

    Args:
        factors: ω, one for each factor of the gate; None for an adapter without one, which stays as it is.
    """
    if lowered.gate is None:
        assert factors is None, factors
        return lowered
    assert factors is not None
    assert len(factors) == lowered.gate.size, (len(factors), lowered.gate.size)
    omega_G = torch.tensor(factors, dtype=torch.float64)
    effects = {
        target: replace(one, low_rank=_weighed(one, omega_G[lowered.gate.groups[target]]))
        if target in lowered.gate.groups
        else one
        for target, one in lowered.effects.items()
    }
    return replace(lowered, effects=effects, gate=None)


def _weighed(effects: TargetEffects, gate_R: torch.Tensor) -> LowRank:
    assert effects.low_rank is not None
    b_OR = (effects.low_rank.b_OR.double() * gate_R).float().contiguous()
    return LowRank(effects.low_rank.a_RI, b_OR)
